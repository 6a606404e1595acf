"""From scores to experiences, against numbers worked out by hand."""

from __future__ import annotations

import math

import torch

from rlhf.recipe.stages import GRPORecipe, PPORecipe
from rlhf.train.advantages import Scored, grpo_experience, ppo_experience

NAN = float("nan")


def recipe(kind, **options):
    return kind.model_validate({"model": {"from": "sft"}, "data": {"path": "x"}, **options})


def scored(scores: list[float], mask: list[list[int]], finished: list[bool] | None = None, **tensors) -> Scored:
    """One prompt column, then the response columns of the mask."""
    response_mask = torch.tensor(mask, dtype=torch.bool)
    rows, responses = response_mask.shape
    zeros = torch.zeros(rows, responses)
    fields = {
        "ids": torch.ones(rows, 1 + responses, dtype=torch.int64),
        "attention": torch.cat([torch.ones(rows, 1, dtype=torch.bool), response_mask], 1),
        "response_mask": response_mask,
        "sample_logprobs": zeros,
        "old_logprobs": zeros,
        "ref_logprobs": zeros,
        "finished": torch.tensor(finished or [True] * rows),
        "scores": torch.tensor(scores),
        **tensors,
    }
    return Scored(**fields)


def close(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=1e-6, rtol=0)


def test_ppo_by_hand():
    # gamma 1, lam 0.5: d_t = r_t + V_{t+1} - V_t, A_t = d_t + 0.5 A_{t+1}
    options = {"kl": {"coef": 0.1}, "advantage": {"gamma": 1.0, "lam": 0.5}, "whiten_advantages": False}
    rollout = scored(
        [2.0, -1.0],
        [[1, 1, 1], [1, 1, 0]],
        old_logprobs=torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, 7.0]]),
        ref_logprobs=torch.tensor([[-2.0, -2.0, -3.0], [-1.0, -2.0, 9.0]]),
        old_values=torch.tensor([[0.5, 1.0, 1.5], [0.0, 1.0, 9.0]]),
    )
    experience = ppo_experience(rollout, recipe(PPORecipe, **options))
    # k1 = old - ref = [1, 0, 2], [0, 1]; rewards = -0.1 k1, plus the score at the last token
    close(experience.rewards, [[-0.1, 0.0, 1.8], [0.0, -1.1, 0.0]])
    # row 1: d = [-0.1+1-0.5, 0+1.5-1, 1.8-1.5] = [0.4, 0.5, 0.3]; A = [0.4+0.5*0.65, 0.5+0.5*0.3, 0.3]
    # row 2: d = [0+1-0, -1.1-1] = [1, -2.1]; A = [1-1.05, -2.1]
    close(experience.advantages, [[0.725, 0.65, 0.3], [-0.05, -2.1, 0.0]])
    close(experience.returns, [[1.225, 1.65, 1.8], [-0.05, -1.1, 0.0]])
    assert experience.old_values is rollout.old_values


def test_ppo_whitens_over_all_response_tokens():
    rollout = scored([1.0, 3.0], [[1, 0], [1, 1]], old_values=torch.zeros(2, 2))
    options = {"kl": {"coef": 0.0}, "advantage": {"gamma": 1.0, "lam": 1.0}}
    advantages = ppo_experience(rollout, recipe(PPORecipe, **options)).advantages
    # before: [1], [3, 3]: mean 7/3, unbiased variance 4/3
    mean, std = 7 / 3, math.sqrt(4 / 3 + 1e-8)
    close(advantages, [[(1 - mean) / std, 0.0], [(3 - mean) / std, (3 - mean) / std]])


def test_scores_are_clipped_and_unfinished_answers_pay():
    rollout = scored([9.0, 1.0], [[1], [1]], finished=[True, False], old_values=torch.zeros(2, 1))
    options = {"scores": {"clip": 5.0, "missing_eos_penalty": 2.0}, "whiten_advantages": False, "kl": {"coef": 0.0}}
    experience = ppo_experience(rollout, recipe(PPORecipe, **options))
    close(experience.scores, [5.0, -1.0])
    close(experience.rewards, [[5.0], [-1.0]])


def test_an_unscored_answer_changes_nothing_in_ppo():
    kept = scored([1.0, 2.0], [[1, 1], [1, 0]], old_values=torch.tensor([[0.1, 0.2], [0.3, 0.0]]))
    more = scored(
        [1.0, 2.0, NAN],
        [[1, 1], [1, 0], [0, 0]],
        old_values=torch.tensor([[0.1, 0.2], [0.3, 0.0], [4.0, 5.0]]),
        old_logprobs=torch.tensor([[0.0, 0.0], [0.0, 0.0], [NAN, -9.0]]),
    )
    plain, with_unscored = (ppo_experience(rollout, recipe(PPORecipe)) for rollout in (kept, more))
    close(with_unscored.advantages, [*plain.advantages.tolist(), [0.0, 0.0]])
    close(with_unscored.returns, [*plain.returns.tolist(), [0.0, 0.0]])


def test_grpo_by_hand():
    # two groups of two: mean 2 and std sqrt(2); a group of equals
    options = {"train": {"answers": 2}, "advantage": {"eps": 1.0}}
    rollout = scored([1.0, 3.0, 4.0, 4.0], [[1, 1], [1, 0], [1, 1], [1, 1]])
    experience = grpo_experience(rollout, recipe(GRPORecipe, **options))
    unit = 1 / (math.sqrt(2) + 1)
    close(experience.advantages, [[-unit, -unit], [unit, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert experience.returns is None and experience.old_values is None


def test_an_unscored_answer_leaves_its_group():
    options = {"train": {"answers": 3}, "advantage": {"eps": 1.0}}
    rollout = scored([1.0, NAN, 3.0], [[1], [0], [1]])
    unit = 1 / (math.sqrt(2) + 1)
    close(grpo_experience(rollout, recipe(GRPORecipe, **options)).advantages, [[-unit], [0.0], [unit]])
