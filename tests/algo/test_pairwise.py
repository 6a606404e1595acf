"""Losses on pairs by hand: margins, targets, kinks, and where two of them are one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algo.pairwise import (
    cpo,
    dno,
    exo_pref,
    gpo_exponential,
    gpo_squared,
    log_odds,
    preferred_ft,
    rso_hinge,
    simpo,
    slic_hf,
    sppo,
    unlikelihood_token,
)
from rlhf.algo.preference import cdpo, dpo, dpo_reward_margin, dpop, f_dpo, ipo, r_dpo, rpo_nll, tdpo1, tdpo2
from rlhf.batch import PairLogprobs, TokenLogprobs


def pairs(chosen: float, rejected: float, lengths: tuple[int, int] = (1, 1)) -> PairLogprobs:
    """A pair with these log-ratios (log-probs where a loss has no reference)."""
    one = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (chosen, rejected)]
    zero = torch.zeros(1, dtype=torch.float64)
    return PairLogprobs(*one, zero, zero, *(torch.tensor([length]) for length in lengths))


def slopes(loss: Tensor, given: PairLogprobs) -> tuple[float, float]:
    chosen, rejected = torch.autograd.grad(loss.sum(), [given.chosen, given.rejected])
    return chosen.item(), rejected.item()


def test_hinge_ends_at_its_margin() -> None:
    assert rso_hinge(pairs(3.0, 1.0), gamma=0.25).item() == 0.5
    for gap, slope in ((3.0, -0.25), (4.0, 0.0), (5.0, 0.0)):  # at the kink the gradient is 0
        given = pairs(gap, 0.0)
        assert slopes(rso_hinge(given, gamma=0.25), given) == (slope, -slope)


def test_ipo_is_the_squared_gpo_up_to_a_factor() -> None:
    given = pairs(1.5, -0.5)
    assert ipo(given, tau=0.1).item() == pytest.approx((2 - 5) ** 2)
    assert ipo(given, tau=0.1).item() == pytest.approx(gpo_squared(given, beta=0.2).item() / 0.2**2)


def test_the_exponential_stands_still_beyond_its_clamp() -> None:
    given = pairs(-300.0, 0.0)
    assert gpo_exponential(given, beta=0.1).item() == pytest.approx(math.exp(20))
    assert slopes(gpo_exponential(given, beta=0.1), given) == (0, 0)


def test_divergences_meet() -> None:
    given = pairs(0.7, -0.4)

    def value(divergence: str, alpha: float | None = None) -> float:
        return f_dpo(given, beta=0.5, divergence=divergence, alpha=alpha).item()

    assert value("reverse_kl") == dpo(given, beta=0.5).item()
    assert value("alpha", 1e-7) == pytest.approx(value("reverse_kl"), abs=1e-6)
    assert value("alpha", 1 - 1e-7) == pytest.approx(value("forward_kl"), abs=1e-6)
    slope = -math.log1p(math.exp(-0.7)) + math.log1p(math.exp(0.4))
    assert value("js") == pytest.approx(math.log1p(math.exp(-0.5 * slope)), abs=1e-12)


def test_dpop_pulls_a_fallen_answer_up_harder() -> None:
    given = pairs(-0.5, -2.0)
    up, down = slopes(dpop(given, beta=0.1, lam=5.0), given)
    assert up / down == pytest.approx(-6)
    assert torch.equal(dpop(pairs(0.5, -2.0), beta=0.1, lam=5.0), dpo(pairs(0.5, -2.0), beta=0.1))


def test_a_longer_chosen_answer_has_less_to_gain() -> None:
    longer, shorter = (r_dpo(pairs(0.0, 0.0, lengths), beta=0.1, alpha=0.1).item() for lengths in ((9, 4), (4, 9)))
    assert longer == pytest.approx(math.log1p(math.exp(-0.5))) and shorter == pytest.approx(math.log1p(math.exp(0.5)))


def test_a_margin_from_scores_is_a_shift_of_the_gap() -> None:
    scores = torch.tensor([[3.0, 1.0]])
    found = dpo_reward_margin(pairs(4.0, 0.0), scores, beta=0.5, kappa=0.25)
    assert found.item() == pytest.approx(dpo(pairs(3.0, 0.0), beta=0.5).item())


def test_the_likelihood_term_of_rpo_is_per_token() -> None:
    given = pairs(-6.0, -1.0, (3, 9))
    assert (rpo_nll(given, beta=0.1, alpha=0.5) - dpo(given, beta=0.1)).item() == pytest.approx(0.5 * 2)


def test_token_kl_moves_the_margin_and_only_tdpo1_has_the_chosen_ones_gradient() -> None:
    kl = torch.tensor([[1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    one, two = tdpo1(pairs(5.0, 0.0), kl, beta=1.0), tdpo2(pairs(5.0, 0.0), kl, beta=1.0, alpha=0.5)
    assert one.item() == pytest.approx(math.log1p(math.exp(-3))) and two.item() == pytest.approx(
        math.log1p(math.exp(-4))
    )
    assert (torch.autograd.grad(one.sum(), kl)[0] != 0).all()
    assert torch.autograd.grad(two.sum(), kl)[0][0, 0] == 0


def test_win_rates_are_targets_of_the_log_ratios() -> None:
    found = sppo(pairs(4.0, -2.0), torch.tensor([[0.9, 0.3]]), beta=0.1)
    assert found.item() == pytest.approx(0, abs=1e-9)
    assert sppo(pairs(0.0, 0.0), torch.tensor([[0.9, 0.3]]), beta=0.1).item() == pytest.approx(0.5 * (16 + 4), abs=1e-5)


def test_certain_scores_make_dno_dpo_and_equal_ones_close_the_gap() -> None:
    certain = dno(pairs(2.0, 0.0), torch.tensor([[100.0, 0.0]]), eta=0.3)
    assert certain.item() == pytest.approx(dpo(pairs(2.0, 0.0), beta=0.3).item())
    given = pairs(2.0, 0.0)
    up, down = slopes(dno(given, torch.tensor([[1.0, 1.0]]), eta=0.3), given)
    assert up > 0 > down


def test_exo_is_0_where_the_policy_says_what_the_labels_say() -> None:
    gap = math.log(0.9 / 0.1) / 0.2
    assert exo_pref(pairs(gap, 0.0), beta=0.2, label_smoothing=0.1).item() == pytest.approx(0, abs=1e-12)
    given = pairs(gap, 0.0)
    assert slopes(cdpo(given, beta=0.2, label_smoothing=0.1), given)[0] == pytest.approx(0, abs=1e-12)


def test_equal_means_cost_simpo_its_margin() -> None:
    assert simpo(pairs(-6.0, -12.0, (3, 6)), beta=2.0, gamma=1.0).item() == pytest.approx(math.log1p(math.e))


def test_log_odds_by_hand_and_near_certainty() -> None:
    given = pairs(2 * math.log(0.8), 3 * math.log(0.5), (2, 3))
    assert log_odds(given).item() == pytest.approx(math.log(4))
    assert log_odds(pairs(0.0, -1.0)).isfinite()


def test_terms_over_tokens_have_their_own_denominator() -> None:
    given = pairs(-6.0, -12.0, (3, 6))
    found = cpo(given, beta=0.1, alpha=0.5)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(
        {"rows": math.log1p(math.exp(-0.6)), "chosen_tokens": 3.0}
    )
    assert {name: value.item() for name, value in preferred_ft(given).items()} == {"chosen_tokens": 6.0}


def test_slic_keeps_the_likelihood_beyond_its_margin() -> None:
    given = pairs(-2.0, -9.0)
    assert slic_hf(given, delta=1.0, lam=0.1).item() == pytest.approx(0.2)
    assert slopes(slic_hf(given, delta=1.0, lam=0.1), given) == (-0.1, 0)


def test_certain_tokens_have_a_finite_unlikelihood_and_masked_ones_none() -> None:
    logprobs = torch.tensor([[0.0, math.log(0.5), torch.nan]], dtype=torch.float64, requires_grad=True)
    tokens = TokenLogprobs(logprobs, torch.tensor([[True, True, False]]))
    found = unlikelihood_token(pairs(-1.0, -1.0), tokens, alpha=2.0)
    assert found.item() == pytest.approx(1 + 2 * (-math.log(1e-5) + math.log(2)))
    (grad,) = torch.autograd.grad(found.sum(), logprobs)
    assert grad[0].tolist() == pytest.approx([0, 2, 0], abs=1e-9)
