"""The weighted sum of rewards never makes a number out of a missing one."""

from __future__ import annotations

import pytest

from rlhf.rewards.base import weighted_sum


def test_weighted_sum_by_hand() -> None:
    parts = {"numeric": [1.0, 0.0, 0.5], "format": [1.0, 1.0, 0.0]}
    assert weighted_sum(parts, {"numeric": 2.0, "format": 0.5}) == [2.5, 0.5, 1.0]
    assert weighted_sum({"length": [0.5]}, {"length": -1.0}) == [-0.5]


def test_an_answer_that_any_reward_left_unscored_is_unscored() -> None:
    parts = {"a": [1.0, None, 3.0, None], "b": [10.0, 20.0, None, None]}
    assert weighted_sum(parts, {"a": 1.0, "b": 1.0}) == [11.0, None, None, None]
    assert weighted_sum(parts, {"a": 1.0, "b": 0.0}) == [1.0, None, None, None]


def test_parts_must_match_their_weights_and_each_other() -> None:
    with pytest.raises(AssertionError):
        weighted_sum({"a": [1.0]}, {"b": 1.0})
    with pytest.raises(AssertionError):
        weighted_sum({"a": [1.0], "b": [1.0, 2.0]}, {"a": 1.0, "b": 1.0})
    with pytest.raises(AssertionError):
        weighted_sum({}, {})
