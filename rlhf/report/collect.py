"""Everything that the page shows, read from the files of a run directory. What is missing or damaged is never fatal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf.errors import CheckpointError, UserError
from rlhf.run.commit import read_json
from rlhf.run.lineage import graph
from rlhf.run.rundir import RunDir
from rlhf.run.stage import StageDir, StageSummary

Found = TypeVar("Found")
Series = list[tuple[int, float]]
_LOG_LINE = re.compile(r"\S+ \S+ (WARNING|ERROR|CRITICAL) [\w.]+: (.*)")
_LOG_TAIL = 60  # lines
_TOO_LARGE = 1e30  # as good as infinite, and more than a chart can be scaled to
_MOST_WARNINGS = 30


@dataclass(frozen=True)
class SampleGroup:
    """The answers to one prompt, of the first step and the last."""

    prompt: str
    first: dict[str, Any]
    last: dict[str, Any]


@dataclass(frozen=True)
class StagePage:
    """What one stage left behind."""

    summary: StageSummary
    series: dict[str, Series]  # metric -> (step, value), finite values only
    gaps: dict[str, list[int]]  # metric -> steps whose value was not finite, or beyond all measure
    samples: list[SampleGroup]
    provenance: dict[str, Any]
    manifest: dict[str, Any]
    recipe: str
    resolved: str
    log_tail: str
    warnings: list[str]  # of the log, each once
    problems: list[str]  # files that could not be read


@dataclass(frozen=True)
class RunPage:
    """A run directory."""

    name: str
    path: str
    stages: list[StagePage]  # in the order in which they were started
    parents: dict[str, list[str]]
    demo: dict[str, Any] | None
    implicit: dict[str, Any] | None
    problems: list[str]


def read_run(root: Path) -> RunPage:
    """Read a run directory. Raises only where there is none."""
    if not root.is_dir():
        found = "a file" if root.exists() else "nothing"
        raise CheckpointError(f"expected a run directory, found {found}", where=str(root))
    run = RunDir(root)
    problems: list[str] = []
    stages = [read_stage(run.stage(summary.name), summary) for summary in run.describe()]
    demo, implicit = (_judgement(root / "report" / name, problems) for name in ("demo.json", "implicit.json"))
    parents = graph([root / stage.summary.name for stage in stages])
    return RunPage(root.resolve().name, str(root), stages, parents, demo, implicit, problems)


def _judgement(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """What `rlhf eval` has written; None where it was not asked."""
    return _attempt(lambda: read_json(path), None, problems) if path.exists() else None


def read_stage(folder: StageDir, summary: StageSummary) -> StagePage:
    """Read a stage folder, whatever state it is in."""
    problems: list[str] = []
    rows = _rows(folder.metrics, problems)
    samples = _rows(folder.samples, problems)
    series, gaps = split_metrics(rows)
    log = _text(folder.log, problems)
    return StagePage(
        summary=summary,
        series=series,
        gaps=gaps,
        samples=first_and_last(samples),
        provenance=_json(folder.provenance, problems),
        manifest=_json(folder.manifest, problems),
        recipe=_text(folder.recipe, problems),
        resolved=_text(folder.resolved, problems),
        log_tail="\n".join(log.splitlines()[-_LOG_TAIL:]),
        warnings=log_warnings(log),
        problems=problems,
    )


def split_metrics(rows: list[dict[str, Any]]) -> tuple[dict[str, Series], dict[str, list[int]]]:
    """Curves by metric, and the steps at which a metric was not finite (null in the file) or so large."""
    series: dict[str, Series] = {}
    gaps: dict[str, list[int]] = {}
    for row in rows:
        step = row.get("step")
        if not _is_number(step):
            continue
        for name, value in row.items():
            if name in ("step", "time"):
                continue
            if _is_number(value) and abs(value) < _TOO_LARGE:
                series.setdefault(name, []).append((int(step), float(value)))
            elif value is None or _is_number(value):
                gaps.setdefault(name, []).append(int(step))
    return series, gaps


def first_and_last(rows: list[dict[str, Any]]) -> list[SampleGroup]:
    """Per prompt the sample of the lowest step and of the highest, in the order in which prompts first came."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if {"prompt", "answer"} <= row.keys() and _is_number(row.get("step")):
            groups.setdefault((str(row.get("row")), str(row["prompt"])), []).append(row)
    return [
        SampleGroup(prompt, min(group, key=lambda row: row["step"]), max(group, key=lambda row: row["step"]))
        for (_, prompt), group in groups.items()
    ]


def log_warnings(log: str) -> list[str]:
    """Warnings and errors of a log, each message once with its count, in order of appearance."""
    counts: dict[str, int] = {}
    for line in log.splitlines():
        if match := _LOG_LINE.match(line):
            message = f"{match[1].lower()}: {match[2]}"
            counts[message] = counts[message] + 1 if message in counts else 1
    shown = [message if count == 1 else f"{message} ({count} times)" for message, count in counts.items()]
    more = len(shown) - _MOST_WARNINGS
    return shown[:_MOST_WARNINGS] + ([f"and {more} more in log.txt"] if more > 0 else [])


def pick(record: Any, key: str, kind: type[Found]) -> Found | None:
    """record[key] if it is there and of that kind, else None: files may have been written by hand or cut short."""
    value = record.get(key) if isinstance(record, dict) else None
    return value if isinstance(value, kind) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _attempt(read: Callable[[], Found], empty: Found, problems: list[str]) -> Found:
    try:
        return read()
    except (UserError, OSError) as error:
        problems.append(str(error).splitlines()[0])
        return empty


def _rows(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The rows of a log. Damaged lines are left out and counted: the others may tell what happened."""
    rows, damaged = [], []
    for number, line in enumerate(_text(path, problems).splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            damaged.append(number)
    if damaged:
        problems.append(f"{path}: {len(damaged)} damaged lines left out, the first is line {damaged[0]}")
    return rows


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    return _attempt(lambda: read_json(path), {}, problems) if path.exists() else {}


def _text(path: Path, problems: list[str]) -> str:
    if not path.exists():
        return ""
    return _attempt(lambda: path.read_text(encoding="utf-8", errors="replace"), "", problems)


def as_json(value: Any) -> str:
    """A value as indented text."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
