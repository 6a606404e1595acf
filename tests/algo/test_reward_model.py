"""Bradley-Terry losses: landmarks by hand, symmetry, margin and centring."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algo.reward_model import pair_accuracy, rm_bt, rm_bt_smooth, rm_kwise, rm_softmax


def scores(seed: int = 0, rows: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    chosen, rejected = (torch.randn(rows, dtype=torch.float64).requires_grad_() for _ in range(2))
    return chosen, rejected, torch.zeros(rows, dtype=torch.float64)


def test_equal_scores_by_hand() -> None:
    chosen = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    loss = rm_bt(chosen, rejected, torch.zeros(1), center_coef=0.0)
    assert abs(float(loss.detach()) - math.log(2)) < 1e-12
    assert [float(grad) for grad in torch.autograd.grad(loss.sum(), [chosen, rejected])] == [-0.5, 0.5]


def test_swapping_the_sides_flips_the_sign_of_the_gradient() -> None:
    chosen, rejected, margin = scores()
    (up,) = torch.autograd.grad(rm_bt(chosen, rejected, margin, center_coef=0.0).sum(), chosen)
    (down,) = torch.autograd.grad(rm_bt(rejected, chosen, margin, center_coef=0.0).sum(), chosen)
    assert (up < 0).all() and (down > 0).all()
    torch.testing.assert_close(down - up, torch.ones_like(up), atol=1e-12, rtol=0)


def test_a_margin_is_a_shift_of_the_chosen_score() -> None:
    chosen, rejected, _ = scores()
    margin = torch.rand(9, dtype=torch.float64)
    none = torch.zeros_like(margin)
    shifted = rm_bt(chosen - margin, rejected, none, center_coef=0.0)
    torch.testing.assert_close(rm_bt(chosen, rejected, margin, center_coef=0.0), shifted, atol=1e-12, rtol=0)
    smooth = {"label_smoothing": 0.1, "center_coef": 0.0}
    shifted = rm_bt_smooth(chosen - margin, rejected, none, **smooth)
    torch.testing.assert_close(rm_bt_smooth(chosen, rejected, margin, **smooth), shifted, atol=1e-12, rtol=0)


def test_a_common_shift_matters_only_to_centring() -> None:
    chosen, rejected, margin = scores()
    for coef in (0.0, 0.01):
        before = rm_bt(chosen, rejected, margin, center_coef=coef)
        after = rm_bt(chosen + 3, rejected + 3, margin, center_coef=coef)
        expected = coef * ((chosen + rejected + 6) ** 2 - (chosen + rejected) ** 2)
        torch.testing.assert_close(after - before, expected, atol=1e-12, rtol=0)


def test_smoothing_is_smallest_at_its_finite_difference_and_0_is_none() -> None:
    best = math.log(0.9 / 0.1)
    chosen = torch.tensor([best - 0.1, best, best + 0.1], dtype=torch.float64, requires_grad=True)
    none = torch.zeros(3, dtype=torch.float64)
    losses = rm_bt_smooth(chosen, none, none, label_smoothing=0.1, center_coef=0.0)
    (slope,) = torch.autograd.grad(losses.sum(), chosen)
    assert slope[0] < 0 and abs(float(slope[1])) < 1e-12 and slope[2] > 0
    plain = rm_bt(chosen, none, none, center_coef=0.02)
    assert torch.equal(rm_bt_smooth(chosen, none, none, label_smoothing=0.0, center_coef=0.02), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_and_extreme_scores(dtype: torch.dtype) -> None:
    chosen = torch.tensor([-2000.0, 2000.0], dtype=dtype, requires_grad=True)
    losses = rm_bt(chosen, torch.zeros(2, dtype=dtype), torch.zeros(2), center_coef=0.0)
    assert losses.dtype == torch.float32 and losses.tolist() == [2000, 0]
    (grad,) = torch.autograd.grad(losses.sum(), chosen)
    assert grad.tolist() == [-1, 0]


def test_a_tie_is_not_a_success() -> None:
    assert pair_accuracy(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])).tolist() == [1, 0, 0]


def test_two_answers_in_a_list_are_a_pair() -> None:
    chosen, rejected, margin = scores()
    both = torch.stack([rejected, chosen], -1)
    labels, present = torch.tensor([[1.0, 5.0]]).expand(9, 2), torch.ones(9, 2, dtype=torch.bool)
    for loss in (rm_kwise, rm_softmax):
        expected = rm_bt(chosen, rejected, margin, center_coef=0.0)
        torch.testing.assert_close(loss(both, labels, present), expected, atol=1e-12, rtol=0)


def test_a_list_counts_once_and_absent_or_equal_answers_make_no_pair() -> None:
    given = torch.tensor([[0.0, 0.0, 0.0, 7.0], [1.0, 2.0, 3.0, 4.0], [2.0, 0.0, torch.nan, torch.inf]])
    labels = torch.tensor([[3.0, 2.0, 1.0, 9.0], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 5.0, -5.0]])
    present = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    given.requires_grad_()
    found = rm_kwise(given, labels, present)
    last = math.log1p(math.exp(-2))
    assert found.tolist() == pytest.approx([math.log(2), 0, last], abs=1e-6)
    best = rm_softmax(given, labels, present)
    first_of_equals = math.log(sum(math.exp(x) for x in (1, 2, 3, 4))) - 1
    assert best.tolist() == pytest.approx([math.log(3), first_of_equals, last], abs=1e-6)
    (grad,) = torch.autograd.grad(found.sum() + best.sum(), given)
    assert grad.isfinite().all() and (grad[~present] == 0).all() and grad.sum(-1).abs().max() < 1e-6
