"""Numbers that describe samples: plain functions of plain values."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error."""

    mean: float
    se: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error s / sqrt(n) of independent values, s with n - 1. The error of a single value is NaN."""
    count = len(values)
    assert count, "no values"
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.nan, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def gain(after: Sequence[float], before: Sequence[float]) -> Estimate:
    """The mean of after - before over the same prompts in the same order, with the standard error of the difference."""
    return estimate([new - old for new, old in zip(after, before, strict=True)])


def distinct_n(sequences: Sequence[Sequence[Hashable]], *, n: int) -> float:
    """Different n-grams over all n-grams of the whole corpus.        [Li 2016, arXiv:1510.03055]

    Falls with the size of the corpus: compare equal numbers of equally long sequences. 0 where there is no n-gram.
    """
    grams = [tuple(sequence[i : i + n]) for sequence in sequences for i in range(len(sequence) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> Estimate:
    """Share of pairs whose chosen side has the higher score, a tie counting one half."""
    return estimate([0.5 if c == r else float(c > r) for c, r in zip(chosen, rejected, strict=True)])
