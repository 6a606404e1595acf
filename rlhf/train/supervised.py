"""Feeding the loop from a fixed dataset: SFT, reward model and preference stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rlhf.batch import Rows
from rlhf.data import order
from rlhf.data.dealing import Unit
from rlhf.engine import dist
from rlhf.errors import UserError
from rlhf.train import memory
from rlhf.train.loop import Collected
from rlhf.train.metrics import Meter
from rlhf.train.objectives import Objective
from rlhf.train.pool import Budget, Pool
from rlhf.train.signals import StopRequest
from rlhf.train.standing import leave_together


@dataclass(frozen=True)
class Dataset:
    """Tokenised rows: `batch(indices)` collates them."""

    lengths: list[int]  # tokens of every row, of all its answers with the prompt in front of each
    costs: list[int]  # the same with the prompt counted once, which is what a model computes
    batch: Callable[[list[int]], Rows]
    records: Sequence[int] = ()  # numbers of the data's records

    def __len__(self) -> int:
        return len(self.lengths)

    def pool(self, rows: Sequence[int] | None = None) -> Pool:
        """These rows, by their places, or all of them."""
        chosen = range(len(self)) if rows is None else rows
        units = [Unit.single(place, self.costs[row]) for place, row in enumerate(chosen)]
        numbers = [self.records[row] for row in chosen] if self.records else ()
        return Pool(units, lambda places: self.batch([chosen[place] for place in places]), records=numbers)


@dataclass(frozen=True)
class SupervisedCollector:
    """Step k is the k-th slice of a seeded order."""

    data: Dataset
    batch_size: int
    seed: int
    check: Callable[[int, dict[str, float]], None]

    def collect(self, step: int) -> Collected:
        """The step's global batch."""
        rows = order.rows(len(self.data), self.batch_size, step, self.seed)
        return Collected([self.data.pool(rows)], tokens=sum(self.data.lengths[row] for row in rows))

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        """Hand the first minibatch's metrics to the stage's invariant check."""
        self.check(step, metrics)

    def learned(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
        """Nothing is adapted between steps."""
        return {}, None


def evaluate(objective: Objective, data: Dataset, budget: Budget, stop: StopRequest) -> dict[str, float]:
    """Metrics of an objective on held-out rows, `eval/...`, over all ranks. A request to stop cuts it off."""
    meter = Meter()
    with memory.phase("evaluation on held-out rows", "train.micro_tokens"), objective.engine.evaluating():
        for micro in data.pool().cut(budget):
            leave_together(stop)
            meter.add(micro.weighed(objective.loss(micro.rows)).metrics)
            meter.add_counts(dist.sum_over_ranks(micro.counted(objective.counts(micro.rows))))
    return {f"eval/{name}": value for name, value in meter.means().items()}
