"""Comparing scores on pairs: by hand, against other ways to compute the same, and by simulation."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from rlhf.eval.comparison import (
    bootstrap,
    calibration_error,
    clustered,
    difference,
    even_bins,
    mcnemar,
    mean_nll,
    verdicts,
)
from rlhf.eval.metrics import estimate


def test_clusters_of_one_are_independent_values():
    values = [1.0, 2.0, 6.0, -3.0]
    found = clustered(values, "abcd")
    assert (found.mean, found.se, found.count) == pytest.approx((1.5, estimate(values).se, 4), abs=1e-12)


def test_copies_in_a_cluster_add_no_certainty():
    values = [1.0, 2.0, 6.0]
    copies = clustered([v for v in values for _ in range(5)], [c for c in "abc" for _ in range(5)])
    assert copies.se == pytest.approx(estimate(values).se, abs=1e-12)
    assert estimate([v for v in values for _ in range(5)]).se < 0.5 * copies.se
    assert math.isnan(clustered([1.0, 2.0], "aa").se)


def test_nll_by_hand():
    assert mean_nll([0.0]) == pytest.approx(math.log(2), abs=1e-12)
    assert mean_nll([2.0, -1.0]) == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(1))) / 2, abs=1e-12)
    assert mean_nll([-5000.0]) == pytest.approx(5000.0, abs=1e-9), "no overflow"


def test_calibration_error_by_hand():
    margin = math.log(3)  # 75 %
    assert calibration_error([margin] * 3 + [-margin]) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error([margin] * 4) == pytest.approx(0.25, abs=1e-12)
    assert calibration_error([-margin] * 4) == pytest.approx(0.75, abs=1e-12)
    # Too sure in one bin and not sure enough in another do not make up for each other.
    sure = math.log(9)
    assert calibration_error([margin] * 4 + [sure] * 2 + [-sure] * 2) == pytest.approx((0.25 + 0.4) / 2, abs=1e-12)
    assert calibration_error([0.0, 0.0]) == 0.0 and calibration_error([4000.0]) == pytest.approx(0.0, abs=1e-12)


def test_honest_probabilities_are_calibrated():
    rng = random.Random(0)
    margins = [rng.gauss(0, 2) for _ in range(20000)]
    labelled = [m if rng.random() < 1 / (1 + math.exp(-m)) else -m for m in margins]
    assert calibration_error(labelled) < 0.015
    assert calibration_error([3 * m for m in labelled]) > 0.08


def test_mcnemar():
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * (1 + 10) / 1024, abs=1e-12)
    assert mcnemar(0, 1000) < 1e-200, "whole numbers, no underflow on the way"
    outcomes = [sum(throw) for throw in itertools.product((0, 1), repeat=7)]  # as far from even as 2 of 7, or further
    assert mcnemar(2, 5) == pytest.approx(sum(abs(o - 3.5) >= 1.5 for o in outcomes) / 128, abs=1e-12)


def test_difference_by_hand():
    first, second = [1.0, 1.0, 1.0, -1.0, 0.0, 2.0], [1.0, -1.0, -2.0, 1.0, 1.0, -2.0]
    found = difference(first, second, range(6))
    assert found.mean == pytest.approx((3 - 1 - 0.5) / 6, abs=1e-12)
    assert (found.only_first, found.only_second) == (3, 1), "a tie is neither right nor wrong"
    assert found.p == mcnemar(3, 1)
    assert found.low < found.mean < found.high
    other = difference(second, first, range(6))
    assert (other.mean, other.low, other.high) == pytest.approx((-found.mean, -found.high, -found.low), abs=0.2)
    assert found == difference(first, second, range(6)), "the same at every call"


def test_the_bootstrap_is_as_wide_as_theory_says():
    rng = random.Random(1)
    values = [rng.gauss(0.3, 1.0) for _ in range(400)]
    theory = estimate(values)
    low, high = bootstrap(values, range(400))
    assert (low, high) == pytest.approx((theory.mean - 1.96 * theory.se, theory.mean + 1.96 * theory.se), abs=0.01)
    copies = bootstrap([v for v in values for _ in range(3)], [i for i in range(400) for _ in range(3)])
    assert copies == pytest.approx((low, high), abs=0.01), "prompts are drawn, not pairs"


def test_even_bins():
    assert even_bins([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], 3) == [[1, 3], [2, 4], [0, 5]]
    assert even_bins([0.0] * 5, 5) == [[0, 1, 2, 3, 4]], "equal values stay together"
    groups = even_bins([float(i % 7) for i in range(70)], 5)
    assert sorted(itertools.chain(*groups)) == list(range(70))
    assert all(len({i % 7 for i in a} & {i % 7 for i in b}) == 0 for a, b in itertools.combinations(groups, 2))


def test_verdicts():
    found = verdicts([1.0, -0.5, 0.0, 2.0], "aabc", log_odds=True)
    assert found.accuracy.mean == pytest.approx(2.5 / 4, abs=1e-12)
    assert found.margin.mean == pytest.approx(2.5 / 4, abs=1e-12) and found.nll == mean_nll([1.0, -0.5, 0.0, 2.0])
    plain = verdicts([3.0, -1.0], "ab", log_odds=False)
    assert plain.nll is None and plain.ece is None
