"""What every rule reward has in common. No torch: scores are plain numbers until all of them are added up.

A rule is `rule(rows, answers, *, <its options>) -> scores`, one score per answer. `rows[i]` is the dataset row that
`answers[i]` answers: its columns and, where known, its number under `row`. None means "unscored", which is not 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.algo.registry import Registry

Row = dict[str, Any]
Column = list[float | None]  # one reward's scores

RULES = Registry("rule reward")


def weighted_sum(parts: Mapping[str, Column], weights: Mapping[str, float]) -> Column:
    """Sum over rewards of weight times score, per answer; None where any of the rewards left the answer unscored.

    parts and weights have the same names. Half a sum is no score: it could not be compared with the other answers'.
    """
    assert parts and set(parts) == set(weights), f"parts {sorted(parts)}, weights {sorted(weights)}"
    columns = [[None if score is None else weights[name] * score for score in scores] for name, scores in parts.items()]
    assert len({len(column) for column in columns}) == 1, f"lengths {[len(column) for column in columns]}"
    total: Column = []
    for scores in zip(*columns, strict=True):
        scored = [score for score in scores if score is not None]
        total.append(sum(scored) if len(scored) == len(scores) else None)
    return total
