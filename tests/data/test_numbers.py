"""Columns that hold numbers: what is read, and what is refused with file, line and field."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlhf.data.numbers import both_sides, density, list_scores, number, win_rates
from rlhf.errors import DataError

NOT_NUMBERS = [None, True, "", "much", "nan", float("nan"), float("inf"), "-inf", 10**400, [1], {"a": 1}]


@pytest.mark.parametrize(("value", "expected"), [(2, 2.0), (-0.5, -0.5), ("1.5", 1.5), (" 3 ", 3.0), (0, 0.0)])
def test_numbers_may_be_written_as_text(value: Any, expected: float) -> None:
    assert number(value, "x:1", "score") == expected


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=lambda value: repr(value)[:12])
def test_everything_else_is_refused(value: Any) -> None:
    reads: list[Callable[[], Any]] = [
        lambda: number(value, "x:1", "score"),
        lambda: list_scores([1, value], "x:1", "scores", 2),
    ]
    for read in reads:
        with pytest.raises(DataError, match=r"^x:1: score(s\[1\])?: expected a number, found "):
            read()


def test_density() -> None:
    assert (density(None, "x:1"), density(0.2, "x:1")) == (0.5, 0.2)
    for value in (0, 1, 1.5, -0.1):
        with pytest.raises(DataError, match="x:1: density: expected a number between 0 and 1, found the number"):
            density(value, "x:1")


def test_both_sides_or_neither() -> None:
    assert both_sides({"score_chosen": 2, "score_rejected": "1"}, "score", "x:1") == (2.0, 1.0)
    assert both_sides({"score_chosen": 2, "score_rejected": None}, "score", "x:1") == ()
    assert both_sides({"score_rejected": 2}, "score", "x:1") == ()
    with pytest.raises(DataError, match="x:1: score_rejected: expected a number, found 'low'"):
        both_sides({"score_chosen": 2, "score_rejected": "low"}, "score", "x:1")


def test_win_rates_are_shares() -> None:
    assert win_rates({"win_rate_chosen": 1, "win_rate_rejected": 0}, "x:1") == (1.0, 0.0)
    with pytest.raises(DataError, match="x:1: win_rate_rejected: expected a share from 0 to 1, found the number 40"):
        win_rates({"win_rate_chosen": 0.6, "win_rate_rejected": 40}, "x:1")


def test_scores_of_a_list() -> None:
    assert list_scores([1, 0.5, 1], "x:1", "scores", 3) == (1.0, 0.5, 1.0)
    assert list_scores([2, 1, 2.5], "x:1", "ranks", 3) == (-2.0, -1.0, -2.5)
    for values, column, message in (
        ([1, 2], "scores", "scores: expected one for each of 3 answers, found 2"),
        ("123", "scores", "scores: expected a list of numbers, found '123'"),
        (3, "ranks", "ranks: expected a list of numbers, found the number 3"),
        ([1, "2", 3], "scores", r"scores\[1\]: expected a number, found '2'"),
        ([1, 2, 0], "ranks", r"ranks\[2\]: expected a rank from 1, the best, found the number 0"),
    ):
        with pytest.raises(DataError, match=f"^x:1: {message}"):
            list_scores(values, "x:1", column, 3)
