"""Numbers that describe samples: plain functions of plain values."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from rlhf.data.noise import wilson


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


# --- shares ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """A share of trials with its Wilson interval."""

    mean: float
    low: float
    high: float
    count: int


def win_rate(wins: float, ties: float, losses: float, *, z: float = 1.96) -> Share:
    """(wins + ties / 2) / n with its Wilson score interval, z = 1.96 for 95 %, see `wilson`.

    A tie is taken for half a success, which makes the interval a little too wide.
    """
    count = wins + ties + losses
    assert count > 0, "no comparison"
    p = (wins + ties / 2) / count
    return Share(p, *wilson(p, count, z=z), round(count))


def pass_at_k(n: int, c: int, *, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k answers is right, without bias.   [arXiv:2107.03374 eq. 1]

    n answers were sampled to a problem, c of them are right.
    """
    assert 0 <= c <= n and 1 <= k <= n, f"expected 0 <= c <= n and 1 <= k <= n, found n={n}, c={c}, k={k}"
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


# --- raters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """How often raters agree, and how much of what chance leaves open: kappa, NaN where chance leaves nothing."""

    share: float
    kappa: float


def cohen_kappa(confusion: Sequence[Sequence[float]]) -> Agreement:
    """(p_o - p_e) / (1 - p_e) of two raters.                                            [Cohen 1960, EPM 20 p. 37]

    confusion[i][j]: items that the first rater put into category i and the second into j.
    """
    total = math.fsum(map(math.fsum, confusion))
    first = [math.fsum(row) / total for row in confusion]
    second = [math.fsum(column) / total for column in zip(*confusion, strict=True)]
    observed = math.fsum(confusion[i][i] for i in range(len(confusion))) / total
    return _beyond_chance(observed, math.fsum(p * q for p, q in zip(first, second, strict=True)))


def fleiss_kappa(counts: Sequence[Sequence[float]]) -> Agreement:
    """(P - P_e) / (1 - P_e) of n raters, P the mean over items of the share of agreeing pairs of raters.

    counts[i][j]: raters that put item i into category j; every item has equally many, at least two.
    [Fleiss 1971, Psychological Bulletin 76 p. 378]
    """
    raters = math.fsum(counts[0])
    assert raters >= 2 and all(math.fsum(row) == raters for row in counts), "expected equally many raters, at least two"
    pairs = [(math.fsum(c * c for c in row) - raters) / (raters * (raters - 1)) for row in counts]
    shares = [math.fsum(column) / (len(counts) * raters) for column in zip(*counts, strict=True)]
    return _beyond_chance(math.fsum(pairs) / len(counts), math.fsum(p * p for p in shares))


def _beyond_chance(observed: float, expected: float) -> Agreement:
    return Agreement(observed, (observed - expected) / (1 - expected) if expected < 1 else math.nan)
