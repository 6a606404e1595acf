"""KL controllers by hand, and where they lead."""

from __future__ import annotations

import pytest

from rlhf.algo.controllers import adaptive, fixed, ppo_penalty_beta


def test_fixed_is_fixed() -> None:
    assert fixed(0.05, 1e9, 512) == 0.05


@pytest.mark.parametrize(
    ("kl", "episodes", "expected"),
    [
        (10.0, 100, 0.5),  # at the target
        (11.0, 100, 0.505),  # 10 % above, over a tenth of the horizon: 1 % up
        (9.0, 100, 0.495),
        (12.0, 500, 0.55),  # 20 % above, over half of it: 10 % up
        (1000.0, 500, 0.55),  # no more than that
        (-3.0, 500, 0.45),  # k1 can be negative
        (11.0, 0, 0.5),
    ],
)
def test_adaptive_by_hand(kl: float, episodes: int, expected: float) -> None:
    assert adaptive(0.5, kl, episodes, target=10.0, horizon=1000.0) == pytest.approx(expected, abs=1e-12)


def test_adaptive_settles_where_the_kl_is_the_target() -> None:
    coef = 0.01
    for _ in range(400):  # a policy whose KL is 3 / coef
        coef = adaptive(coef, 3 / coef, 100, target=6.0, horizon=1000.0)
    assert coef == pytest.approx(0.5, rel=1e-6)


def test_penalty_beta_by_hand() -> None:
    kls = [0.0, 0.019, 0.021, 0.03, 0.044, 0.046, 1.0]
    found = [ppo_penalty_beta(1.0, kl, 8, target=0.03) for kl in kls]
    assert found == [0.5, 0.5, 1, 1, 1, 2, 2]
    # exactly at either limit nothing happens
    assert ppo_penalty_beta(1.0, 3.0, 8, target=2.0) == ppo_penalty_beta(1.0, 2.0, 8, target=3.0) == 1
