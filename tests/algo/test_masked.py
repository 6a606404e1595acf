"""Masked sums against literals; what the mask hides has no influence whatever it is."""

from __future__ import annotations

import pytest
import torch

from rlhf.algo.masked import (
    Moments,
    masked_mean,
    masked_sum,
    moments,
    row_means,
    row_sums,
    select,
    whiten,
    whiten_keeping_mean,
)

X = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)


def test_sums_and_means_by_hand() -> None:
    assert masked_sum(X, MASK) == 8
    assert masked_mean(X, MASK) == 8 / 3
    assert row_sums(X, MASK).tolist() == [3, 5, 0]
    assert row_means(X, MASK).tolist() == [1.5, 5, 0]
    assert masked_mean(X, torch.zeros_like(MASK)) == 0


@pytest.mark.parametrize("hidden", [float("nan"), float("inf"), -float("inf")])
def test_hidden_values_reach_neither_value_nor_gradient(hidden: float) -> None:
    x = torch.where(MASK, X, hidden).requires_grad_()
    total = masked_sum(x, MASK) + row_means(x, MASK).sum() + whiten(x, MASK, moments(x, MASK), unbiased=True).sum()
    assert total.isfinite()
    (grad,) = torch.autograd.grad(total, x)
    assert grad.isfinite().all() and (grad[~MASK] == 0).all()


def test_narrow_types_are_summed_in_float32_and_float64_stays() -> None:
    many = torch.full((1, 3000), 0.1, dtype=torch.bfloat16)
    mask = torch.ones_like(many, dtype=torch.bool)
    assert masked_sum(many, mask).dtype == torch.float32
    assert abs(float(masked_sum(many, mask)) - 3000 * float(many[0, 0])) < 1e-2
    assert masked_sum(mask, mask) == 3000
    assert masked_sum(X, MASK).dtype == select(X, MASK).dtype == torch.float64


def test_moments_add_up_like_the_whole() -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(8, 5, dtype=torch.float64) + 3, torch.rand(8, 5) < 0.6
    parts = moments(x[:3], mask[:3]) + moments(x[3:4], mask[3:4]) + moments(x[4:], mask[4:])
    values = x[mask]
    for unbiased in (True, False):
        torch.testing.assert_close(parts.variance(unbiased=unbiased), values.var(correction=int(unbiased)))
    torch.testing.assert_close(parts.mean(), values.mean())
    again = Moments.from_sums({name: float(value) for name, value in parts.sums().items()})
    assert again.variance(unbiased=True) == parts.variance(unbiased=True)


def test_moments_of_nothing_of_one_and_of_equal_values() -> None:
    nothing = moments(X, torch.zeros_like(MASK))
    assert nothing.mean() == 0 and nothing.variance(unbiased=True) == 0
    one = moments(X, MASK & (X == 5))
    assert one.mean() == 5 and one.variance(unbiased=True) == 0
    equal = torch.full((1, 1000), 0.1)
    everywhere = torch.ones_like(equal, dtype=torch.bool)
    assert moments(equal, everywhere).variance(unbiased=False) == 0
    assert whiten(equal, everywhere, moments(equal, everywhere), unbiased=True).abs().max() < 1e-6


def test_whitened_values_have_mean_0_and_variance_1_over_the_mask_only() -> None:
    torch.manual_seed(1)
    x, mask = 5 * torch.randn(6, 9, dtype=torch.float64) - 2, torch.rand(6, 9) < 0.7
    y = whiten(x, mask, moments(x, mask), unbiased=True)
    assert abs(float(y[mask].mean())) < 1e-12
    assert abs(float(y[mask].var()) - 1) < 1e-6
    assert (y[~mask] == 0).all()


def test_two_halves_whitened_with_shared_moments_are_the_whole_whitened() -> None:
    torch.manual_seed(2)
    x, mask = torch.randn(6, 4, dtype=torch.float64), torch.rand(6, 4) < 0.7
    whole = whiten(x, mask, moments(x, mask), unbiased=True)
    shared = moments(x[:2], mask[:2]) + moments(x[2:], mask[2:])
    halves = [whiten(x[rows], mask[rows], shared, unbiased=True) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(halves), whole, atol=1e-12, rtol=0)


def test_whitening_can_leave_the_mean_where_it_is() -> None:
    torch.manual_seed(3)
    x, mask = 5 * torch.randn(6, 9, dtype=torch.float64) - 2, torch.rand(6, 9) < 0.7
    y = whiten_keeping_mean(torch.where(mask, x, torch.nan), mask, moments(x, mask), unbiased=True)
    assert abs(float(y[mask].mean() - x[mask].mean())) < 1e-12
    assert abs(float(y[mask].var()) - 1) < 1e-6
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[mask] - x[mask].mean(), (x[mask] - x[mask].mean()) / x[mask].std(), atol=1e-6, rtol=0)
    assert whiten_keeping_mean(x.bfloat16(), mask, moments(x, mask), unbiased=True).dtype == torch.float32
