"""Train score against test score, both in deviations of the first rollout."""

from __future__ import annotations

import json

import pytest

from rlhf.train.overoptimisation import Gap, Scale


def test_shifts_are_in_deviations_of_the_first_rollout():
    gap = Gap()
    assert gap.look(Scale(1.0, 2.0), Scale(-3.0, 0.5)) == {"test/train_shift": 0.0, "test/shift": 0.0, "test/gap": 0.0}
    # train: (6 - 1) / 2 = 2.5; test: (-4 + 3) / 0.5 = -2; the later deviations do not matter
    assert gap.look(Scale(6.0, 9.0), Scale(-4.0, 7.0)) == {
        "test/train_shift": 2.5,
        "test/shift": -2.0,
        "test/gap": 4.5,
    }


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (10.0, 3.0), (0.01, -7.0)])
def test_the_gap_does_not_depend_on_the_unit_of_either_score(a, b):
    plain, scaled = Gap(), Gap()
    for mean in (0.5, 0.75, 1.5):
        expected = plain.look(Scale(mean, 0.5), Scale(2 * mean, 1.5))
        found = scaled.look(Scale(a * mean + b, a * 0.5), Scale(2 * mean, 1.5))
        assert found == pytest.approx(expected, abs=1e-9)


def test_there_is_no_scale_before_both_scores_vary():
    gap = Gap()
    assert gap.look(Scale(0.0, 0.0), Scale(1.0, 1.0)) == {}
    assert gap.look(Scale(0.2, 0.4), Scale(1.0, float("nan"))) == {} and gap.state() == {}
    assert gap.look(Scale(0.2, 0.4), Scale(1.0, 1.0))["test/gap"] == 0.0
    assert gap.look(Scale(0.4, 0.0), Scale(1.0, 0.0))["test/gap"] == pytest.approx(0.5)


@pytest.mark.parametrize("std", [0.0, 1.0])
def test_a_resumed_run_keeps_its_scale(std):
    gap, resumed = Gap(), Gap()
    gap.look(Scale(1.0, std), Scale(2.0, 1.0))
    resumed.load(json.loads(json.dumps(gap.state())))
    assert resumed.look(Scale(3.0, 2.0), Scale(2.0, 4.0)) == gap.look(Scale(3.0, 2.0), Scale(2.0, 4.0))
