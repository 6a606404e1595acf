"""The one training loop. A stage says how to collect a batch and which objectives to minimise; the rest is the same.

A "step" is one collected batch: an optimizer step of an offline stage, a rollout with all its minibatches of an online
one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch

from rlhf.algo.schedules import SCHEDULES
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import ResourceError, StoppedError, UserError, WorkerLostError
from rlhf.recipe.schema import OptimBlock
from rlhf.train import memory
from rlhf.train.guards import check_counts
from rlhf.train.metrics import Meter, MetricsLog, Totals
from rlhf.train.objectives import Objective
from rlhf.train.pool import Budget, Micro, Pool
from rlhf.train.progress import Progress
from rlhf.train.signals import StopRequest

logger = logging.getLogger("rlhf.train")


@dataclass(frozen=True)
class Collected:
    """Every minibatch of a step, the metrics of collecting it, and how many tokens it took."""

    minibatches: list[Pool]
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0  # real tokens over all ranks


class Collector(Protocol):
    """How a stage feeds the loop."""

    def collect(self, step: int) -> Collected:
        """The batch of a step: a function of the seed and the step (and, online, of the policy)."""

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        """Look at the first minibatch's metrics of a step; raise NumericsError where an invariant is broken."""

    def learned(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
        """Look at a finished step's metrics. Returns further ones, and a reason to end the run, if any."""


class Average(Protocol):
    """A running average of an engine's weights."""

    engine: Engine

    def update(self) -> None:
        """Take in the weights after an optimizer step."""


@dataclass
class Stage:
    """Everything `fit` needs. The callbacks get the number of finished steps."""

    steps: int
    updates_per_step: int
    budget: Budget
    collector: Collector
    objectives: list[Objective]  # those of one engine stand together: their gradients add up to one update
    key_metric: str
    log_every: int
    checkpoint_every: int
    evaluate: Callable[[int], dict[str, float]]
    is_eval_step: Callable[[int], bool]
    sample: Callable[[int], None]
    is_sample_step: Callable[[int], bool]
    checkpoint: Callable[[int], None]
    settle: Callable[[], None]  # waits until the last checkpoint is on the disk
    report: Callable[[int, str, float | None], None]
    policy_starts: int = 0  # steps before which only the critic learns
    target_kl: float | None = None  # ends the updates of a step once the policy has moved this far
    measures_move: bool = False  # look once more how far the policy has moved, after its last update
    averages: list[Average] = field(default_factory=list)


def fit(stage: Stage, first_step: int, log: MetricsLog, progress: Progress, stop: StopRequest) -> dict[str, float]:
    """Run steps [first_step, stage.steps). Returns the last metrics. Raises StoppedError after a requested stop."""
    last: dict[str, float] = {}
    if first_step == 0:
        stage.sample(0)
    for step in range(first_step, stage.steps):
        started = time.monotonic()
        collected = collect(stage, step, first_step)
        with memory.phase("the update", "train.micro_tokens"):
            metrics = {**update(stage, step, collected), **collected.metrics}
        seconds = time.monotonic() - started
        metrics["speed/tokens_per_second"] = collected.tokens / seconds
        metrics["speed/seconds"] = seconds
        done = step + 1
        if stage.budget.is_open and collected.minibatches:
            memory.settle(stage.budget, stage.objectives, collected.minibatches[0])
        if stage.is_eval_step(done):
            metrics.update(stage.evaluate(done))
        further, alarm = stage.collector.learned(step, metrics)
        last.update(metrics | further)
        if done % stage.log_every == 0 or done == stage.steps or alarm:
            log.write(done, metrics | further)
        progress.advance(done, last)
        stage.report(done, stage.key_metric, last.get(stage.key_metric))
        if stage.is_sample_step(done):
            stage.sample(done)
        stopping = dist.any_rank(stop.requested) and done < stage.steps
        due = stage.checkpoint_every and done % stage.checkpoint_every == 0 and done < stage.steps
        if stopping or due or alarm:
            stage.checkpoint(done)
        if stopping or alarm:
            stage.settle()
        if alarm:
            raise alarm
        if stopping:
            raise StoppedError(
                f"stopped on request after step {done} of {stage.steps}", fix="The same command resumes."
            )
    stage.settle()
    return last


def collect(stage: Stage, step: int, first_step: int) -> Collected:
    """The batch of a step. Where it fails for a reason that all ranks know, what was learned so far is kept."""
    try:
        return stage.collector.collect(step)
    except UserError as error:
        # Memory runs out on one rank, and a lost one is gone: the others are elsewhere; a checkpoint takes them all.
        is_known_to_all = dist.world_size() == 1 or not isinstance(error, (ResourceError, WorkerLostError))
        if step > first_step and is_known_to_all:
            stage.checkpoint(step)
            stage.settle()
        raise


def update(stage: Stage, step: int, collected: Collected) -> dict[str, float]:
    """All optimizer steps of one collected batch. Returns their metrics, averaged over the batch."""
    objectives = [o for o in stage.objectives if step >= stage.policy_starts or o.group == "value"]
    totals = {objective.group: Totals() for objective in objectives}
    norms: dict[str, list[float]] = {objective.group: [] for objective in objectives}
    metrics: dict[str, float] = {}
    updates, moved = 0, 0.0
    for index, minibatch in enumerate(collected.minibatches):
        for engine, group in by_engine(objectives):
            for objective in group:
                found = push(stage, step, index, objective, minibatch)
                totals[objective.group].add(found)
                if index == 0 and objective is stage.objectives[0]:
                    stage.collector.guard(step, found.means())
                updates += objective.group == "policy"
                if "kl_old" in found.values:
                    metrics["policy/kl_moved"] = moved = found.means()["kl_old"]
            leader = group[0]
            rate = learning_rate(leader.optim, *update_number(stage, step, index, leader.group))
            norms[leader.group].append(engine.step(rate))
            metrics[f"{leader.group}/lr"] = rate
            follow(stage, engine)
        if stage.target_kl is not None and moved > stage.target_kl:
            break
    if stage.measures_move and updates:
        metrics["policy/kl_moved"] = measured(stage, collected.minibatches[updates - 1])["kl_old"]
    for name, total in totals.items():
        metrics.update({key if "/" in key else f"{name}/{key}": value for key, value in total.means().items()})
        if norms[name]:
            metrics[f"{name}/grad_norm"] = sum(norms[name]) / len(norms[name])
    if stage.target_kl is not None and updates:
        metrics["policy/updates"] = updates
    return metrics


def follow(stage: Stage, engine: Engine) -> None:
    """Let the averages of an engine's weights take in its step."""
    for average in stage.averages:
        if average.engine is engine:
            average.update()


def measured(stage: Stage, minibatch: Pool) -> dict[str, float]:
    """The policy's metrics on a minibatch as it stands after its last update, over all ranks."""
    policy, meter = stage.objectives[0], Meter()
    micros = list(minibatch.of(policy.group).cut(stage.budget))
    with policy.engine.evaluating():
        meter.add_counts(counted(policy, micros))
        for micro in micros:
            meter.add(micro.weighed(policy.loss(micro.rows)).metrics)
    return meter.means()


def counted(objective: Objective, micros: list[Micro]) -> dict[str, float]:
    """An objective's denominators over all micro-batches of all ranks."""
    counts = [micro.counted(objective.counts(micro.rows)) for micro in micros]
    return dist.sum_over_ranks({name: torch.stack([each[name] for each in counts]).sum() for name in counts[0]})


def by_engine(objectives: list[Objective]) -> list[tuple[Engine, list[Objective]]]:
    """Objectives that stand together and share an engine, as one update each."""
    groups = [list(group) for _, group in groupby(objectives, key=lambda objective: id(objective.engine))]
    return [(group[0].engine, group) for group in groups]


def push(stage: Stage, step: int, index: int, objective: Objective, minibatch: Pool) -> Totals:
    """Add an objective's gradient of a whole minibatch. Returns its metrics over all ranks."""
    meter = Meter()
    micros = list(minibatch.of(objective.group).cut(stage.budget))  # equally many on every rank
    counts = counted(objective, micros)
    may_be_empty = objective.optional
    check_counts({name: count for name, count in counts.items() if name not in may_be_empty}, step, index)
    meter.add_counts(counts)
    divisors = {name: count or 1.0 for name, count in counts.items()}  # the sum over nothing is 0
    for micro in micros:
        loss = micro.weighed(objective.loss(micro.rows))
        objective.engine.backward(loss, divisors)
        meter.add(loss.metrics)
    return meter.reduce()


def update_number(stage: Stage, step: int, index: int, group: str) -> tuple[int, int]:
    """(number of this optimizer step, how many there are) for a group of objectives; the policy may start late."""
    start = 0 if group == "value" else stage.policy_starts
    return (step - start) * stage.updates_per_step + index, (stage.steps - start) * stage.updates_per_step


def learning_rate(optim: OptimBlock, update_number: int, updates: int) -> float:
    """The learning rate of an optimizer step: a pure function of its number."""
    schedule = SCHEDULES[optim.schedule].function
    return optim.lr * schedule(update_number, updates, warmup=optim.warmup, min_lr_ratio=optim.min_lr_ratio)
