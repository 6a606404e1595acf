"""What losses need of the whole batch: numbers by hand, who is kept, who is matched with whom, running means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.algo.coupling import equal_rank_partners, mean_reward, mismatched_kl, quantile_partners, reweighted_batch
from rlhf.algo.unpaired import aot_unpaired, bco, kto
from rlhf.batch import AnswerLogprobs, PairLogprobs

BETA_DPO = {"beta": 0.1, "a": 0.6, "momentum": 0.9, "keep": 0.8}


def gaps(values: list[float]) -> PairLogprobs:
    """Pairs of which only the chosen answer's log-ratio is not 0."""
    chosen, zeros = torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=torch.float64)
    return PairLogprobs(chosen, zeros, zeros, zeros, zeros, zeros)


def answers(ratios: list[float], is_good: list[bool]) -> AnswerLogprobs:
    logprobs, zeros = torch.tensor(ratios, dtype=torch.float64), torch.zeros(len(ratios), dtype=torch.float64)
    return AnswerLogprobs(logprobs, zeros, zeros + 1, torch.tensor(is_good))


def uniform(rows: int, seed: int = 0) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- beta_dpo -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "kept"), [(2, 1), (4, 3), (5, 4), (10, 8), (64, 51)])
def test_a_fixed_share_of_the_batch_is_kept_whoever_computes_it(rows: int, kept: int) -> None:
    torch.manual_seed(0)
    view, state = gaps(torch.randn(rows).tolist()), {"mean": 0.0, "std": 1.0}
    found, _ = reweighted_batch(view, state, uniform(rows), **BETA_DPO)
    again, _ = reweighted_batch(view, state, uniform(rows), **BETA_DPO)
    assert found["selected"].sum() == kept and torch.equal(found["selected"], again["selected"])
    other, _ = reweighted_batch(view, state, uniform(rows, seed=9), **BETA_DPO)
    assert rows < 10 or not torch.equal(found["selected"], other["selected"])


def test_shares_are_not_lost_to_rounding() -> None:
    options = {**BETA_DPO, "keep": 0.29}  # 0.29 * 100 is 28.999999999999996
    found, _ = reweighted_batch(gaps(torch.randn(100).tolist()), {}, uniform(100), **options)
    assert found["selected"].sum() == 29


def test_pairs_far_from_the_running_mean_are_rarely_kept() -> None:
    view, state = gaps([0.0, 0.1, -0.1, 0.2, 30.0]), {"mean": 0.0, "std": 1.0}
    options = {**BETA_DPO, "momentum": 0.999}
    kept = torch.stack(
        [reweighted_batch(view, state, uniform(5, seed), **options)[0]["selected"] for seed in range(50)]
    )
    assert (kept.sum(0)[:4] > 40).all() and kept.sum(0)[4] == 0


def test_chances_without_replacement_are_those_of_the_weights() -> None:
    view, state = gaps([0.0, 1.0]), {"mean": 0.0, "std": 1.0}
    options = {**BETA_DPO, "momentum": 0.999999, "keep": 0.5}
    kept = [reweighted_batch(view, state, uniform(2, seed), **options)[0]["selected"][0] for seed in range(4000)]
    share = 1 / (1 + torch.tensor(-0.5).exp())  # weights 1 and e^-1/2
    assert torch.stack(kept).double().mean().item() == pytest.approx(share.item(), abs=0.03)


def test_state_and_beta_by_hand() -> None:
    found, state = reweighted_batch(gaps([1.0, 3.0]), {}, uniform(2), **{**BETA_DPO, "keep": 1.0})
    assert state == pytest.approx({"mean": 0.2, "std": 0.1 * 2**0.5})
    assert found["batch_beta"].item() == pytest.approx(0.1 * (1 + 0.6 * (2 - 0.2)))
    found, state = reweighted_batch(gaps([1.0, 3.0]), state, uniform(2), **{**BETA_DPO, "keep": 1.0})
    assert state == pytest.approx({"mean": 0.38, "std": 0.19 * 2**0.5})
    found, _ = reweighted_batch(gaps([-50.0, -60.0]), {}, uniform(2), **BETA_DPO)
    assert found["batch_beta"].item() == pytest.approx(1e-3)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0, 0.0, 0.0], [2.0]])
def test_all_are_kept_while_nothing_is_known_of_the_spread(values: list[float]) -> None:
    found, state = reweighted_batch(gaps(values), {}, uniform(len(values)), **BETA_DPO)
    assert found["selected"].all() and state["std"] == 0 and found["batch_beta"].isfinite()


# --- aot ------------------------------------------------------------------------------------------------------------


def test_partners_have_the_same_rank() -> None:
    numbers = [torch.tensor(x, dtype=torch.float64) for x in ([3.0, 1.0, 2.0], [0.0, 0.0, 0.0], [5.0, 7.0, 6.0])]
    policy, zeros, reference = numbers
    found, _ = equal_rank_partners(PairLogprobs(policy, zeros, reference, zeros, zeros, zeros), {}, uniform(3))
    assert found["partners"].tolist() == [7, 5, 6]


