"""Objectives on log-probs and scores that are given, so that losses and metrics can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algo.advantages import ADVANTAGES
from rlhf.batch import Experience, Pairs, Tokens
from rlhf.recipe.options import RmBtLoss
from rlhf.recipe.pair_options import DpoLoss
from rlhf.recipe.policy_options import GaeAdvantage, PpoPenaltyLoss, PpoValueLoss
from rlhf.recipe.schema import OptimBlock
from rlhf.recipe.stages import GRPORecipe
from rlhf.train.objectives import (
    PolicyObjective,
    PretrainingObjective,
    RewardObjective,
    SFTObjective,
    ValueObjective,
    answer_logprobs,
    bind,
    experience_counts,
    join,
    trained,
    trim,
    trim_experience,
)
from rlhf.train.preference import Policy, PreferenceObjective
from rlhf.train.state import OnlineState


class Given:
    """Stands where a model under an engine stands: `answer(ids, attention, **options)` is its output."""

    device = torch.device("cpu")

    def __init__(self, answer) -> None:
        self.answer, self.calls = answer, []

    def __call__(self, ids: Tensor, attention: Tensor, *mask: Tensor, **options):
        self.calls.append((ids, attention, options))
        return self.answer(ids, attention, *mask, **options)


def tokens(lengths: list[int], trained_from: list[int], width: int) -> Tokens:
    """Row i has lengths[i] tokens 10i+1, 10i+2, ... of which those from trained_from[i] on count."""
    columns = torch.arange(width)
    attention = columns < torch.tensor(lengths)[:, None]
    ids = torch.where(attention, 10 * torch.arange(len(lengths))[:, None] + columns + 1, 0)
    return Tokens(ids, attention, attention & (columns >= torch.tensor(trained_from)[:, None]))


def minus_ids(ids: Tensor, attention: Tensor, mask: Tensor, **_) -> Tensor:
    """Log-probs that name their token: -id / 100."""
    return -ids[:, -mask.shape[1] :].float() / 100 * mask


# --- layout -----------------------------------------------------------------------------------------------------------


def test_bind_fills_in_the_options_of_a_block():
    gae = bind(ADVANTAGES, GaeAdvantage(gamma=0.5, lam=0.25))
    assert gae.func is ADVANTAGES["gae"].function and gae.keywords == {"gamma": 0.5, "lam": 0.25}


def test_join_pads_the_shorter_side():
    pairs = Pairs(tokens([2, 3], [1, 1], 3), tokens([4, 1], [2, 0], 4), torch.zeros(2))
    both = join(pairs)
    assert both.ids.tolist() == [[1, 2, 0, 0], [11, 12, 13, 0], [1, 2, 3, 4], [11, 0, 0, 0]]
    assert both.attention.sum(-1).tolist() == [2, 3, 4, 1]
    assert both.mask.int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 0]]


def test_trim_drops_common_padding_only():
    trimmed = trim(tokens([2, 3], [1, 1], 6))
    assert trimmed.ids.tolist() == [[1, 2, 0], [11, 12, 13]]
    full = tokens([3, 3], [1, 1], 3)
    assert trim(full).ids.shape == (2, 3)


def experience(attention: list[list[int]], responses: int, **fields) -> Experience:
    mask = torch.tensor(attention, dtype=torch.bool)
    rows, width = mask.shape
    numbers = torch.arange(rows * width).view(rows, width)
    per_token = numbers[:, width - responses :].float()
    values = {
        "ids": numbers,
        "attention": mask,
        "response_mask": mask[:, width - responses :],
        "old_logprobs": per_token,
        "ref_logprobs": per_token,
        "advantages": per_token,
        "scores": torch.zeros(rows),
        **fields,
    }
    return Experience(**values)


def test_an_experience_is_trimmed_on_both_ends():
    #            prompts, left-padded   answers, right-padded
    whole = experience([[0, 0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0]], responses=4)
    trimmed = trim_experience(whole)
    assert trimmed.ids.tolist() == [[1, 2, 3, 4, 5], [9, 10, 11, 12, 13]]
    assert trimmed.response_mask.int().tolist() == [[1, 0], [1, 1]]
    assert trimmed.old_logprobs.tolist() == [[4, 5], [12, 13]] and trimmed.scores.shape == (2,)


def test_trimming_keeps_a_column_for_empty_answers():
    trimmed = trim_experience(experience([[1, 1, 0, 0]], responses=2))
    assert trimmed.response_mask.shape == (1, 1) and not trimmed.response_mask.any()
    assert trim_experience(experience([[1, 0, 1, 1]], responses=2)).ids.tolist() == [[1, 2, 3]]


def test_an_unscored_answer_still_has_its_tokens():
    """Its mask is empty, but the tokens stay: trimming goes by attention."""
    unscored = experience([[1, 1, 1, 0]], responses=2, response_mask=torch.zeros(1, 2, dtype=torch.bool))
    assert trim_experience(unscored).ids.tolist() == [[0, 1, 2]]
    assert {name: int(count) for name, count in experience_counts(unscored).items()} == {"tokens": 0, "sequences": 0}


def test_counts_of_an_experience():
    counts = experience_counts(experience([[1, 1, 1, 0], [1, 1, 1, 1]], responses=2))
    assert {name: int(count) for name, count in counts.items()} == {"tokens": 3, "sequences": 2}


def test_the_trained_columns():
    assert trained(tokens([4, 4], [3, 2], 4).mask).shape == (2, 2)
    assert trained(tokens([4, 4], [0, 2], 4).mask).shape == (2, 3)  # nothing predicts the first token
    assert trained(torch.zeros(2, 4, dtype=torch.bool)).shape == (2, 3)


def test_answer_logprobs_are_sums_over_the_mask():
    engine = Given(minus_ids)
    rows = tokens([4, 3], [2, 1], 4)
    found = answer_logprobs(engine, rows)
    torch.testing.assert_close(found, torch.tensor([-(3 + 4) / 100, -(12 + 13) / 100]), atol=1e-6, rtol=0)
    assert engine.calls[0][2] == {}


# --- losses -----------------------------------------------------------------------------------------------------------


def terms(loss) -> dict[str, tuple[float, str, float]]:
    return {name: (round(float(total), 5), unit, weight) for name, (total, unit, weight) in loss.terms.items()}


def metrics(loss) -> dict[str, tuple[float, str]]:
    return {name: (round(float(total), 5), unit) for name, (total, unit) in loss.metrics.items()}


def test_sft_is_the_sum_over_trained_tokens():
    engine = Given(minus_ids)
    objective = SFTObjective(engine, OptimBlock())
    batch = tokens([4, 3], [2, 2], 6)
    assert {name: int(count) for name, count in objective.counts(batch).items()} == {"tokens": 3, "rows": 2}
    loss = objective.loss(batch)
    assert terms(loss) == {"nll": (0.03 + 0.04 + 0.13, "tokens", 1.0)}
    assert metrics(loss) == {"loss": (0.2, "tokens"), "tokens_per_row": (3.0, "rows")}
    assert engine.calls[0][0].shape == (2, 4) and engine.calls[0][2] == {}


def test_a_first_token_is_never_counted():
    """A row that is supervised from its first token on: there is nothing to predict that token from."""
    objective = SFTObjective(Given(minus_ids), OptimBlock())
    batch = tokens([3], [0], 3)
    assert int(objective.counts(batch)["tokens"]) == 2
    assert terms(objective.loss(batch)) == {"nll": (0.05, "tokens", 1.0)}


def pairs(**fields) -> Pairs:
    return Pairs(tokens([3, 2], [1, 1], 3), tokens([2, 3], [1, 1], 3), torch.tensor([0.0, 0.5]), **fields)


def test_a_reward_model_learns_the_difference():
    scores = Given(lambda ids, attention: torch.tensor([2.0, 0.5, 1.0, 0.5]))  # chosen, chosen, rejected, rejected
    objective = RewardObjective.from_block(scores, OptimBlock(), RmBtLoss(center_coef=0.1))
    loss = objective.loss(pairs())
    # -log sigmoid(2 - 1 - 0) + 0.1 * 3^2 and -log sigmoid(0 - 0.5) + 0.1 * 1^2
    expected = math.log1p(math.exp(-1)) + 0.9 + math.log1p(math.exp(0.5)) + 0.1
    assert terms(loss) == {"pairs": (round(expected, 5), "pairs", 1.0)}
    assert int(objective.counts(pairs())["pairs"]) == 2
    found = metrics(loss)
    assert found["accuracy"] == (1.0, "pairs")  # a tie is not right
    assert found["margin"] == (1.0, "pairs") and found["score_chosen"] == (2.5, "pairs")


def test_dpo_at_the_reference_is_ln_2():
    engine = Given(minus_ids)
    same = pairs(ref=torch.tensor([[-0.05, -0.02], [-0.12, -0.25]]))
    loss = PreferenceObjective.of(Policy(engine), OptimBlock(), DpoLoss(beta=0.3)).loss(same)
    assert terms(loss) == {"loss_dpo": (round(2 * math.log(2), 5), "rows", 1.0)}
    assert metrics(loss)["reference_gap"] == (0.0, "rows") and metrics(loss)["margin"] == (0.0, "rows")


def test_dpo_by_hand():
    moved = pairs(ref=torch.tensor([[-1.05, -0.02], [-0.12, -1.25]]))
    loss = PreferenceObjective.of(Policy(Given(minus_ids)), OptimBlock(), DpoLoss(beta=0.5)).loss(moved)
    # the first pair's chosen side gained 1 nat, the second pair's rejected side did
    expected = math.log1p(math.exp(-0.5)) + math.log1p(math.exp(0.5))
    assert terms(loss)["loss_dpo"][0] == round(expected, 5)
    found = metrics(loss)
    assert found["accuracy"] == (1.0, "rows") and found["reward_chosen"] == (0.5, "rows")
    assert found["reward_rejected"] == (0.5, "rows") and found["chosen_displaced"] == (0.0, "rows")
    assert found["reference_gap"] == (round(1 / 2, 5), "rows")  # per token of the chosen answer


def test_weights_multiply_the_losses_of_pairs_and_nothing_else():
    weight = torch.tensor([0.5, 3.0])
    scores = Given(lambda ids, attention: torch.tensor([2.0, 0.5, 1.0, 0.5]))
    objective = RewardObjective.from_block(scores, OptimBlock(), RmBtLoss())
    plain, weighted = objective.loss(pairs()), objective.loss(pairs(weight=weight))
    expected = 0.5 * math.log1p(math.exp(-1)) + 3 * math.log1p(math.exp(0.5))
    assert terms(weighted) == {"pairs": (round(expected, 5), "pairs", 1.0)}
    assert metrics(weighted)["accuracy"] == metrics(plain)["accuracy"] == (1.0, "pairs")
    assert int(objective.counts(pairs(weight=weight))["pairs"]) == 2
    moved = {"ref": torch.tensor([[-1.05, -0.02], [-0.12, -1.25]])}
    dpo = PreferenceObjective.of(Policy(Given(minus_ids)), OptimBlock(), DpoLoss(beta=0.5))
    expected = 0.5 * math.log1p(math.exp(-0.5)) + 3 * math.log1p(math.exp(0.5))
    assert terms(dpo.loss(pairs(**moved, weight=weight)))["loss_dpo"][0] == round(expected, 5)


def test_dpo_without_reference_is_our_mistake():
    with pytest.raises(AssertionError, match="reference log-probs are missing"):
        PreferenceObjective.of(Policy(Given(minus_ids)), OptimBlock(), DpoLoss()).loss(pairs())


ANSWERS = [[1, 1, 1], [1, 1, 0]]  # one prompt column; answers of two tokens and of one


NO_KL = {"placement": "reward"}


def policy(new: list[list[float]], **options) -> PolicyObjective:
    """The objective of a recipe with these options; the policy says `new`, its entropy is 2 nats per token."""
    engine = Given(lambda ids, attention, mask, **_: (torch.tensor(new), torch.full((2, 2), 2.0)))
    values = {"model": {"from": "sft"}, "data": {"path": "x"}, "aggregation": "token_mean", "kl": NO_KL, **options}
    recipe = GRPORecipe.model_validate({**values, "sampling": {"max_new_tokens": 4}})
    return PolicyObjective.from_recipe(engine, recipe, OnlineState.at_start(recipe))


def sampled(**fields) -> Experience:
    values = {
        "old_logprobs": torch.full((2, 2), -1.0),
        "ref_logprobs": torch.full((2, 2), -1.0),
        "advantages": torch.tensor([[1.0, -2.0], [3.0, 9.0]]),
        **fields,
    }
    return experience(ANSWERS, responses=2, **values)


def test_a_fresh_policy_has_ratio_1():
    loss = policy([[-1.0, -1.0], [-1.0, 5.0]]).loss(sampled())
    assert terms(loss) == {"policy": (-(1.0 - 2.0 + 3.0), "tokens", 1.0)}
    found = metrics(loss)
    assert found["clipfrac"] == found["approx_kl"] == found["logprob_change"] == (0.0, "tokens")
    assert found["entropy"] == (6.0, "tokens")


def test_a_policy_that_moved_too_far_is_clipped():
    change = math.log(1.5)
    loss = policy([[-1.0 + change, -1.0], [-1.0 + change, 5.0]]).loss(sampled())
    assert terms(loss) == {"policy": (round(-(1.2 * 1.0 - 2.0 + 1.2 * 3.0), 5), "tokens", 1.0)}
    found = metrics(loss)
    assert found["clipfrac"] == found["clipfrac_high"] == (2.0, "tokens") and found["clipfrac_low"] == (0.0, "tokens")
    assert found["logprob_change"] == (round(2 * change, 5), "tokens")
    assert found["approx_kl"] == (round(2 * change**2 / 2, 5), "tokens")
    assert found["kl_old"] == (round(2 * (1.5 - 1 - change), 5), "tokens")  # ratio - 1 - log ratio


def test_a_bad_token_that_was_lowered_enough_is_clipped_below():
    loss = policy([[-1.0, -1.0 + math.log(0.5)], [-1.0, 5.0]]).loss(sampled())
    assert terms(loss) == {"policy": (-(1.0 - 0.8 * 2.0 + 3.0), "tokens", 1.0)}
    found = metrics(loss)
    assert found["clipfrac"] == found["clipfrac_low"] == (1.0, "tokens") and found["clipfrac_high"] == (0.0, "tokens")


def test_sequence_means_and_the_kl_term():
    away = sampled(ref_logprobs=torch.full((2, 2), -1.0 + math.log(2)))
    loss = policy([[-1.0, -1.0], [-1.0, 5.0]], aggregation="sequence_mean", kl={"coef": 0.25}).loss(away)
    k3 = 2 - 1 - math.log(2)  # exp(ref - new) - 1 - (ref - new)
    assert terms(loss) == {
        "policy": (-((1.0 - 2.0) / 2 + 3.0), "sequences", 1.0),
        "kl": (round(2 * k3, 5), "sequences", 0.25),
    }
    assert metrics(loss)["kl_loss"] == (round(2 * k3, 5), "sequences")


@pytest.mark.parametrize(
    ("aggregation", "total", "denominator"),
    [
        ("token_mean", 1.0 - 2.0 + 3.0, "tokens"),
        ("sequence_mean", (1.0 - 2.0) / 2 + 3.0, "sequences"),
        ("sequence_sum", 1.0 - 2.0 + 3.0, "sequences"),
        ("constant", (1.0 - 2.0 + 3.0) / 4, "sequences"),  # over sampling.max_new_tokens
    ],
)
def test_every_way_to_add_a_loss_up(aggregation, total, denominator):
    loss = policy([[-1.0, -1.0], [-1.0, 5.0]], aggregation=aggregation).loss(sampled())
    assert terms(loss) == {"policy": (-total, denominator, 1.0)} and metrics(loss)["loss"] == (-total, denominator)


def test_entropy_is_a_term_where_it_has_a_weight():
    with_bonus = policy([[-1.0, -1.0], [-1.0, 5.0]], entropy_coef=0.5)
    assert terms(with_bonus.loss(sampled()))["entropy"] == (6.0, "tokens", -0.5)
    assert with_bonus.engine.calls[0][2]["extras"].entropy == "gradient"
    without = policy([[-1.0, -1.0], [-1.0, 5.0]])
    assert "entropy" not in terms(without.loss(sampled())) and without.engine.calls[0][2]["extras"].entropy == "value"


def test_coefficients_are_read_from_the_state_when_they_are_used():
    objective = policy(
        [[-1.0 + math.log(2), -1.0], [-1.0, 5.0]],
        policy_loss={"name": "ppo_penalty"},
        kl={"coef": 0.25},
        train={"inner_epochs": 2},
    )
    assert objective.state.penalty_beta == PpoPenaltyLoss().beta == 1.0
    objective.state.penalty_beta, objective.state.kl_coef = 4.0, 0.75
    found = terms(objective.loss(sampled()))
    # -2 A and 4 (2 - 1 - ln 2) on the first token; -A on the others
    assert found["policy"][0] == round(-(2.0 - 2.0 + 3.0) + 4 * (1 - math.log(2)), 5)
    assert found["kl"][2] == 0.75


def test_supervised_rows_beside_the_answers_have_a_weight():
    engine = Given(minus_ids)
    objective = PretrainingObjective(engine, OptimBlock(), 0.5)
    batch = tokens([4, 3], [2, 2], 6)
    assert {name: int(count) for name, count in objective.counts(batch).items()} == {"tokens": 3}
    loss = objective.loss(batch)
    assert terms(loss) == {"nll": (0.2, "tokens", 0.5)} and metrics(loss) == {"loss": (0.2, "tokens")}


def test_the_critic_by_hand():
    engine = Given(lambda ids, attention, mask: torch.tensor([[1.0, 0.0], [2.0, 7.0]]))
    objective = ValueObjective.from_block(engine, OptimBlock(), PpoValueLoss(clip=0.5))
    batch = sampled(old_values=torch.tensor([[1.0, 1.0], [1.0, 1.0]]), returns=torch.tensor([[2.0, 0.0], [3.0, 3.0]]))
    loss = objective.loss(batch)
    # (1-2)^2; 0 clipped to 0.5: max(0^2, 0.5^2); 2 clipped to 1.5: max((2-3)^2, (1.5-3)^2); halved
    assert terms(loss) == {"value": (round(0.5 * (1.0 + 0.25 + 2.25), 5), "tokens", 1.0)}
    assert metrics(loss)["clipfrac"] == (2.0, "tokens") and engine.calls[0][2] == {}


def test_objectives_name_their_group():
    offline = [kind.group for kind in (SFTObjective, RewardObjective, PreferenceObjective)]
    online = [kind.group for kind in (PolicyObjective, PretrainingObjective, ValueObjective)]
    assert (offline, online) == (["train"] * 3, ["policy", "ptx", "value"])
