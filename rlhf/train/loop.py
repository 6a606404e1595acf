"""The one training loop. A stage says how to collect a batch and which objectives to minimise; the rest is the same.

A "step" is one collected batch: an optimizer step of an offline stage, a rollout with all its minibatches of an online
one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from rlhf.algo.schedules import SCHEDULES
from rlhf.batch import Rows
from rlhf.engine import dist
from rlhf.errors import StoppedError
from rlhf.recipe.schema import OptimBlock
from rlhf.train.guards import check_counts
from rlhf.train.metrics import Meter, MetricsLog
from rlhf.train.objectives import Objective
from rlhf.train.progress import Progress
from rlhf.train.signals import StopRequest

logger = logging.getLogger("rlhf.train")


@dataclass(frozen=True)
class Collected:
    """This rank's share of every minibatch of a step, the metrics of collecting it, and how many tokens it took."""

    minibatches: list[Rows]
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0  # real tokens over all ranks


class Collector(Protocol):
    """How a stage feeds the loop."""

    def collect(self, step: int) -> Collected:
        """The batch of a step: a function of the seed and the step (and, online, of the policy)."""

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        """Look at the first minibatch's metrics of a step; raise NumericsError where an invariant is broken."""


@dataclass
class Stage:
    """Everything `fit` needs. The callbacks get the number of finished steps."""

    steps: int
    updates_per_step: int
    micro_batch: int
    collector: Collector
    objectives: list[Objective]
    key_metric: str
    log_every: int
    checkpoint_every: int
    evaluate: Callable[[int], dict[str, float]]
    is_eval_step: Callable[[int], bool]
    sample: Callable[[int], None]
    is_sample_step: Callable[[int], bool]
    checkpoint: Callable[[int], None]
    report: Callable[[int, str, float | None], None]


def fit(stage: Stage, first_step: int, log: MetricsLog, progress: Progress, stop: StopRequest) -> dict[str, float]:
    """Run steps [first_step, stage.steps). Returns the last metrics. Raises StoppedError after a requested stop."""
    last: dict[str, float] = {}
    if first_step == 0:
        stage.sample(0)
    for step in range(first_step, stage.steps):
        started = time.monotonic()
        collected = stage.collector.collect(step)
        metrics = {**update(stage, step, collected), **collected.metrics}
        seconds = time.monotonic() - started
        metrics["speed/tokens_per_second"] = collected.tokens / seconds
        metrics["speed/seconds"] = seconds
        done = step + 1
        if stage.is_eval_step(done):
            metrics.update(stage.evaluate(done))
        last.update(metrics)
        if done % stage.log_every == 0 or done == stage.steps:
            log.write(done, metrics)
        progress.advance(done, last)
        stage.report(done, stage.key_metric, last.get(stage.key_metric))
        if stage.is_sample_step(done):
            stage.sample(done)
        stopping = dist.any_rank(stop.requested) and done < stage.steps
        if stopping or (stage.checkpoint_every and done % stage.checkpoint_every == 0 and done < stage.steps):
            stage.checkpoint(done)
        if stopping:
            raise StoppedError(
                f"stopped on request after step {done} of {stage.steps}", fix="The same command resumes."
            )
    return last


def update(stage: Stage, step: int, collected: Collected) -> dict[str, float]:
    """All optimizer steps of one collected batch. Returns their metrics, averaged over the batch."""
    meters = {objective.group: Meter() for objective in stage.objectives}
    norms: dict[str, list[float]] = {objective.group: [] for objective in stage.objectives}
    metrics: dict[str, float] = {}
    for index, minibatch in enumerate(collected.minibatches):
        for objective in stage.objectives:
            meter = meters[objective.group]
            counts = dist.sum_over_ranks(objective.counts(minibatch))
            check_counts(counts, step, index)
            meter.add_counts(counts)
            for micro in minibatch.split(stage.micro_batch):  # equally many on every rank
                loss = objective.loss(micro)
                objective.engine.backward(loss, counts)
                meter.add(loss.metrics)
            if index == 0 and objective is stage.objectives[0]:
                stage.collector.guard(step, meter.means())
            rate = learning_rate(
                objective.optim, step * stage.updates_per_step + index, stage.steps * stage.updates_per_step
            )
            norms[objective.group].append(objective.engine.step(rate))
            metrics[f"{objective.group}/lr"] = rate
    for group, meter in meters.items():
        metrics.update({f"{group}/{name}": value for name, value in meter.means().items()})
        metrics[f"{group}/grad_norm"] = sum(norms[group]) / len(norms[group])
    return metrics


def learning_rate(optim: OptimBlock, update_number: int, updates: int) -> float:
    """The learning rate of an optimizer step: a pure function of its number."""
    schedule = SCHEDULES[optim.schedule].function
    return optim.lr * schedule(update_number, updates, warmup=optim.warmup, min_lr_ratio=optim.min_lr_ratio)
