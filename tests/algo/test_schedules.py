"""Schedules at their landmarks."""

from __future__ import annotations

import math

import pytest

from rlhf.algo.schedules import SCHEDULES, constant, cosine, linear


@pytest.mark.parametrize("name", SCHEDULES.names())
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.0), (1, 0.9), (10, 0.0), (100, 0.03), (7, 0.5), (1000, 0.999)])
def test_factor_rises_falls_and_stays_in_range(name: str, total: int, warmup: float) -> None:
    factors = [SCHEDULES[name].function(step, total, warmup=warmup, min_lr_ratio=0.0) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = round(warmup * total)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if peak:
        assert factors[0] == 1 / peak and factors[peak - 1] == 1


def test_landmarks_by_hand() -> None:
    options = {"warmup": 0.2, "min_lr_ratio": 0.1}
    assert [round(linear(step, 10, **options), 6) for step in (0, 1, 2, 6, 10, 11)] == [0.5, 1, 1, 0.55, 0.1, 0.1]
    assert [round(cosine(step, 10, **options), 6) for step in (0, 1, 2, 6, 10, 11)] == [0.5, 1, 1, 0.55, 0.1, 0.1]
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    assert abs(cosine(4, 10, **options) - quarter) < 1e-12
    assert [constant(step, 10, **options) for step in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
