"""What every preference loss promises: walked through by the registry, so a new one is tested before its author is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhf.batch import ListLogprobs, PairLogprobs, TokenLogprobs
from tests.algo.examples import ROWS, Choice, Example, choices, coupled, example, gradients, losses, mean_loss

CHOICES = choices()
WITH_REFERENCE = [choice for choice in CHOICES if choice.entry.traits.reference]
AT_REFERENCE = [choice for choice in CHOICES if choice.at_reference() is not None]
BATCHES = 80


def relative(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference, relative where the numbers are above 1."""
    return ((found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)).max()


def alike(given: Example) -> Example:
    """With nothing that tells the two answers of a pair apart, and every prompt's answers as likely good as bad."""
    half = torch.full((ROWS, 2), 0.5, dtype=torch.float64)
    changed = {"scores": half, "win_rates": half, "sequence_kl": 0 * half, "density": half[:, 0]}
    return replace(given, others={**given.others, **changed, "mismatched": 0 * half[:, 0]})


@pytest.mark.parametrize("choice", AT_REFERENCE, ids=str)
def test_the_value_at_the_reference_is_what_the_traits_say(choice: Choice) -> None:
    expected = choice.at_reference()
    for seed in range(3):
        given = alike(example(choice.entry, seed, at_reference=True))
        assert mean_loss(choice, given).item() == pytest.approx(expected, abs=1e-9)


