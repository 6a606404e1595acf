"""docs/reliability.md, from what a run has counted."""

from __future__ import annotations

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

from rlhf.run.commit import write_atomic
from scripts.reliability.sheet import ROWS


@dataclass(frozen=True)
class Result:
    """What one row has seen."""

    id: str
    tried: int
    violations: list[str]
    remarks: list[str]
    seconds: float

    def write(self, file: Path) -> None:
        """Keep it."""
        write_atomic(file, json.dumps(vars(self)))

    @classmethod
    def read(cls, file: Path) -> Result | None:
        """What was kept, if anything."""
        return cls(**json.loads(file.read_text())) if file.exists() else None

    def line(self) -> str:
        """For the screen."""
        return f"{self.id:4} {self.tried:6,} tried {len(self.violations):3} violations {self.seconds:7.0f} s"


def page(results: list[Result], seconds: float | None) -> str:
    """The whole page. seconds: that all of it took; None where rows were run in several calls."""
    violations = sum(len(result.violations) for result in results)
    tried = sum(result.tried for result in results)
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    duration = (
        f"rows of {sum(result.seconds for result in results) / 60:.0f} minutes, run in several calls"
        if seconds is None
        else f"in {seconds / 60:.0f} minutes"
    )
    lines = [
        "# Reliability",
        "",
        "What was done to runs to lose or falsify something, and how often they let it happen. `make reliability` does",
        "all of it again and writes this page; every number is counted by that run.",
        "",
        f"{tried:,} tries, **{violations} violations**, {duration} ({time.strftime('%Y-%m-%d')}, {machine}).",
        "",
        "| | what is done | what must come out | asked | tried | violations | s |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        row = ROWS[result.id]
        marks = f" ({'; '.join(result.remarks)})" if result.remarks else ""
        lines.append(
            f"| {row.id} | {row.title}{marks} | {row.expected} | {row.asked} | {result.tried:,}"
            f" | {len(result.violations)} | {result.seconds:.0f} |"
        )
    broken = [f"- {result.id}: {violation}" for result in results for violation in result.violations]
    return "\n".join([*lines, *(["", "## Violations", "", *broken] if broken else []), ""])
