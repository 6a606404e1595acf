"""Columns that hold numbers: margins, scores, ranks, win rates."""

from __future__ import annotations

import math
from typing import Any

from rlhf.data.readers import describe
from rlhf.errors import DataError


def number(value: Any, where: str, field: str) -> float:
    """A finite number, which may be written as text: a CSV file has nothing else."""
    found = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            pass
    if not math.isfinite(found):
        raise DataError(f"{field}: expected a number, found {describe(value)}", where=where)
    return found


def density(value: Any, where: str) -> float:
    """The share of good answers among the answers to such a prompt; a half where the row says nothing."""
    if value is None:
        return 0.5
    found = number(value, where, "density")
    if not 0 < found < 1:
        raise DataError(f"density: expected a number between 0 and 1, found {describe(value)}", where=where)
    return found


def both_sides(row: dict[str, Any], name: str, where: str) -> tuple[float, ...]:
    """(NAME_chosen, NAME_rejected) of a pair; nothing where one of them is missing."""
    columns = (f"{name}_chosen", f"{name}_rejected")
    if any(column not in row or row[column] is None for column in columns):
        return ()
    return tuple(number(row[column], where, column) for column in columns)


def win_rates(row: dict[str, Any], where: str) -> tuple[float, ...]:
    """(win_rate_chosen, win_rate_rejected) of a pair, each in [0, 1]; nothing where one of them is missing."""
    found = both_sides(row, "win_rate", where)
    for side, rate in zip(("chosen", "rejected"), found, strict=False):
        if not 0 <= rate <= 1:
            raise DataError(f"win_rate_{side}: expected a share from 0 to 1, found the number {rate:g}", where=where)
    return found


def list_scores(values: Any, where: str, column: str, count: int) -> tuple[float, ...]:
    """One score per answer of a list. column: scores, or ranks (1 is the best), whose scores are the ranks negated."""
    if not isinstance(values, (list, tuple)):
        raise DataError(f"{column}: expected a list of numbers, found {describe(values)}", where=where)
    if len(values) != count:
        raise DataError(f"{column}: expected one for each of {count} answers, found {len(values)}", where=where)
    for i, value in enumerate(values):
        if isinstance(value, str):
            raise DataError(f"{column}[{i}]: expected a number, found {describe(value)}", where=where)
    found = tuple(number(value, where, f"{column}[{i}]") for i, value in enumerate(values))
    if column == "scores":
        return found
    for i, rank in enumerate(found):
        if rank < 1:
            raise DataError(f"ranks[{i}]: expected a rank from 1, the best, found the number {rank:g}", where=where)
    return tuple(-rank for rank in found)