def test_a_loss_without_a_value_at_the_reference_has_a_reason() -> None:
    lists = {"pl_dpo", "pair_logistic", "lipo_lambda", "listnet_softmax", "dpo_rw", "exo_rw"}  # differs with K
    likelihoods = {"rpo_nll", "dro_v"}  # depends on the log-probs themselves, or on rewards
    assert {c.entry.name for c in WITH_REFERENCE} - {c.entry.name for c in AT_REFERENCE} == lists | likelihoods


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_at_the_reference_nothing_is_pushed_the_wrong_way(choice: Choice) -> None:
    better, worse = gradients(choice, example(choice.entry, 0, at_reference=True).leaf())
    if choice.entry.name == "discopop":  # whose mix moves at the reference
        assert (better > 0).all() and (worse < 0).all()
        return
    # losses without a reference are not at their start here; these hold anywhere
    assert (better < 1e-12).all() and (worse > -1e-12).all()
    assert (better < 0).all() or (worse > 0).all()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_signs_of_the_gradient_are_those_of_the_traits(choice: Choice) -> None:
    wrong = {"chosen": False, "rejected": False}
    for seed in range(BATCHES):
        given = example(choice.entry, seed, size=3.0 * 10.0 ** (seed % 4))
        better, worse = gradients(choice, given.leaf())
        wrong["chosen"] |= bool((better > 1e-12).any())
        wrong["rejected"] |= bool((worse < -1e-12).any())
    signs = choice.entry.traits.signs
    if signs == "none":  # and it would be wrong to promise more
        assert wrong["chosen"] or wrong["rejected"]
    else:
        kept = {"both": {"chosen", "rejected"}, "chosen": {"chosen"}, "rejected": {"rejected"}}[signs]
        assert {side for side in wrong if not wrong[side]} == kept


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_the_order_of_the_batch_does_not_matter(choice: Choice) -> None:
    given = example(choice.entry, 1)
    order = torch.randperm(ROWS)
    assert relative(mean_loss(choice, given.map(lambda x: x[order])), mean_loss(choice, given)) < 1e-12


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_pieces_of_a_batch_add_up_to_it(choice: Choice) -> None:
    given = coupled(choice, example(choice.entry, 2)).leaf()
    whole = losses(choice, given)
    for start in range(0, ROWS, 3):

        def cut(x: Tensor, start: int = start) -> Tensor:
            return x[start : start + 3] if x.dim() else x

        for name, values in losses(choice, given.map(cut)).items():
            assert whole[name].shape == (ROWS,)
            torch.testing.assert_close(values, cut(whole[name]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("choice", WITH_REFERENCE, ids=str)
def test_a_constant_common_to_policy_and_reference(choice: Choice) -> None:
    given = example(choice.entry, 3)
    view, changes = given.view, {}
    sides = ("chosen", "rejected") if isinstance(view, PairLogprobs) else ("logprobs",)
    for side in sides:
        policy, reference = getattr(view, side), getattr(view, f"ref_{side}")
        shift = 10 * torch.randn(policy.shape, dtype=torch.float64)
        changes |= {side: policy + shift, f"ref_{side}": reference + shift}
    moved = mean_loss(choice, replace(given, view=replace(view, **changes)))
    difference = relative(moved, mean_loss(choice, given))
    assert difference < 1e-9 if choice.entry.traits.invariant else difference > 1e-3


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_float32_is_close_to_float64_and_narrower_numbers_are_widened(choice: Choice) -> None:
    wide = example(choice.entry, 4)
    narrow = wide.to(torch.float32)
    assert relative(mean_loss(choice, narrow), mean_loss(choice, narrow.to(torch.float64))) < 1e-4
    for values in losses(choice, coupled(choice, narrow)).values():
        assert values.dtype == torch.float32
    for values in losses(choice, coupled(choice, wide.to(torch.bfloat16))).values():
        assert values.dtype == torch.float32


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_ratios_of_2000_are_finite(choice: Choice, dtype: torch.dtype) -> None:
    given = example(choice.entry, 5)
    view = given.view
    far = torch.tensor([0.0, -2000.0, -2000.0, 0.0, -1e-3, -2000.0, -4000.0, -1.0], dtype=torch.float64)
    near = torch.tensor([-2000.0, 0.0, -2000.0, 0.0, -2000.0, -1e-7, -2000.0, -1.0], dtype=torch.float64)
    if isinstance(view, PairLogprobs):
        ends = {"chosen": far, "rejected": near}
        ends |= {"ref_chosen": near, "ref_rejected": far} if choice.entry.traits.reference else {}
    else:
        columns = (ROWS, 4) if isinstance(view, ListLogprobs) else (ROWS,)
        policy = torch.stack([far, near, near, far], -1) if len(columns) == 2 else far
        reference = policy.flip(-1) if len(columns) == 2 else near
        ends = {"logprobs": policy} | ({"ref_logprobs": reference} if choice.entry.traits.reference else {})
    tokens = TokenLogprobs(torch.stack([far, near], -1), torch.ones(ROWS, 2, dtype=torch.bool))
    others = {**given.others, "rejected_tokens": tokens, "mismatched": 1000 * given.others["mismatched"]}
    given = Example(replace(view, **ends), others).to(dtype).leaf()
    assert mean_loss(choice, given).isfinite()
    assert all(side.isfinite().all() for side in gradients(choice, given))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_only_what_is_said_to_have_no_smallest_value_falls_below_0(choice: Choice) -> None:
    given = example(choice.entry, 0)
    if choice.entry.traits.unbounded:
        assert isinstance(given.view, PairLogprobs)
        lower = replace(given, view=replace(given.view, rejected=given.view.rejected - 1e4))
        assert mean_loss(choice, lower).item() < -10
    else:
        assert all(mean_loss(choice, example(choice.entry, seed, size=300.0)) >= -1e-9 for seed in range(20))


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.entry.inputs[0] == "lists"], ids=str)
@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_absent_answers_take_no_part(choice: Choice, rubbish: float) -> None:
    given = example(choice.entry, 6)
    view = given.view
    assert isinstance(view, ListLogprobs)

    def spoil(x: Tensor) -> Tensor:
        wider = torch.cat([x, x[:, :1]], -1)
        fill = torch.full_like(wider, rubbish) if x.is_floating_point() else torch.zeros_like(wider)
        return torch.where(torch.cat([view.present, torch.zeros(ROWS, 1, dtype=torch.bool)], -1), wider, fill)

    spoilt = replace(given, view=view.map(lambda x: spoil(x) if x.dim() == 2 else x)).leaf()
    torch.testing.assert_close(mean_loss(choice, spoilt), mean_loss(choice, given), atol=1e-12, rtol=0)
    assert isinstance(spoilt.view, ListLogprobs)
    (grad,) = torch.autograd.grad(mean_loss(choice, spoilt), [spoilt.view.logprobs])
    assert grad.isfinite().all() and (grad[~spoilt.view.present] == 0).all()
