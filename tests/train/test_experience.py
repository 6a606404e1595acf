"""From scores to experiences, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlhf.algo.advantages import ADVANTAGES
from rlhf.recipe.stages import GRPORecipe, PPORecipe
from rlhf.train.experience import Answers, Seen, to_experience
from rlhf.train.state import OnlineState

NAN = float("nan")


def recipe(kind, **options):
    return kind.model_validate({"model": {"from": "sft"}, "data": {"path": "x"}, **options})


def answers(scores: list[float], mask: list[list[int]], finished: list[bool] | None = None, **tensors) -> Answers:
    """One prompt column, then the response columns of the mask."""
    response_mask = torch.tensor(mask, dtype=torch.bool)
    rows, responses = response_mask.shape
    fields = {
        "ids": torch.ones(rows, 1 + responses, dtype=torch.int64),
        "attention": torch.cat([torch.ones(rows, 1, dtype=torch.bool), response_mask], 1),
        "response_mask": response_mask,
        "sample_logprobs": torch.zeros(rows, responses),
        "finished": torch.tensor(finished or [True] * rows),
        "scores": torch.tensor(scores),
        "parts": torch.tensor(scores)[:, None],
        **tensors,
    }
    return Answers(**fields)


def seen(given: Answers, **tensors) -> Seen:
    """The policy is the reference where nothing else is said."""
    zeros = torch.zeros(given.response_mask.shape)
    return Seen(**{"old_logprobs": zeros, "ref_logprobs": zeros, **tensors})


def experience(kind, given: Answers, models: dict | None = None, greedy: Answers | None = None, state=None, **options):
    chosen = recipe(kind, **options)
    state = OnlineState.at_start(chosen) if state is None else state
    return to_experience(given, seen(given, **(models or {})), chosen, state, greedy)


def close(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), atol=1e-6, rtol=0)


# --- PPO ------------------------------------------------------------------------------------------------------------

OLD = torch.tensor([[-1.0, -2.0, -1.0], [-1.0, -1.0, 7.0]])
REF = torch.tensor([[-2.0, -2.0, -3.0], [-1.0, -2.0, 9.0]])
VALUES = torch.tensor([[0.5, 1.0, 1.5], [0.0, 1.0, 9.0]])


def test_ppo_by_hand():
    # gamma 1, lam 0.5: d_t = r_t + V_{t+1} - V_t, A_t = d_t + 0.5 A_{t+1}
    options = {"kl": {"coef": 0.1}, "advantage": {"gamma": 1.0, "lam": 0.5}, "whiten_advantages": False}
    given = answers([2.0, -1.0], [[1, 1, 1], [1, 1, 0]])
    models = {"old_logprobs": OLD, "ref_logprobs": REF, "old_values": VALUES}
    found = experience(PPORecipe, given, models, **options)
    # k1 = old - ref = [1, 0, 2], [0, 1]; rewards = -0.1 k1, plus the score at the last token
    close(found.rewards, [[-0.1, 0.0, 1.8], [0.0, -1.1, 0.0]])
    # row 1: d = [-0.1+1-0.5, 0+1.5-1, 1.8-1.5] = [0.4, 0.5, 0.3]; A = [0.4+0.5*0.65, 0.5+0.5*0.3, 0.3]
    # row 2: d = [0+1-0, -1.1-1] = [1, -2.1]; A = [1-1.05, -2.1]
    close(found.advantages, [[0.725, 0.65, 0.3], [-0.05, -2.1, 0.0]])
    close(found.returns, [[1.225, 1.65, 1.8], [-0.05, -1.1, 0.0]])
    assert found.old_values is VALUES


def test_a_kl_in_the_loss_is_not_in_the_rewards():
    options = {"kl": {"coef": 0.1, "placement": "loss", "estimator": "k3"}}
    given = answers([2.0, -1.0], [[1, 1, 1], [1, 1, 0]])
    found = experience(PPORecipe, given, {"old_logprobs": OLD, "ref_logprobs": REF, "old_values": VALUES}, **options)
    close(found.rewards, [[0.0, 0.0, 2.0], [0.0, -1.0, 0.0]])
    close(found.ref_logprobs, REF.tolist())


def test_the_coefficient_is_that_of_the_state():
    given = answers([0.0, 0.0], [[1, 1, 1], [1, 1, 0]])
    models = {"old_logprobs": OLD, "ref_logprobs": REF, "old_values": VALUES}
    state = OnlineState.at_start(recipe(PPORecipe))
    state.kl_coef = 2.0
    close(experience(PPORecipe, given, models, state=state).rewards, [[-2.0, 0.0, -4.0], [0.0, -2.0, 0.0]])


def test_ppo_whitens_over_all_response_tokens():
    given = answers([1.0, 3.0], [[1, 0], [1, 1]])
    options = {"kl": {"coef": 0.0}, "advantage": {"gamma": 1.0, "lam": 1.0}}
    found = experience(PPORecipe, given, {"old_values": torch.zeros(2, 2)}, **options)
    # before: [1], [3, 3]: mean 7/3, unbiased variance 4/3
    mean, std = 7 / 3, math.sqrt(4 / 3 + 1e-8)
    close(found.advantages, [[(1 - mean) / std, 0.0], [(3 - mean) / std, (3 - mean) / std]])


def test_whitened_rewards_keep_their_mean():
    given = answers([1.0, 5.0], [[1, 0], [1, 1]])
    options = {"kl": {"coef": 0.0}, "whiten_rewards": True}
    found = experience(PPORecipe, given, {"old_values": torch.zeros(2, 2)}, **options)
    # before: [1], [0, 5]: mean 2, unbiased variance (1 + 4 + 9) / 2 = 7
    std = math.sqrt(7 + 1e-8)
    close(found.rewards, [[2 - 1 / std, 0.0], [2 - 2 / std, 2 + 3 / std]])


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_clipped_and_unfinished_answers_pay():
    given = answers([9.0, 1.0], [[1], [1]], finished=[True, False])
    options = {"scores": {"clip": 5.0, "missing_eos_penalty": 2.0}, "kl": {"coef": 0.0}}
    found = experience(PPORecipe, given, {"old_values": torch.zeros(2, 1)}, **options)
    close(found.scores, [5.0, -1.0])
    close(found.rewards, [[5.0], [-1.0]])


def test_length_costs_and_so_do_the_last_tokens_before_the_limit():
    given = answers([0.0, 0.0, 0.0], [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    options = {"scores": {"length_penalty": 0.25, "overlong_buffer": 2}, "sampling": {"max_new_tokens": 4}}
    found = experience(PPORecipe, given, {"old_values": torch.zeros(3, 4)}, **options)
    close(found.scores, [-0.25, -0.75 - 0.5, -1.0 - 1.0])


def test_running_normalisation_counts_every_rollout_once():
    options = {"scores": {"normalise": "running"}, "kl": {"coef": 0.0}}
    state = OnlineState.at_start(recipe(PPORecipe, **options))
    models = {"old_values": torch.zeros(2, 1)}
    first = experience(PPORecipe, answers([1.0, 3.0], [[1], [1]]), models, state=state, **options)
    close(first.scores, [-1 / math.sqrt(2), 1 / math.sqrt(2)])  # mean 2, unbiased variance 2
    second = experience(PPORecipe, answers([8.0, NAN], [[1], [1]]), models, state=state, **options)
    assert state.scores == {"count": 3.0, "total": 12.0, "squares": 74.0}
    close(second.scores[:1], [(8 - 4) / math.sqrt(13)])  # of 1, 3, 8: mean 4, variance (9 + 1 + 16) / 2
    assert second.scores[1].isnan() and not second.response_mask[1].any()


def test_dropped_unfinished_answers_still_are_compared_with():
    options = {"train": {"answers": 2}, "scores": {"drop_unfinished": True}, "advantage": {"name": "dr_grpo"}}
    given = answers([1.0, 3.0], [[1, 1], [1, 1]], finished=[True, False])
    found = experience(GRPORecipe, given, **options)
    close(found.advantages, [[-1.0, -1.0], [1.0, 1.0]])
    assert found.response_mask.tolist() == [[True, True], [False, False]]


def test_an_unscored_answer_changes_nothing_in_ppo():
    values = torch.tensor([[0.1, 0.2], [0.3, 0.0], [4.0, 5.0]])
    kept = answers([1.0, 2.0], [[1, 1], [1, 0]])
    more = answers([1.0, 2.0, NAN], [[1, 1], [1, 0], [1, 1]])
    old = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, -9.0]])
    plain = experience(PPORecipe, kept, {"old_values": values[:2]})
    with_unscored = experience(PPORecipe, more, {"old_values": values, "old_logprobs": old})
    assert not with_unscored.response_mask[2].any()
    close(with_unscored.advantages, [*plain.advantages.tolist(), [0.0, 0.0]])
    close(with_unscored.returns[:2], plain.returns.tolist())


# --- without a critic -----------------------------------------------------------------------------------------------


def test_grpo_by_hand():
    # two groups of two: mean 2 and std sqrt(2); a group of equals
    options = {"train": {"answers": 2}, "advantage": {"eps": 1.0}}
    found = experience(GRPORecipe, answers([1.0, 3.0, 4.0, 4.0], [[1, 1], [1, 0], [1, 1], [1, 1]]), **options)
    unit = 1 / (math.sqrt(2) + 1)
    close(found.advantages, [[-unit, -unit], [unit, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert found.returns is None and found.old_values is None


def test_an_unscored_answer_leaves_its_group():
    options = {"train": {"answers": 3}, "advantage": {"eps": 1.0}}
    unit = 1 / (math.sqrt(2) + 1)
    found = experience(GRPORecipe, answers([1.0, NAN, 3.0], [[1], [1], [1]]), **options)
    close(found.advantages, [[-unit], [0.0], [unit]])


def test_a_kl_in_the_reward_is_in_the_returns_of_a_group():
    options = {"train": {"answers": 2}, "advantage": {"name": "rloo"},
               "kl": {"placement": "reward", "estimator": "k1", "coef": 0.5}}  # fmt: skip
    given = answers([2.0, -1.0], [[1, 1, 1], [1, 1, 0]])
    found = experience(GRPORecipe, given, {"old_logprobs": OLD, "ref_logprobs": REF}, **options)
    # KL 3 and 1: returns 0.5 and -1.5, each against the other
    close(found.advantages, [[2.0, 2.0, 2.0], [-2.0, -2.0, 0.0]])


def test_the_running_baseline_comes_from_earlier_rollouts():
    options = {"train": {"answers": 1}, "advantage": {"name": "reinforce", "decay": 0.5}}
    state = OnlineState.at_start(recipe(GRPORecipe, **options))
    for scores, expected, baseline in (([2.0, 4.0], [2.0, 4.0], 3.0), ([1.0, 6.0], [-2.0, 3.0], 3.25)):
        found = experience(GRPORecipe, answers(scores, [[1], [1]]), state=state, **options)
        close(found.advantages, [[value] for value in expected])
        assert state.baseline == pytest.approx(baseline)


def test_remax_compares_with_the_greedy_answer_after_the_same_penalties():
    options = {"train": {"answers": 2}, "advantage": {"name": "remax"}, "scores": {"missing_eos_penalty": 1.0}}
    given = answers([1.0, 0.0, 2.0, 5.0], [[1]] * 4)
    greedy = answers([0.5, 3.0], [[1], [1]], finished=[False, True])
    found = experience(GRPORecipe, given, greedy=greedy, **options)
    close(found.advantages, [[1.5], [0.5], [-1.0], [2.0]])


def test_steps_are_normalised_in_their_group_and_summed_from_each_token_on():
    options = {"train": {"answers": 2}, "advantage": {"name": "process_grpo", "eps": 1.0},
               "rewards": [{"kind": "process", "function": "a.py:f"}]}  # fmt: skip
    steps = torch.tensor([[1.0, NAN, 3.0], [NAN, 2.0, NAN]])
    given = answers([4.0, 2.0], [[1, 1, 1], [1, 1, 0]], steps=steps)
    # of 1, 3, 2: mean 2, std 1: normalised -0.5, 0.5, 0
    close(experience(GRPORecipe, given, **options).advantages, [[0.0, 0.5, 0.5], [0.0, 0.0, 0.0]])


@pytest.mark.parametrize("entry", ADVANTAGES, ids=lambda e: e.name)
def test_every_estimator_gets_what_it_asks_for_and_gives_one_advantage_per_token(entry):
    kind = PPORecipe if "values" in entry.inputs else GRPORecipe
    options = {"advantage": {"name": entry.name}, "train": {"answers": 2}, "whiten_advantages": False}
    mask = [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
    given = answers([1.0, -2.0, 0.5, 4.0], mask, steps=torch.randn(4, 3))
    models = {"old_values": torch.randn(4, 3)} if kind is PPORecipe else {}
    greedy = answers([0.3, 0.7], [[1], [1]])
    found = experience(kind, given, models, greedy, **options)
    assert found.advantages.shape == (4, 3) and found.advantages.dtype == torch.float32
    assert found.advantages.isfinite().all() and (found.advantages[~given.response_mask] == 0).all()
    assert (found.advantages != 0).any()
    with_garbage = replace(given, scores=torch.tensor([1.0, -2.0, 0.5, NAN]))
    assert (experience(kind, with_garbage, models, greedy, **options).advantages[3] == 0).all()
