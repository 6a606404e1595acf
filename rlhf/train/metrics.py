"""Sums that become means over all ranks, and the places where they are written down.

`metrics.jsonl` is the truth; TensorBoard and Weights & Biases are extras that may fail without stopping the run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from rlhf.engine import dist
from rlhf.recipe.schema import LogBlock
from rlhf.run.commit import append_jsonl
from rlhf.train import trackers


class Meter:
    """Collects (sum, denominator) pairs of one optimizer step; `reduce` adds them up over ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._denominators: dict[str, str] = {}
        self._counts: dict[str, float] = {}

    def add(self, metrics: dict[str, tuple[Tensor, str]]) -> None:
        """Add the sums of one micro-batch."""
        for name, (total, denominator) in metrics.items():
            value = total.detach().double().cpu()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._denominators[name] = denominator

    def add_counts(self, counts: dict[str, float]) -> None:
        """Add global counts."""
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + count

    def reduce(self) -> Totals:
        """Sums over all ranks with their denominators; each rank must have collected the same names."""
        sums = dist.sum_over_ranks(self._sums)
        return Totals({name: (total, self._counts[self._denominators[name]]) for name, total in sums.items()})

    def means(self) -> dict[str, float]:
        """Every metric over all ranks."""
        return self.reduce().means()


@dataclass
class Totals:
    """name -> (sum, denominator) over all ranks."""

    values: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, other: Totals) -> None:
        """Add the totals of another optimizer step."""
        for name, (total, count) in other.values.items():
            before = self.values.get(name, (0.0, 0.0))
            self.values[name] = (before[0] + total, before[1] + count)

    def means(self) -> dict[str, float]:
        """Every sum over its denominator; what was counted nowhere has no mean."""
        return {name: total / count for name, (total, count) in self.values.items() if count}


class MetricsLog:
    """Writes rows of metrics on rank 0. first_step: finished steps."""

    def __init__(self, path: Path, log: LogBlock, run_name: str, first_step: int) -> None:
        self._path = path
        self._trackers = trackers.trackers(log, path.parent, run_name, first_step) if dist.is_main() else []

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row; `step` counts finished steps, so the first row is 1."""
        if not dist.is_main():
            return
        append_jsonl(self._path, {"step": step, "time": round(time.time(), 3), **metrics})
        for tracker in self._trackers:
            tracker.write(step, metrics)

    def close(self) -> None:
        """Give the trackers a bounded time for what they have not written yet."""
        trackers.close(self._trackers)
