"""Steps of several sides in turns, each with its clocks; memory of a step; and how much of the machine others took."""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

PARTS = ("generate", "score", "train")


@dataclass(frozen=True)
class Work:
    """What one step did."""

    tokens: int  # real tokens of the batch; in generation, sampled ones
    flops: float  # useful ones
    loss: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # wall, of every part of PARTS that the side can tell apart


@dataclass(frozen=True)
class Sample:
    """One measured step."""

    work: Work
    wall: float
    cpu: float  # of this process, all threads

    def seconds(self, clock: str) -> float:
        """By the clock `wall` or `cpu`."""
        return self.wall if clock == "wall" else self.cpu


Step = Callable[[int], Work]


def alternate(sides: Mapping[str, Step], rounds: int, warmup: int = 1) -> dict[str, list[Sample]]:
    """A B A B ...: in every round each side does the step of the round's number once. Warm-up rounds are dropped.

    So a disturbance that lasts for longer than a step meets all sides, and ratios are taken within a round.
    """
    found: dict[str, list[Sample]] = {name: [] for name in sides}
    for number in range(warmup + rounds):
        for name, step in sides.items():
            gc.collect()
            finish_work()
            wall, cpu = time.perf_counter(), time.process_time()
            work = step(number)
            finish_work()
            sample = Sample(work, time.perf_counter() - wall, time.process_time() - cpu)
            if number >= warmup:
                found[name].append(sample)
    return found


def finish_work() -> None:
    """Wait for the device: its work is queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rate(samples: Sequence[Sample], clock: str) -> float:
    """Median of tokens per second."""
    return statistics.median(sample.work.tokens / sample.seconds(clock) for sample in samples)


def flop_rate(samples: Sequence[Sample], clock: str) -> float:
    """Median of useful operations per second."""
    return statistics.median(sample.work.flops / sample.seconds(clock) for sample in samples)


@dataclass(frozen=True)
class Ratio:
    """How many times as fast one side is as another, over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, mine: Sequence[Sample], other: Sequence[Sample], clock: str) -> Ratio:
        """Tokens per second of `mine` over those of `other`, taken within each round."""
        ratios = [
            (a.work.tokens / a.seconds(clock)) / (b.work.tokens / b.seconds(clock))
            for a, b in zip(mine, other, strict=True)
        ]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


# --- memory ----------------------------------------------------------------------------------------------------------


def peak_memory(step: Callable[[], object]) -> float | None:
    """Bytes that a step needs at its peak beside what is held between steps. None where the system does not tell."""
    gc.collect()
    finish_work()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - held)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide what the step takes
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        held = _status("VmRSS")
        step()
        return _status("VmHWM") - held
    except (OSError, AttributeError):
        return None


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return float(line.split()[1]) * 1024


# --- disturbance -----------------------------------------------------------------------------------------------------


class Disturbance:
    """The share of this machine's processor time that other processes took while something was measured."""

    def __init__(self) -> None:
        self._before = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, softirq, steal = ticks
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy, time.process_time(), time.perf_counter()

    def share(self, ranks: int = 1) -> float | None:
        """Since this was made; 0.05 is quiet. ranks: processes that work alike.

        None where the system does not tell, or counts in steps that are too coarse for so short a time.
        """
        now = self._now()
        if now is None or self._before is None:
            return None
        busy, own, wall = (after - before for after, before in zip(now, self._before, strict=True))
        if wall < 50 / os.sysconf("SC_CLK_TCK"):
            return None
        return max(0.0, busy - ranks * own) / (wall * (os.cpu_count() or 1))
