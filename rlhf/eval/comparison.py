"""How well scores tell the better side of pairs from the worse, and how two kinds of scores differ on them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from rlhf.data.order import generator
from rlhf.eval.metrics import Estimate, Share, win_rate

RESAMPLES = 10_000
_AT_ONCE = 500  # resamples that are held in memory together
_BINS = 10


@dataclass(frozen=True)
class Verdicts:
    """What one kind of score says about pairs. margins: score of the chosen side less that of the rejected one."""

    margins: list[float]
    accuracy: Share  # of pairs whose chosen side scores higher, a tie counting one half
    margin: Estimate  # its error is clustered by prompt
    nll: float | None = None  # mean -log sigmoid(margin), nats; None where margins are not log-odds
    ece: float | None = None


@dataclass(frozen=True)
class Difference:
    """Accuracy of `first` less accuracy of `second` on the same pairs."""

    mean: float
    low: float  # 95 % interval, bootstrap over prompts
    high: float
    only_first: int  # pairs that only one of them gets right
    only_second: int
    p: float  # McNemar


def verdicts(margins: Sequence[float], prompts: Sequence[Hashable], *, log_odds: bool) -> Verdicts:
    """Accuracy and margins of scores; with `log_odds` also how well sigmoid(margin) is calibrated."""
    wins, ties = sum(m > 0 for m in margins), sum(m == 0 for m in margins)
    return Verdicts(
        list(margins),
        win_rate(wins, ties, len(margins) - wins - ties),
        clustered(margins, prompts),
        mean_nll(margins) if log_odds else None,
        calibration_error(margins) if log_odds else None,
    )


def clustered(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """Mean of values with a standard error that allows for values of one cluster being alike.

    sqrt(C / (C - 1) sum over clusters of (sum of (x - mean))^2) / n, of C clusters; s / sqrt(n) where each has one
    value. The error of a single cluster is NaN.                                       [Liang and Zeger 1986, eq. 7]
    """
    count = len(values)
    mean = math.fsum(values) / count
    sums: dict[Hashable, float] = dict.fromkeys(clusters, 0.0)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    if len(sums) == 1:
        return Estimate(mean, math.nan, count)
    square = math.fsum(total * total for total in sums.values()) * len(sums) / (len(sums) - 1)
    return Estimate(mean, math.sqrt(square) / count, count)


def mean_nll(margins: Sequence[float]) -> float:
    """Mean of log(1 + exp(-margin)): the Bradley-Terry loss, nats; log 2 of scores that know nothing."""
    return math.fsum(max(0.0, -m) + math.log1p(math.exp(-abs(m))) for m in margins) / len(margins)


def calibration_error(margins: Sequence[float]) -> float:
    """Expected calibration error of sigmoid(margin): sum over 10 bins of n_bin / n |accuracy - confidence|.

    Confidence is that of the side with the higher score, so it lies in [0.5, 1], and bins are equally wide in it.
    [arXiv:1706.04599 eq. 3]
    """
    bins: list[list[tuple[float, float]]] = [[] for _ in range(_BINS)]
    for margin in margins:
        confidence = 1 / (1 + math.exp(-min(abs(margin), 700.0)))
        right = 0.5 if margin == 0 else float(margin > 0)
        bins[min(_BINS - 1, int((confidence - 0.5) * 2 * _BINS))].append((confidence, right))
    gaps = [abs(math.fsum(right - confidence for confidence, right in each)) for each in bins]
    return math.fsum(gaps) / len(margins)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: 2 P(X <= min(b, c)), X ~ Binomial(b + c, 1/2), at most 1.  [McNemar 1947]"""
    count, least = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(count, k) for k in range(least + 1))
    return min(1.0, 2 * tail / 2**count)


def difference(first: Sequence[float], second: Sequence[float], prompts: Sequence[Hashable]) -> Difference:
    """Which of two kinds of scores is right more often; margins of the same pairs in the same order.

    The interval is that of a paired bootstrap which draws prompts with all their pairs; it is the same at every call.
    """
    right = [[0.5 if m == 0 else float(m > 0) for m in margins] for margins in (first, second)]
    gains = [a - b for a, b in zip(*right, strict=True)]
    low, high = bootstrap(gains, prompts)
    only_first, only_second = sum(gain == 1 for gain in gains), sum(gain == -1 for gain in gains)
    mean = math.fsum(gains) / len(gains)
    return Difference(mean, low, high, only_first, only_second, mcnemar(only_first, only_second))


def bootstrap(values: Sequence[float], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """95 % percentile interval of the mean of values, from 10 000 draws of whole clusters.  [Efron 1979]"""
    numbers: dict[Hashable, int] = {}
    index = torch.tensor([numbers.setdefault(cluster, len(numbers)) for cluster in clusters])
    sums = torch.zeros(len(numbers), dtype=torch.float64)
    sizes = sums.clone()
    sums.index_add_(0, index, torch.tensor(values, dtype=torch.float64))
    sizes.index_add_(0, index, torch.ones(len(values), dtype=torch.float64))
    rng, means = generator(0, "bootstrap"), []
    for _ in range(RESAMPLES // _AT_ONCE):
        drawn = torch.from_numpy(rng.integers(len(numbers), size=(_AT_ONCE, len(numbers))))
        means.append(sums[drawn].sum(-1) / sizes[drawn].sum(-1))
    low, high = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def even_bins(values: Sequence[float], count: int) -> list[list[int]]:
    """Positions of values in at most `count` groups of about equal size, by value; equal values stay together."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    first: dict[float, int] = {}
    last: dict[float, int] = {}
    for rank, i in enumerate(order):
        first.setdefault(values[i], rank)
        last[values[i]] = rank
    groups: list[list[int]] = [[] for _ in range(count)]
    for i in order:
        middle = (first[values[i]] + last[values[i]] + 1) / 2
        groups[min(count - 1, int(count * middle / len(values)))].append(i)
    return [group for group in groups if group]
