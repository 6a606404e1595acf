"""Preference losses: the value at the reference, the sign of the gradient, and who is chosen."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf.algo.preference import PREFERENCE_LOSSES, cdpo, dpo, implicit_rewards
from rlhf.batch import PairLogprobs

OPTIONS = {"dpo": {"beta": 0.3}, "cdpo": {"beta": 0.3, "label_smoothing": 0.2}}


def pairs(seed: int, rows: int = 7) -> PairLogprobs:
    torch.manual_seed(seed)
    sums = [(-10 * torch.rand(rows, dtype=torch.float64)).requires_grad_() for _ in range(4)]
    return PairLogprobs(*sums, torch.full((rows,), 4), torch.full((rows,), 5))


def swapped(given: PairLogprobs) -> PairLogprobs:
    return PairLogprobs(
        given.rejected, given.chosen, given.ref_rejected, given.ref_chosen, given.rejected_len, given.chosen_len
    )


def gradients(losses: Tensor, given: PairLogprobs) -> tuple[Tensor, Tensor]:
    chosen, rejected = torch.autograd.grad(losses.sum(), [given.chosen, given.rejected])
    return chosen, rejected


@pytest.mark.parametrize("name", OPTIONS)
def test_log_2_where_policy_and_reference_agree(name: str) -> None:
    given = pairs(0)
    given = replace(given, ref_chosen=given.chosen.detach(), ref_rejected=given.rejected.detach())
    losses = PREFERENCE_LOSSES[name].function(given, **OPTIONS[name])
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), atol=1e-12, rtol=0)


def test_gradient_at_the_reference_by_hand() -> None:
    given = pairs(0)
    given = replace(given, ref_chosen=given.chosen.detach(), ref_rejected=given.rejected.detach())
    for losses, size in ((dpo(given, beta=0.3), 0.15), (cdpo(given, beta=0.3, label_smoothing=0.2), 0.3 * 0.3)):
        chosen, rejected = gradients(losses, given)
        torch.testing.assert_close(chosen, torch.full_like(chosen, -size), atol=1e-12, rtol=0)
        torch.testing.assert_close(rejected, torch.full_like(rejected, size), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_swapping_the_sides_swaps_the_gradients_signs(name: str) -> None:
    given = pairs(1)
    options = OPTIONS[name]
    # the two orders of a pair have sigmoid(x) and sigmoid(-x): their slopes differ by the slope at certainty
    chosen, _ = gradients(PREFERENCE_LOSSES[name].function(given, **options), given)
    as_rejected = gradients(PREFERENCE_LOSSES[name].function(swapped(given), **options), given)[0]
    certainty = options["beta"] * (1 - 2 * options.get("label_smoothing", 0.0))
    torch.testing.assert_close(as_rejected - chosen, torch.full_like(chosen, certainty), atol=1e-12, rtol=0)


def test_dpo_always_raises_the_chosen_and_lowers_the_rejected() -> None:
    for seed in range(80):
        given = pairs(seed)
        chosen, rejected = gradients(dpo(given, beta=0.3), given)
        assert (chosen < 0).all() and (rejected > 0).all()
        flipped_chosen, flipped_rejected = gradients(dpo(swapped(given), beta=0.3), given)
        assert (flipped_chosen > 0).all() and (flipped_rejected < 0).all()


def test_cdpo_turns_around_at_its_finite_margin() -> None:
    margin = math.log(0.8 / 0.2) / 0.3
    zeros = torch.zeros(3, dtype=torch.float64)
    chosen = torch.tensor([margin - 0.1, margin, margin + 0.1], dtype=torch.float64, requires_grad=True)
    given = PairLogprobs(chosen, zeros.clone().requires_grad_(), zeros, zeros, zeros, zeros)
    slope, _ = gradients(cdpo(given, beta=0.3, label_smoothing=0.2), given)
    assert slope[0] < 0 and abs(float(slope[1])) < 1e-12 and slope[2] > 0
    assert torch.equal(cdpo(given, beta=0.3, label_smoothing=0.0), dpo(given, beta=0.3))


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_independent_and_common_shifts_cancel(name: str) -> None:
    loss, options, given = PREFERENCE_LOSSES[name].function, OPTIONS[name], pairs(2)
    whole = loss(given, **options)
    order = [3, 0, 6, 1, 5, 2, 4]
    torch.testing.assert_close(loss(given.select(order), **options), whole[order], atol=0, rtol=0)
    pieces = torch.cat([loss(piece, **options) for piece in given.split(3)])
    torch.testing.assert_close(pieces, whole, atol=0, rtol=0)
    shifted = replace(given, chosen=given.chosen + 5, ref_chosen=given.ref_chosen + 5)
    torch.testing.assert_close(loss(shifted, **options), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", OPTIONS)
def test_extreme_and_narrow_inputs(name: str) -> None:
    far = torch.tensor([2000.0, -2000.0], requires_grad=True)
    zeros = torch.zeros(2)
    given = PairLogprobs(far, zeros.clone().requires_grad_(), zeros, zeros, zeros, zeros)
    losses = PREFERENCE_LOSSES[name].function(given, **OPTIONS[name])
    assert losses.isfinite().all() and all(grad.isfinite().all() for grad in gradients(losses, given))
    wide = pairs(3).map(lambda x: x.detach().double())
    narrow = PREFERENCE_LOSSES[name].function(wide.map(lambda x: x.float()), **OPTIONS[name])
    assert narrow.dtype == torch.float32
    expected = PREFERENCE_LOSSES[name].function(wide, **OPTIONS[name])
    torch.testing.assert_close(narrow.double(), expected, atol=1e-5, rtol=0)
    assert PREFERENCE_LOSSES[name].function(wide.map(lambda x: x.bfloat16()), **OPTIONS[name]).dtype == torch.float32


def test_implicit_rewards_by_hand() -> None:
    one = [torch.tensor([x]) for x in (-1.0, -2.0, -3.0, -1.5)]
    chosen, rejected = implicit_rewards(PairLogprobs(*one, one[0], one[0]), beta=0.5)
    assert (chosen.tolist(), rejected.tolist()) == ([1.0], [-0.25])
