"""The critic's clipped error, token by token, and explained variance against torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algo.value import explained_variance, ppo_value, value_moments


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "gradient", "clipped"),
    [
        (1.0, 0.9, 3.0, 2.0, -2.0, False),  # moved by less than the limit
        (1.0, 0.0, 3.0, 2.8**2 / 2, 0.0, True),  # moved towards the target by more than 0.2: no further
        (1.0, 0.0, -3.0, 8.0, 4.0, False),  # moved away from the target: full error
        (1.0, 2.0, 1.0, 0.8**2 / 2, 0.0, True),
    ],
)
def test_one_token(value: float, old: float, target: float, loss: float, gradient: float, clipped: bool) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    losses, was_clipped = ppo_value(values, torch.tensor([[old]]).double(), torch.tensor([[target]]), mask, clip=0.2)
    assert abs(float(losses.detach()) - loss) < 1e-12 and bool(was_clipped) is clipped
    (grad,) = torch.autograd.grad(losses.sum(), values)
    assert abs(float(grad) - gradient) < 1e-12


def test_an_unmoved_critic_has_the_gradient_of_half_the_squared_error() -> None:
    torch.manual_seed(0)
    values = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    returns = torch.randn(3, 4, dtype=torch.float64)
    mask = torch.rand(3, 4) < 0.7
    losses, clipped = ppo_value(values, values.detach(), returns, mask, clip=0.2)
    (grad,) = torch.autograd.grad(losses.sum(), values)
    torch.testing.assert_close(grad, torch.where(mask, values.detach() - returns, 0.0), atol=1e-12, rtol=0)
    assert not clipped.any()


def test_padding_holds_anything() -> None:
    torch.manual_seed(1)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    values, old, returns = (torch.randn(3, 5, dtype=torch.float64) for _ in range(3))
    clean, _ = ppo_value(values, old, returns, mask, clip=0.2)
    for garbage in (torch.nan, torch.inf):
        dirty = [torch.where(mask, x, garbage) for x in (values, old, returns)]
        dirty[0].requires_grad_()
        losses, clipped = ppo_value(*dirty, mask, clip=0.2)
        assert torch.equal(losses, clean) and not clipped[~mask].any()
        assert torch.autograd.grad(losses.sum(), dirty[0])[0].isfinite().all()


def test_explained_variance_over_two_ranks() -> None:
    torch.manual_seed(2)
    returns = torch.randn(6, 5, dtype=torch.float64) + 4
    values = returns + 0.5 * torch.randn(6, 5, dtype=torch.float64) - 1
    mask = torch.rand(6, 5) < 0.8
    parts = [value_moments(values[rows], returns[rows], mask[rows]) for rows in (slice(0, 2), slice(2, 6))]
    errors, spread = parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    expected = 1 - (returns - values)[mask].var() / returns[mask].var()
    torch.testing.assert_close(explained_variance(errors, spread), expected, atol=1e-9, rtol=0)


def test_explained_variance_at_its_landmarks() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    mask = torch.ones_like(returns, dtype=torch.bool)
    assert explained_variance(*value_moments(returns, returns, mask)) == 1
    assert explained_variance(*value_moments(torch.full_like(returns, 9.0), returns, mask)) == 0
    assert math.isnan(explained_variance(*value_moments(returns, torch.full_like(returns, 0.1), mask)))