def test_a_permutation_of_the_reference_is_not_seen_and_one_of_the_policy_moves_along() -> None:
    torch.manual_seed(0)
    view = PairLogprobs(*(-10 * torch.rand(6, dtype=torch.float64) for _ in range(4)), torch.ones(6), torch.ones(6))
    found = equal_rank_partners(view, {}, uniform(6))[0]["partners"]
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    assert view.ref_chosen is not None and view.ref_rejected is not None
    shuffled = PairLogprobs(view.chosen, view.rejected, view.ref_chosen[order], view.ref_rejected[order], order, order)
    assert torch.equal(equal_rank_partners(shuffled, {}, uniform(6))[0]["partners"], found)
    moved = equal_rank_partners(view.map(lambda x: x[order]), {}, uniform(6))[0]["partners"]
    assert torch.equal(moved, found[order])


def test_good_and_bad_answers_of_equal_rank_are_matched() -> None:
    view = answers([3.0, 10.0, 1.0, 30.0, 2.0, 20.0], [True, False, True, False, True, False])
    found, _ = quantile_partners(view, {}, uniform(6))
    assert found["partners"].tolist() == [30, 1, 10, 3, 20, 2]


def test_unequal_numbers_are_matched_by_interpolated_quantiles() -> None:
    view = answers([0.0, 10.0, 5.0, 1.0, 3.0], [True, True, True, False, False])
    found, _ = quantile_partners(view, {}, uniform(5))
    assert found["partners"].tolist() == [1, 3, 2, 0, 10]
    one = answers([0.0, 10.0, 5.0, 1.0], [True, True, True, False])
    assert quantile_partners(one, {}, uniform(4))[0]["partners"].tolist() == [1, 1, 1, 5]


@pytest.mark.parametrize("good", [True, False])
def test_without_the_other_class_nothing_is_compared(good: bool) -> None:
    view = answers([1.0, 2.0, 3.0], [good] * 3)
    found, _ = quantile_partners(view, {}, uniform(3))
    view.logprobs.requires_grad_()
    losses = aot_unpaired(view, **found, beta=0.1, label_smoothing=0.0)
    total = losses["good"].sum() + losses["bad"].sum()
    (grad,) = torch.autograd.grad(total, view.logprobs)
    assert total == 0 and (grad == 0).all()


def test_a_matchs_value_counts_once_and_its_gradient_twice() -> None:
    view = answers([2.0, 1.0], [True, False])
    view.logprobs.requires_grad_()
    found, _ = quantile_partners(view.map(torch.Tensor.detach), {}, uniform(2))
    losses = aot_unpaired(view, **found, beta=1.0, label_smoothing=0.0)
    assert losses["good"].tolist() == pytest.approx([0.313262, 0], abs=1e-6)  # log(1 + e^-1)
    assert losses["bad"].tolist() == [0, 0]
    (grad,) = torch.autograd.grad(losses["good"].sum() + losses["bad"].sum(), view.logprobs)
    assert grad.tolist() == pytest.approx([-0.268941, 0.268941], abs=1e-6)  # sigmoid(-1)


# --- kto and bco ----------------------------------------------------------------------------------------------------


def test_the_reference_point_is_a_mean_and_never_negative() -> None:
    view = answers([1.0, 2.0], [True, False])
    found, state = mismatched_kl(view, {}, torch.tensor([1.0, 4.0]), uniform(2))
    assert found["z0"].item() == 2.5 and state == {}
    assert mismatched_kl(view, {}, torch.tensor([1.0, -4.0]), uniform(2))[0]["z0"].item() == 0
    losses = kto(view, found["z0"], beta=1.0, lambda_d=2.0, lambda_u=1.0)
    assert losses.tolist() == pytest.approx([2 * 0.817574, 0.377541], abs=1e-6)  # sigmoid(1.5), sigmoid(-0.5)


def test_the_reward_shift_is_the_mean_of_all_answers_so_far() -> None:
    first, second = answers([1.0, 3.0], [True, False]), answers([8.0], [True])
    found, state = mean_reward(first, {}, uniform(2), beta=0.5)
    assert found["shift"].item() == 1 and state == {"count": 2, "mean": 1}
    found, state = mean_reward(second, state, uniform(1), beta=0.5)
    assert found["shift"].item() == 2 and state == {"count": 3, "mean": 2}


def test_bad_answers_weigh_by_the_odds_of_their_prompt() -> None:
    view = answers([0.0, 0.0, 0.0, 0.0], [True, False, False, False])
    density = torch.tensor([0.9, 0.5, 0.75, 1.0], dtype=torch.float64)
    options = {"beta": 0.1, "min_density_ratio": 0.5, "max_density_ratio": 10.0}
    losses = bco(view, torch.tensor(0.0), density, **options) / torch.tensor(2.0).log()
    assert losses.tolist() == pytest.approx([1, 1, 3, 10], abs=1e-6)
