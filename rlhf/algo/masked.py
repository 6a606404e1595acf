"""Sums, means and whitening over the positions that a boolean mask selects.

Masked values are selected away before any arithmetic: padding may hold infinities, and 0 * inf is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

WHITEN_EPS = 1e-8


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32 if its type is narrower than that or an integer; float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def select(x: Tensor, mask: Tensor) -> Tensor:
    """`x` where the boolean mask is true, 0 (with gradient 0) elsewhere."""
    return torch.where(mask, x, x.new_zeros(()))


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over all selected positions: a scalar, at least float32."""
    return select(at_least_float32(x), mask).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over all selected positions: a scalar; 0 where nothing is selected. Not for losses, which stay sums."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def row_sums(x: Tensor, mask: Tensor) -> Tensor:
    """Sum over the selected positions of each row: (B, R) -> (B,), at least float32."""
    return select(at_least_float32(x), mask).sum(-1)


def row_means(x: Tensor, mask: Tensor) -> Tensor:
    """Mean over the selected positions of each row: (B, R) -> (B,); 0 for a row without any."""
    return row_sums(x, mask) / mask.sum(-1).clamp(min=1)


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares as float64 scalars. Sums add up over ranks and micro-batches; means do not."""

    count: Tensor
    total: Tensor
    squares: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def sums(self) -> dict[str, Tensor]:
        """The three sums by name, to be added up over ranks."""
        return {"count": self.count, "total": self.total, "squares": self.squares}

    @classmethod
    def from_sums(cls, sums: Mapping[str, Tensor | float]) -> Moments:
        """The inverse of `sums`, from tensors or plain numbers."""
        return cls(*(torch.as_tensor(sums[name], dtype=torch.float64) for name in ("count", "total", "squares")))

    def mean(self) -> Tensor:
        """The mean; 0 of nothing."""
        return self.total / self.count.clamp(min=1)

    def variance(self, *, unbiased: bool) -> Tensor:
        """The variance, never negative; `unbiased` divides by count - 1 (Bessel) instead of count."""
        deviations = self.squares - self.count * self.mean() ** 2
        is_rounding = deviations <= 1e-14 * self.squares  # what is left of equal values
        return torch.where(is_rounding, 0, deviations) / (self.count - int(unbiased)).clamp(min=1)


def moments(x: Tensor, mask: Tensor) -> Moments:
    """Moments of the selected values, in float64 so that sum-of-squares minus squared-sum keeps its digits."""
    values = select(x.double(), mask)
    return Moments(mask.sum().double(), values.sum(), (values**2).sum())


def whiten(x: Tensor, mask: Tensor, moments: Moments, *, unbiased: bool) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) on selected positions, 0 elsewhere.                   [arXiv:1909.08593 code]

    x, mask: (B, R). `moments` are those of the population to be whitened, summed over ranks by the caller.
    unbiased: Bessel's correction as in TRL and verl; OpenAI's code and OpenRLHF leave it out.
    """
    x = at_least_float32(x)
    scale = (moments.variance(unbiased=unbiased) + WHITEN_EPS).rsqrt()
    return select((select(x, mask) - moments.mean().to(x)) * scale.to(x), mask)


def whiten_keeping_mean(x: Tensor, mask: Tensor, moments: Moments, *, unbiased: bool) -> Tensor:
    """`whiten`, with the mean added back: (x - mean) / sqrt(variance + 1e-8) + mean.            [arXiv:1909.08593 code]

    For rewards, whose sign and mean say which answers to want at all. 0 where mask is 0.
    """
    return select(whiten(x, mask, moments, unbiased=unbiased) + moments.mean().to(at_least_float32(x)), mask)
