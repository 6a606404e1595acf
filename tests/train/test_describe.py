"""Every number about a rollout against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.batch import Experience
from rlhf.recipe.stages import GRPORecipe
from rlhf.train.describe import describe
from rlhf.train.experience import Answers, Seen

NAN = math.nan
# Four answers to two prompts; the third is unscored. One prompt column.
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]]).bool()
SCORES = torch.tensor([1.0, 4.0, NAN, 4.0])
OLD = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 50.0], [9.0, 9.0, 9.0], [-2.0, -2.0, 50.0]])
REF = torch.tensor([[-1.5, -2.0, -1.0], [-1.0, -2.0, 70.0], [0.0, 0.0, 0.0], [-2.0, -2.0, 70.0]])
SAMPLED = OLD + torch.tensor([[0.1, 0.0, 0.0], [0.0, -0.2, 9.0], [9.0, 9.0, 9.0], [0.0, 0.0, 9.0]])


def answers(**changes) -> Answers:
    ids = torch.tensor([[9, 5, 6, 7], [9, 5, 6, 0], [9, 5, 6, 7], [9, 8, 8, 0]])
    fields = {
        "ids": ids,
        "attention": torch.cat([torch.ones(4, 1).bool(), MASK], 1),
        "response_mask": MASK,
        "sample_logprobs": SAMPLED,
        "finished": torch.tensor([True, False, True, True]),
        "scores": SCORES,
        "parts": torch.stack([SCORES, torch.tensor([2.0, NAN, NAN, 0.0])], 1),
        **changes,
    }
    return Answers(**fields)


def experience(**changes) -> Experience:
    given = answers()
    learned = MASK & ~SCORES.isnan()[:, None]
    advantages = torch.tensor([[1.0, 1.0, 1.0], [-2.0, -2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 3.0, 0.0]])
    fields = {"response_mask": learned, "old_logprobs": OLD, "ref_logprobs": REF, "advantages": advantages, **changes}
    return Experience(given.ids, given.attention, scores=SCORES, **fields)


def described(given: Answers | None = None, found: Experience | None = None, names=("a", "b"), per_prompt: int = 2):
    recipe = GRPORecipe.model_validate(
        {"model": {"from": "sft"}, "data": {"path": "x"}, "train": {"answers": per_prompt}}
    )
    return describe(given or answers(), Seen(OLD, REF), found or experience(), recipe, list(names))


def test_scores_and_answers_by_hand():
    found = described()
    assert found["reward/score_mean"] == 3.0 and found["reward/score_std"] == pytest.approx(math.sqrt(3))  # of 1, 4, 4
    assert found["reward/unscored"] == 1.0
    assert found["rollout/length_mean"] == 2.5 and found["rollout/finished"] == 0.75
    assert found["rollout/repeated"] == 0.5  # 5 6 7 twice
    assert found["a"] == 3.0 and found["b"] == 1.0  # each over the answers that it scored


def test_distances_by_hand():
    found = described()
    # l = 0.5, 0, -2 | 0, 1 | 0, 0 on seven tokens of three scored answers
    assert found["rollout/kl_ref"] == pytest.approx((0.5 - 2.0 + 1.0) / 3)
    assert found["rollout/ref_gap"] == pytest.approx((0.5 + 2.0 + 1.0) / 7)
    assert found["rollout/sampler_gap"] == pytest.approx((0.1 + 0.2) / 7)
    assert found["rollout/advantage_abs"] == pytest.approx((3 * 1.0 + 2 * 2.0 + 2 * 3.0) / 7)


def test_tokens_that_are_left_out_of_the_loss_are_left_out_of_its_advantages_only():
    dropped = experience().response_mask & answers().finished[:, None]
    found = described(found=experience(response_mask=dropped))
    assert found["rollout/advantage_abs"] == pytest.approx((3 * 1.0 + 2 * 3.0) / 5)
    assert found["rollout/ref_gap"] == pytest.approx((0.5 + 2.0 + 1.0) / 7)


def test_the_critic_by_hand():
    values = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 9.0], [9.0, 9.0, 9.0], [3.0, 3.0, 9.0]])
    returns = torch.tensor([[2.0, 2.0, 2.0], [2.0, 2.0, 9.0], [7.0, 7.0, 7.0], [3.0, 5.0, 9.0]])
    found = described(found=experience(old_values=values, returns=returns))
    assert found["value/mean"] == pytest.approx((3 + 4 + 6) / 7) and found["value/return_mean"] == pytest.approx(18 / 7)
    # errors 1, 1, 1, 0, 0, 0, 2 and returns 2, 2, 2, 2, 2, 3, 5
    error_var = (3 * 1 + 4) / 7 - (5 / 7) ** 2
    return_var = (5 * 4 + 9 + 25) / 7 - (18 / 7) ** 2
    assert found["value/explained_variance"] == pytest.approx(1 - error_var / return_var, abs=1e-6)
    assert not any(name.startswith("value/") for name in described())


def test_test_scores_have_a_deviation_too():
    found = described(names=("reward/model", "test/score_mean"))
    assert found["test/score_mean"] == 1.0 and found["test/score_std"] == pytest.approx(math.sqrt(2))


def test_flat_groups_are_those_without_a_difference():
    assert described()["reward/flat_groups"] == 0.5  # 1 and 4; one scored answer alone
    assert described(answers(scores=torch.tensor([1.0, 1.0, 2.0, 3.0])))["reward/flat_groups"] == 0.5
    assert "reward/flat_groups" not in described(per_prompt=1)


def test_what_is_not_defined_is_not_a_number():
    one_score = answers(scores=torch.tensor([2.0, NAN, NAN, NAN]), parts=torch.full((4, 2), NAN))
    found = described(one_score)
    assert found["reward/score_mean"] == 2.0 and found["reward/unscored"] == 3.0
    undefined = {name for name, value in found.items() if not math.isfinite(value)}
    assert undefined == {"reward/score_std", "a", "b"}
