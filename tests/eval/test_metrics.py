"""Metrics against hand-computed numbers."""

from __future__ import annotations

import math
import random

import pytest

from rlhf.eval.metrics import distinct_n, estimate, gain, pair_accuracy


def test_estimate_by_hand():
    found = estimate([1.0, 2.0, 6.0])
    assert found.mean == pytest.approx(3.0, abs=1e-12)
    assert found.se == pytest.approx(math.sqrt(7 / 3), abs=1e-12)  # variance (4 + 1 + 9) / 2 = 7
    assert found.count == 3


def test_estimate_of_one_value_has_no_error():
    assert estimate([2.5]).mean == 2.5
    assert math.isnan(estimate([2.5]).se)


def test_estimate_of_nothing_is_our_mistake():
    with pytest.raises(AssertionError):
        estimate([])


def test_estimate_covers_the_truth():
    rng = random.Random(0)
    found = [estimate([rng.gauss(1.0, 2.0) for _ in range(50)]) for _ in range(400)]
    within = sum(abs(e.mean - 1.0) < 2 * e.se for e in found) / len(found)
    assert 0.91 < within < 0.98


def test_gain_is_paired():
    before = [0.0, 10.0, 20.0]
    found = gain([1.0, 11.0, 21.5], before)
    assert found.mean == pytest.approx(3.5 / 3, abs=1e-12)
    assert found.se == pytest.approx(math.sqrt((1 / 36 + 1 / 36 + 1 / 9) / 2 / 3), abs=1e-12)
    with pytest.raises(ValueError, match="zip"):
        gain([1.0], before)


def test_distinct_n():
    tokens = [[1, 2, 3, 1, 2], [1, 2, 3]]
    assert distinct_n(tokens, n=2) == pytest.approx(0.5, abs=1e-6)  # published value: 12 23 31 of 12 23 31 12 12 23
    assert distinct_n(tokens, n=1) == pytest.approx(3 / 8, abs=1e-12)
    assert distinct_n(tokens, n=6) == 0.0
    assert distinct_n([], n=2) == 0.0
    assert distinct_n([["a", "b"], ["b", "a"]], n=2) == 1.0


def test_distinct_n_ignores_the_order_of_sequences_but_not_their_borders():
    tokens = [[1, 2, 3], [3, 4, 1, 2], [5, 5, 5]]
    assert distinct_n(tokens, n=2) == distinct_n(tokens[::-1], n=2)
    assert distinct_n([[1, 2], [3, 4]], n=2) == 1.0, "no n-gram goes over a border"


def test_pair_accuracy_counts_ties_half():
    found = pair_accuracy([2.0, 1.0, 0.0, 5.0], [1.0, 2.0, 0.0, 4.0])
    assert found.mean == pytest.approx((1 + 0 + 0.5 + 1) / 4, abs=1e-12)
    swapped = pair_accuracy([1.0, 2.0, 0.0, 4.0], [2.0, 1.0, 0.0, 5.0])
    assert found.mean + swapped.mean == pytest.approx(1.0, abs=1e-12)
