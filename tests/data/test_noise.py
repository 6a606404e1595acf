"""Flipped labels counted through a reward: on labels whose noise is known, and against a search by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from rlhf.data.demo import DemoSizes, demo_rows, gold_reward
from rlhf.data.noise import label_noise, share


def differences(seed: int, count: int = 4000) -> list[float]:
    """Gold reward of the chosen answer less that of the rejected one, of pairs that are labelled by Bradley-Terry."""
    rows = demo_rows("pairs", seed, DemoSizes(pairs=count))
    return [gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"]) for row in rows]


@pytest.mark.parametrize("flipped", [0.0, 0.05, 0.2, 0.4])
def test_known_noise_is_found_within_three_standard_errors(flipped: float) -> None:
    """The gold reward is the labeller's own, so nothing but the flips is left to explain."""
    rng = random.Random(1)
    found = label_noise([-d if rng.random() < flipped else d for d in differences(1)])
    assert found.epsilon is not None and found.error is not None
    assert abs(found.epsilon - flipped) < 3 * found.error < 0.05
    if not flipped:
        assert found.disagree.low < found.expected < found.disagree.high


def test_the_standard_error_is_that_of_repetitions() -> None:
    rng = random.Random(2)
    true = differences(2)
    found = [label_noise([-d if rng.random() < 0.2 else d for d in rng.choices(true, k=1000)]) for _ in range(60)]
    spread = np.std([each.epsilon for each in found], ddof=1)
    assert spread == pytest.approx(np.mean([each.error for each in found]), rel=0.3)


def test_the_estimate_is_the_highest_point_of_the_likelihood() -> None:
    values = [3.0, 1.0, -0.5, 2.0, -2.5, 0.0, 4.0]

    def likelihood(epsilon: float) -> float:
        def right(d: float) -> float:
            return 1 / (1 + math.exp(-d))

        return sum(math.log((1 - epsilon) * right(d) + epsilon * right(-d)) for d in values)

    grid = [i / 20000 for i in range(20001)]
    best = max(grid, key=likelihood)
    found = label_noise(values)
    assert found.epsilon == pytest.approx(best, abs=1e-4) and 0 < best < 1
    step = 1e-4
    curvature = (likelihood(best + step) - 2 * likelihood(best) + likelihood(best - step)) / step**2
    assert found.error == pytest.approx(1 / math.sqrt(-curvature), rel=1e-3)
    assert (found.disagree.count, found.ties) == (2, 1)


def test_labels_that_are_all_right_all_wrong_or_unknown() -> None:
    assert label_noise([5.0, 2.0]).epsilon == 0.0 and label_noise([-5.0, -2.0]).epsilon == 1.0
    assert (label_noise([0.0]).epsilon, label_noise([0.0]).error, label_noise([0.0]).expected) == (None, None, 0.0)
    sure = label_noise([800.0, -800.0, 800.0, 800.0])
    assert sure.epsilon == pytest.approx(0.25) and sure.expected == 0.0


def test_wilson_interval() -> None:
    """9 of 10, the textbook's example: 0.596 to 0.982."""
    found = share(9, 10)
    assert (round(found.low, 3), round(found.high, 3)) == (0.596, 0.982)
    assert share(0, 5).low == pytest.approx(0, abs=1e-12) and share(5, 5).high == pytest.approx(1)
    assert (share(0, 0).low, share(0, 0).high) == (0.0, 1.0)
