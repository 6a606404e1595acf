"""Metrics against hand-computed numbers."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from rlhf.eval.metrics import (
    cohen_kappa,
    distinct_n,
    estimate,
    fleiss_kappa,
    gain,
    pair_accuracy,
    pass_at_k,
    win_rate,
)


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


# --- shares and raters -----------------------------------------------------------------------------------------------


def test_win_rate_is_the_published_one():
    found = win_rate(61, 4, 35)
    assert (found.mean, found.count) == (0.63, 100)
    assert (found.low, found.high) == pytest.approx((0.532203475751, 0.718177874305), abs=1e-6)


def test_win_rate_solves_the_equation_it_comes_from():
    # The ends of Wilson's interval are the p0 with |p - p0| = z sqrt(p0 (1 - p0) / n).
    for wins, losses, z in ((3, 7, 1.96), (50, 1, 2.5758), (1, 200, 1.0)):
        found = win_rate(wins, 0, losses, z=z)
        n = wins + losses
        for end in (found.low, found.high):
            assert abs(found.mean - end) == pytest.approx(z * math.sqrt(end * (1 - end) / n), abs=1e-12)
    assert win_rate(0, 0, 5).low == pytest.approx(0.0, abs=1e-12) and win_rate(5, 0, 0).high == pytest.approx(1.0)
    assert win_rate(0, 0, 5).high > 0.3, "nothing is certain after five trials"
    left, right = win_rate(7, 2, 11), win_rate(11, 2, 7)
    assert left.low == pytest.approx(1 - right.high, abs=1e-12)


def test_pass_at_k():
    assert pass_at_k(10, 3, k=4) == pytest.approx(0.833333333333, abs=1e-6)
    assert pass_at_k(10, 3, k=1) == pytest.approx(0.3, abs=1e-12)
    assert pass_at_k(10, 3, k=8) == 1.0 and pass_at_k(10, 0, k=10) == 0.0
    draws = list(itertools.combinations([1, 1, 0, 0, 0, 0], 3))
    assert pass_at_k(6, 2, k=3) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_cohen_kappa():
    found = cohen_kappa([[40, 10], [8, 42]])
    assert (found.share, found.kappa) == pytest.approx((0.82, 0.64), abs=1e-6)
    assert cohen_kappa([[5, 0], [0, 5]]).kappa == pytest.approx(1.0, abs=1e-12)
    assert cohen_kappa([[25, 25], [25, 25]]).kappa == pytest.approx(0.0, abs=1e-12)
    assert cohen_kappa([[0, 5], [5, 0]]).kappa == pytest.approx(-1.0, abs=1e-12)
    assert math.isnan(cohen_kappa([[9, 0], [0, 0]]).kappa), "both always say the same"


def test_fleiss_kappa():
    found = fleiss_kappa([[3, 1], [2, 2], [4, 0], [0, 4]])
    assert (found.share, found.kappa) == pytest.approx((0.708333333333, 0.407407407407), abs=1e-6)
    assert fleiss_kappa([[3, 0], [0, 3]]).kappa == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(AssertionError, match="equally many"):
        fleiss_kappa([[3, 0], [1, 1]])


def test_fleiss_kappa_of_two_raters_agrees_as_often_as_cohen():
    first, second = [0, 0, 1, 1, 2, 2, 0], [0, 1, 1, 1, 2, 0, 0]
    confusion = [
        [sum((a, b) == (i, j) for a, b in zip(first, second, strict=True)) for j in range(3)] for i in range(3)
    ]
    counts = [[(a, b).count(j) for j in range(3)] for a, b in zip(first, second, strict=True)]
    assert fleiss_kappa(counts).share == pytest.approx(cohen_kappa(confusion).share, abs=1e-12)
