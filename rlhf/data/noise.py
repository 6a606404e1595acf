"""How many preference labels are wrong, by the account of a reward model; shares with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_HALVINGS = 60
_LEAST = 1e-150  # probabilities below are taken for this, so that their reciprocals can be squared


@dataclass(frozen=True)
class Share:
    """`count` of `total` with the 95 % interval of their share."""

    count: int
    total: int
    low: float
    high: float


def wilson(p: float, total: float, *, z: float) -> tuple[float, float]:
    """The interval of a share p of `total` trials; z = 1.96 for 95 %.           [Wilson 1927, JASA 22 p. 209]

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Never leaves [0, 1].
    """
    wide = z * z / total
    half = z * math.sqrt(p * (1 - p) / total + wide / (4 * total))
    return (p + wide / 2 - half) / (1 + wide), (p + wide / 2 + half) / (1 + wide)


def share(count: int, total: int, *, z: float = 1.96) -> Share:
    """A share with Wilson's interval. Of nothing, any share is possible."""
    return Share(count, total, *wilson(count / total, total, z=z)) if total else Share(0, 0, 0.0, 1.0)


@dataclass(frozen=True)
class LabelNoise:
    """What a reward model says of the labels of pairs."""

    disagree: Share  # pairs whose rejected side has the higher score
    ties: int
    expected: float  # the share that would disagree if labels were drawn from the scores by Bradley-Terry, none flipped
    epsilon: float | None  # the estimate; None where all scores are equal, which says nothing about labels
    error: float | None  # its standard error


def label_noise(differences: Sequence[float]) -> LabelNoise:
    """Maximum likelihood of e in p(label) = (1 - e) sigmoid(d) + e sigmoid(-d), d = score chosen - score rejected.

    Labels are taken to be drawn from the scores by Bradley-Terry and then flipped with probability e, apart from the
    pair. The log-likelihood is concave in e; its maximum on [0, 1] is found by halving, the standard error is
    1 / sqrt(observed information). At 0 or 1, the ends of the range, the error is that of an estimate that happens to
    lie there. d is in the units of log-odds: the estimate is as good as the reward model's scale. One that has learned
    these very labels is too sure of them, which makes e too small where it has them right and too large where not.
    """
    values = np.asarray(differences, np.float64)
    assert len(values) and np.isfinite(values).all(), "expected finite differences"
    disagree, ties = int((values < 0).sum()), int((values == 0).sum())
    right = np.maximum(_sigmoid(values), _LEAST)
    slope = -np.tanh(values / 2)  # of p(label) in e
    facts = (share(disagree, len(values)), ties, float(np.where(values == 0, 0.0, _sigmoid(-np.abs(values))).mean()))
    if not slope.any():
        return LabelNoise(*facts, None, None)

    def rise(epsilon: float) -> float:
        return float((slope / np.maximum(right + epsilon * slope, _LEAST)).sum())

    low, high = 0.0, 1.0
    if rise(low) <= 0:
        high = low
    elif rise(high) >= 0:
        low = high
    for _ in range(_HALVINGS if low < high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if rise(middle) > 0 else (low, middle)
    epsilon = (low + high) / 2
    information = float(((slope / np.maximum(right + epsilon * slope, _LEAST)) ** 2).sum())
    return LabelNoise(*facts, epsilon, 1 / math.sqrt(information))


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    smaller = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1.0, smaller) / (1 + smaller))
