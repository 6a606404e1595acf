"""Feeding the loop from a fixed dataset: SFT, reward model and preference stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rlhf.batch import Rows
from rlhf.data import order
from rlhf.engine import dist
from rlhf.errors import UserError
from rlhf.train.loop import Collected
from rlhf.train.metrics import Meter
from rlhf.train.objectives import Objective


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows: `batch(indices)` collates them, `lengths[i]` is what row i costs in tokens."""

    lengths: list[int]
    batch: Callable[[list[int]], Rows]

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class SupervisedCollector:
    """Step k is the k-th slice of a seeded order; every rank takes an equal share of it."""

    data: Dataset
    batch_size: int
    seed: int
    check: Callable[[int, dict[str, float]], None]

    def collect(self, step: int) -> Collected:
        """This rank's rows of the step's global batch."""
        rows = order.rows(len(self.data), self.batch_size, step, self.seed)
        tokens = sum(self.data.lengths[row] for row in rows)
        mine = balanced_share(rows, self.data.lengths, dist.rank(), dist.world_size())
        return Collected([self.data.batch(mine)], tokens=tokens)

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        """Hand the first minibatch's metrics to the stage's invariant check."""
        self.check(step, metrics)

    def learned(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
        """Nothing is adapted between steps."""
        return {}, None


def balanced_share(rows: list[int], lengths: list[int], rank: int, world: int) -> list[int]:
    """A rank's rows: dealt out longest first, so that ranks get equal work and memory errors show at once."""
    ordered = sorted(rows, key=lambda row: -lengths[row])
    return ordered[rank::world]


def even_batches(size: int, micro_batch: int, rank: int, world: int) -> list[tuple[list[int], bool]]:
    """A rank's micro-batches of range(size), equally many on every rank; False marks a mere stand-in."""
    mine = list(range(size))[rank::world]
    calls = math.ceil(math.ceil(size / world) / micro_batch)
    batches = [mine[i * micro_batch : (i + 1) * micro_batch] for i in range(calls)]
    return [(batch, True) if batch else ([0], False) for batch in batches]


def evaluate(objective: Objective, data: Dataset, micro_batch: int) -> dict[str, float]:
    """Metrics of an objective on held-out rows, `eval/...`, over all ranks."""
    meter = Meter()
    with objective.engine.evaluating():
        for rows, is_real in even_batches(len(data), micro_batch, dist.rank(), dist.world_size()):
            batch = data.batch(rows)
            weight = float(is_real)
            meter.add({name: (value * weight, unit) for name, (value, unit) in objective.loss(batch).metrics.items()})
            counts = {name: torch.as_tensor(count * weight) for name, count in objective.counts(batch).items()}
            meter.add_counts(dist.sum_over_ranks(counts))
    return {f"eval/{name}": value for name, value in meter.means().items()}
