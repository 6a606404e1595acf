"""Losses of the critic, and how well it explains the returns."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.masked import Moments, at_least_float32, moments, select
from rlhf.algo.registry import Registry

VALUE_LOSSES = Registry("value loss")


@VALUE_LOSSES.register("ppo_value", paper="arXiv:1909.08593 code; openai/baselines ppo2")
def ppo_value(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, clip: float
) -> tuple[Tensor, Tensor]:
    """max((V - return)^2, (clip(V, V_old +- clip) - return)^2) / 2.

    All (B, R), mask 1 on response tokens. Returns (losses, clipped), both (B, R): `clipped` is true where the clipped
    value has the larger error, which is where the gradient is 0. Both are 0 where mask is 0. clip: in units of return.
    """
    values = select(at_least_float32(values), mask)
    old_values = select(at_least_float32(old_values), mask)
    returns = select(at_least_float32(returns), mask)
    near = old_values + (values - old_values).clamp(-clip, clip)
    plain, limited = (values - returns) ** 2, (near - returns) ** 2
    return 0.5 * torch.maximum(plain, limited), limited > plain


def value_moments(values: Tensor, returns: Tensor, mask: Tensor) -> tuple[Moments, Moments]:
    """Moments of the critic's errors (return - value) and of the returns, to be added up over ranks."""
    returns = select(at_least_float32(returns), mask)
    return moments(returns - select(at_least_float32(values), mask), mask), moments(returns, mask)


def explained_variance(errors: Moments, returns: Moments) -> Tensor:
    """1 - Var(return - value) / Var(return): 1 perfect, 0 no better than a constant, NaN if all returns are equal."""
    spread = returns.variance(unbiased=False)
    undefined = torch.full_like(spread, torch.nan)
    return torch.where(spread > 0, 1 - errors.variance(unbiased=False) / spread, undefined)
