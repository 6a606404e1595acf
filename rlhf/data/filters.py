"""`data.filter` and `data.reweight`: which training rows are left out, and how much each of the others counts.

Held-out rows stay as they are: results with different filters are compared on the same rows.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlhf.data.formats import Kind, Record
from rlhf.data.keys import RowKey, row_key
from rlhf.data.numbers import number
from rlhf.data.report import SourceReport
from rlhf.errors import DataError
from rlhf.recipe.schema import DataBlock

logger = logging.getLogger("rlhf.data")

# Reasons for which a row is dropped and counted.
LOW_MARGIN = "score margin below filter.min_margin"
HIGH_MARGIN = "score margin above filter.max_margin"
LENGTH_RATIO = "answers over filter.max_length_ratio"
LENGTH_DIFFERENCE = "answers over filter.max_length_difference"
SAME_WORDS = "answers differ in white space only"
CONFLICT = "the same two answers are ranked both ways"
DUPLICATE = "equal to an earlier row"
HELD_OUT_ROW = "row is held out too"
HELD_OUT_PROMPT = "prompt is held out too"
MARGIN_COLUMNS = (("score_chosen", "score_rejected"), ("score_margin",), ("margin",))


def needs_margin(data: DataBlock) -> bool:
    """Whether every training row must have a score margin."""
    return data.reweight is not None or data.filter.min_margin is not None or data.filter.max_margin is not None


def find_margin(record: Record) -> float | None:
    """score_chosen - score_rejected of a row, else its score_margin, else its margin; None where it has none."""
    for columns in MARGIN_COLUMNS:
        if all(column in record.fields and record.fields[column] is not None for column in columns):
            numbers = [number(record.fields[column], record.where, column) for column in columns]
            return numbers[0] - numbers[1] if len(numbers) == 2 else numbers[0]
    return None


def score_margin(record: Record) -> float:
    """The same of a row that must have one."""
    margin = find_margin(record)
    if margin is None:
        raise _no_margin(record.where)
    return margin


def _no_margin(where: str) -> DataError:
    return DataError(
        "expected a score margin, found none of the columns score_chosen and score_rejected, score_margin, margin",
        where=where,
        fix="Add one of them to every row, or remove filter.min_margin, filter.max_margin and reweight.",
    )


class RowFilter:
    """Remembers of every record what the recipe's filters ask for, and applies them once all rows are known.

    Own properties of a row are looked at first; then conflicts, rows that are held out too, and repetitions. What was
    left out by an earlier reason takes no part in the later ones.
    """

    def __init__(self, data: DataBlock, kind: Kind) -> None:
        self._data, self._filter, self._kind = data, data.filter, kind
        chosen = data.filter
        self._wants_keys = (
            chosen.drop_equal or chosen.drop_conflicts or chosen.drop_duplicates or chosen.drop_eval_overlap != "none"
        )
        self._keys: dict[int, RowKey] = {}
        self._margins: dict[int, float] = {}
        self._unmeasured: dict[int, str] = {}  # row -> place

    def see(self, record: Record, row: int, fate: tuple[str, tuple[str, ...]]) -> None:
        """Remember a record that was not dropped."""
        if fate[0]:
            return
        if self._wants_keys:
            self._keys[row] = row_key(record, self._kind)
        if needs_margin(self._data):
            margin = find_margin(record)
            if margin is None:
                self._unmeasured[row] = record.where
            else:
                self._margins[row] = margin

    def keep(
        self, parts: Sequence[list[Any]], held_out: Sequence[Any], reports: Sequence[SourceReport]
    ) -> list[list[Any]]:
        """The training examples of every source that stay; the others are counted in its report."""
        parts = self._drop(parts, reports, self._own_reason)
        if self._filter.drop_conflicts:
            ranked_both_ways = self._conflicts(parts)
            parts = self._drop(
                parts, reports, lambda e: CONFLICT if self._keys[e.row].answers in ranked_both_ways else ""
            )
        if self._filter.drop_eval_overlap == "prompts":
            prompts = {self._keys[example.row].prompt for example in held_out} - {b""}
            parts = self._drop(parts, reports, lambda e: HELD_OUT_PROMPT if self._keys[e.row].prompt in prompts else "")
        if self._filter.drop_eval_overlap != "none":  # texts have no prompt
            rows = {self._keys[example.row].answers for example in held_out}
            parts = self._drop(parts, reports, lambda e: HELD_OUT_ROW if self._keys[e.row].answers in rows else "")
        if self._filter.drop_duplicates:
            seen: set[RowKey] = set()
            parts = self._drop(parts, reports, lambda e: DUPLICATE if _is_in(self._keys[e.row], seen) else "")
        if not any(parts):
            raise DataError(
                "expected rows to learn from, found that the filter leaves none",
                where=f"{self._data.key}.filter",
                fix=f"Left out: {_told(reports)}. Loosen it.",
            )
        return list(parts)

    def _drop(self, parts: Sequence[list[Any]], reports: Sequence[SourceReport], reason: Any) -> list[list[Any]]:
        """The examples for which `reason` says nothing."""
        kept: list[list[Any]] = []
        for part, report in zip(parts, reports, strict=False):  # held-out sources have reports too
            reasons = [reason(example) for example in part]
            report.dropped.update(filter(None, reasons))
            kept.append([example for example, why in zip(part, reasons, strict=True) if not why])
            report.kept -= len(part) - len(kept[-1])
        return kept

    def _own_reason(self, example: Any) -> str:
        """Why a pair is left out for what it is itself."""
        chosen, row = self._filter, example.row
        if row in self._unmeasured:
            raise _no_margin(self._unmeasured[row])
        if chosen.min_margin is not None and self._margins[row] < chosen.min_margin:
            return LOW_MARGIN
        if chosen.max_margin is not None and self._margins[row] > chosen.max_margin:
            return HIGH_MARGIN
        if chosen.max_length_ratio is not None or chosen.max_length_difference is not None:
            shorter, longer = sorted((len(example.chosen_ids), len(example.rejected_ids)))
            if chosen.max_length_ratio is not None and longer > chosen.max_length_ratio * shorter:
                return LENGTH_RATIO
            if chosen.max_length_difference is not None and longer - shorter > chosen.max_length_difference:
                return LENGTH_DIFFERENCE
        return SAME_WORDS if chosen.drop_equal and len(set(self._keys[row].sides)) == 1 else ""

    def _conflicts(self, parts: Sequence[list[Any]]) -> set[tuple[bytes, tuple[bytes, ...]]]:
        """Two answers to a prompt, in any order, that are found in both orders."""
        orders: dict[tuple[bytes, tuple[bytes, ...]], set[tuple[bytes, ...]]] = defaultdict(set)
        for part in parts:
            for example in part:
                key = self._keys[example.row]
                orders[key.answers].add(key.sides)
        return {answers for answers, found in orders.items() if len(found) > 1}

    def weigh(self, train: list[Any]) -> list[Any]:
        """The training pairs with their weights: sigmoid(margin / temperature) over its mean."""
        if self._data.reweight is None:
            return train
        temperature = self._data.reweight.temperature
        raw = [_sigmoid(self._margins[example.row] / temperature) for example in train]
        mean = math.fsum(raw) / len(raw)
        if mean < 1e-30:
            raise DataError(
                f"expected score margins of the size of the temperature, found none above {temperature:g} x -69",
                where=f"{self._data.key}.reweight.temperature",
                fix="Raise it, or leave such rows out with filter.min_margin.",
            )
        weights = [value / mean for value in raw]
        effective = math.fsum(weights) ** 2 / math.fsum(weight * weight for weight in weights)
        logger.info(
            "pairs weigh %.3g to %.3g by their score margins: as good as %.0f of %d pairs that weigh alike",
            min(weights),
            max(weights),
            effective,
            len(weights),
        )
        return [replace(example, weight=weight) for example, weight in zip(train, weights, strict=True)]


def _is_in(key: RowKey, seen: set[RowKey]) -> bool:
    """Whether a key was seen before; it is now."""
    if key in seen:
        return True
    seen.add(key)
    return False


def _told(reports: Sequence[SourceReport]) -> str:
    return ", ".join(f"{count} {reason}" for report in reports for reason, count in report.dropped.most_common())


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
