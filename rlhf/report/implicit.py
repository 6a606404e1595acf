"""The section about a policy as a reward model: report/implicit.json as a table."""

from __future__ import annotations

from typing import Any

from rlhf.report.collect import pick
from rlhf.report.sections import table
from rlhf.report.tags import Child, Markup, tag

_HEAD = ("data", "pairs", "score", "accuracy", "95 %", "margin", "NLL", "ECE")


def implicit_table(record: dict[str, Any]) -> list[Markup]:
    """Accuracy of every score on every dataset, and which of two scores is right more often."""
    policy, reference = pick(record, "policy", str), pick(record, "reference", str)
    datasets = [each for each in pick(record, "datasets", list) or [] if isinstance(each, dict)]
    rows = [row for each in datasets for row in _rows(each)]
    lines = [tag("div", line, class_="soft") for each in datasets for line in _differences(each)]
    return [
        tag("h2", f"DPO as a reward model: {policy} beside {reference}"),
        tag("div", table(_HEAD, rows, (1, 3, 4, 5, 6, 7)), lines, class_="card scroll"),
    ]


def _rows(dataset: dict[str, Any]) -> list[list[Child]]:
    rows: list[list[Child]] = []
    for name, score in (pick(dataset, "scores", dict) or {}).items():
        accuracy = pick(score, "accuracy", dict)
        first = not rows
        rows.append(
            [
                pick(dataset, "data", str) if first else "",
                str(pick(dataset, "pairs", int)) if first else "",
                str(name),
                _number(accuracy, "mean", "{:.1%}"),
                f"{_number(accuracy, 'low', '{:.1%}')} to {_number(accuracy, 'high', '{:.1%}')}",
                _number(pick(score, "margin", dict), "mean", "{:.3g}"),
                _number(score, "nll", "{:.3f}"),
                _number(score, "ece", "{:.3f}"),
            ]
        )
    return rows


def _differences(dataset: dict[str, Any]) -> list[str]:
    found = [each for each in pick(dataset, "differences", list) or [] if isinstance(each, dict)]
    return [
        f"{pick(dataset, 'data', str)}: {pick(each, 'first', str)} less {pick(each, 'second', str)}: "
        f"{_number(each, 'mean', '{:+.1%}')} (95 % {_number(each, 'low', '{:+.1%}')} to "
        f"{_number(each, 'high', '{:+.1%}')}, McNemar p {_number(each, 'p', '{:.2g}')})"
        for each in found
    ]


def _number(record: dict[str, Any] | None, key: str, shape: str) -> str:
    value = pick(record, key, float)
    return "" if value is None else shape.format(value)
