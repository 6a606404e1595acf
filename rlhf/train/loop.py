"""The one training loop. A stage says how to collect a batch and which objectives to minimise; the rest is the same.

A "step" is one collected batch: an optimizer step of an offline stage, a rollout with all its minibatches of an online
one.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch

from rlhf.algo.schedules import SCHEDULES
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import NotFiniteError, NumericsError, ResourceError, StoppedError, UserError, WorkerLostError
from rlhf.recipe.schema import OptimBlock
from rlhf.train import memory
from rlhf.train.guards import bad_fields, check_counts, check_reached
from rlhf.train.metrics import Meter, MetricsLog, Totals
from rlhf.train.objectives import Objective
from rlhf.train.pool import Budget, Micro, Pool
from rlhf.train.progress import Progress
from rlhf.train.seeding import derive, seed_everything
from rlhf.train.signals import StopRequest
from rlhf.train.skips import ROLLOUT, Skips
from rlhf.train.standing import Standing

logger = logging.getLogger("rlhf.train")
_BAD = "micro-batches with a number that is not finite"


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


def _nothing_found(done: int) -> dict[str, float]:
    return {}


def _never(done: int) -> bool:
    return False


def _nothing_done(*_: object) -> None:
    pass


@dataclass
class Stage:
    """Everything `fit` needs. The callbacks get the number of finished steps; a stage leaves out what it has not."""

    steps: int
    updates_per_step: int
    budget: Budget
    collector: Collector
    objectives: list[Objective]  # those of one engine stand together: their gradients add up to one update
    key_metric: str
    log_every: int
    checkpoint_every: int
    skips: Skips | None  # None where nothing is learned
    seed: int  # of what draws from the global generators in a step: dropout
    evaluate: Callable[[int], dict[str, float]] = _nothing_found
    is_eval_step: Callable[[int], bool] = _never
    sample: Callable[[int], None] = _nothing_done
    is_sample_step: Callable[[int], bool] = _never
    checkpoint: Callable[[int], None] = _nothing_done
    settle: Callable[[], None] = _nothing_done  # waits until the last checkpoint is on the disk
    report: Callable[[int, str, float | None], None] = _nothing_done
    policy_starts: int = 0  # steps before which only the critic learns
    target_kl: float | None = None  # ends the updates of a step once the policy has moved this far
    measures_move: bool = False  # look once more how far the policy has moved, after its last update
    averages: list[Average] = field(default_factory=list)
    checkpoint_minutes: float | None = None  # longest time between two checkpoints
    standing: Standing = field(default_factory=Standing)


def fit(stage: Stage, first_step: int, log: MetricsLog, progress: Progress, stop: StopRequest) -> dict[str, float]:
    """Run steps [first_step, stage.steps). Returns the last metrics. Raises StoppedError after a requested stop."""
    course = Course(stage, log, progress, stop, saved=first_step)
    if first_step == 0:
        stage.sample(0)
    if stage.standing.unfinished is not None:
        conclude(course, first_step, stage.standing.unfinished)
    for step in range(first_step, stage.steps):
        conclude(course, step + 1, learn(course, step))
    stage.settle()
    return course.last


@dataclass
class Course:
    """A run of the loop in this process."""

    stage: Stage
    log: MetricsLog
    progress: Progress
    stop: StopRequest
    saved: int  # finished steps that the newest checkpoint holds
    saved_at: float = field(default_factory=time.monotonic)
    last: dict[str, float] = field(default_factory=dict)  # every metric's last value

    def save(self, done: int, *, wait: bool) -> None:
        """Write a checkpoint, unless it is there. Raises NumericsError where what it would hold is not finite."""
        if done > self.saved:
            self.stage.checkpoint(done)
            self.saved, self.saved_at = done, time.monotonic()
        if wait:
            self.stage.settle()

    def keep(self, done: int) -> None:
        """The same for a run that is about to end with an error of its own; one that is not finite is not written."""
        try:
            self.save(done, wait=True)
        except NumericsError as error:
            logger.warning("no checkpoint of step %d: %s", done, error.what)

    def is_overdue(self) -> bool:
        """Whether the last checkpoint is longer ago than it may be, by this rank's clock."""
        minutes = self.stage.checkpoint_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def stopped(self, done: int) -> StoppedError:
        """What the user is told."""
        return self.stop.error(f" after step {done} of {self.stage.steps}")


def learn(course: Course, step: int) -> dict[str, float]:
    """Collect a batch and learn from it. Returns the step's metrics."""
    stage, started = course.stage, time.monotonic()
    seed_everything(derive(stage.seed, "step", step, dist.rank()))
    collected = collect(course, step)
    with memory.phase("the update", "train.micro_tokens"):
        metrics = {**update(stage, step, collected), **collected.metrics}
    seconds = time.monotonic() - started
    metrics["speed/tokens_per_second"] = collected.tokens / seconds
    metrics["speed/seconds"] = seconds
    is_learned = bool(collected.minibatches) and not (stage.skips is not None and stage.skips.in_a_row)
    if stage.budget.is_open and is_learned:
        memory.settle(stage.budget, stage.objectives, collected.minibatches[0])
    return metrics


def conclude(course: Course, done: int, metrics: dict[str, float]) -> None:
    """Everything of a step that follows its last update. What a request may cut off comes first: it is done again.

    Then the stage adapts, the row is written, and a checkpoint where one is due.
    """
    stage, standing = course.stage, course.stage.standing
    try:
        found = stage.evaluate(done) if stage.is_eval_step(done) else {}
        if stage.is_sample_step(done):
            stage.sample(done)
    except StoppedError:
        standing.unfinished = metrics
        course.save(done, wait=True)
        raise course.stopped(done) from None
    standing.unfinished = None
    metrics = metrics | found
    further, alarm = learned(stage, done - 1, metrics)
    metrics |= further
    course.last.update(metrics)
    if done % stage.log_every == 0 or done == stage.steps or alarm:
        course.log.write(done, metrics)
    is_best = standing.improves(done, metrics)
    course.progress.advance(done, course.last)
    stage.report(done, stage.key_metric, course.last.get(stage.key_metric))
    wish = dist.max_over_ranks(2 if course.stop.requested else int(course.is_overdue()))
    is_last = done == stage.steps
    stopping = wish == 2 and not is_last
    due = is_best or wish == 1 or (stage.checkpoint_every and done % stage.checkpoint_every == 0)
    if alarm:
        course.keep(done)
        raise alarm
    if stopping or (due and not is_last):
        course.save(done, wait=stopping)
    if stopping:
        raise course.stopped(done)


def learned(stage: Stage, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
    """What the collector makes of a finished step, what has been left out, and a reason to end the run, if any."""
    further, reason = stage.collector.learned(step, metrics)
    if stage.skips is None:
        return further, reason
    return {**further, "train/skipped": float(stage.skips.total)}, stage.skips.reason or reason


def collect(course: Course, step: int) -> Collected:
    """The batch of a step. Where it fails for a reason that all ranks know, what was learned so far is kept.

    Nothing is learned from a rollout with a number that is not finite: the step goes by without an update.
    """
    skips = course.stage.skips
    try:
        collected = course.stage.collector.collect(step)
    except NotFiniteError as error:
        if skips is None:
            raise
        skips.add(ROLLOUT, step, None, error.found, error.rows)
        return Collected([])
    except StoppedError:
        course.save(step, wait=True)
        raise course.stopped(step) from None
    except UserError as error:
        # Memory runs out on one rank, and a lost one is gone: the others are elsewhere; a checkpoint takes them all.
        if dist.world_size() == 1 or not isinstance(error, (ResourceError, WorkerLostError)):
            course.keep(step)
        raise
    if skips is not None:
        skips.passed(ROLLOUT)
    return collected


@dataclass
class Learning:
    """What the updates of one step have come to so far."""

    totals: dict[str, Totals]
    norms: dict[str, list[float]]
    metrics: dict[str, float] = field(default_factory=dict)
    updates: int = 0  # of the policy
    newest: int = 0  # the minibatch of the last of them
    moved: float = 0.0
    is_guarded: bool = False

    def means(self) -> dict[str, float]:
        """Metrics over all updates that were made."""
        found = dict(self.metrics)
        for name, total in self.totals.items():
            found.update({key if "/" in key else f"{name}/{key}": value for key, value in total.means().items()})
            if self.norms[name]:
                found[f"{name}/grad_norm"] = sum(self.norms[name]) / len(self.norms[name])
        return found


def update(stage: Stage, step: int, collected: Collected) -> dict[str, float]:
    """All optimizer steps of one collected batch. Returns their metrics, averaged over the batch."""
    objectives = [o for o in stage.objectives if step >= stage.policy_starts or o.group == "value"]
    groups = [objective.group for objective in objectives]
    learning = Learning({group: Totals() for group in groups}, {group: [] for group in groups})
    for index, minibatch in enumerate(collected.minibatches):
        for engine, group in by_engine(objectives):
            update_one(stage, step, index, engine, group, minibatch, learning)
        if stage.target_kl is not None and learning.moved > stage.target_kl:
            break
    if stage.measures_move and learning.updates:
        learning.metrics["policy/kl_moved"] = measured(stage, collected.minibatches[learning.newest])["kl_old"]
    if stage.target_kl is not None and learning.updates:
        learning.metrics["policy/updates"] = learning.updates
    return learning.means()


def update_one(
    stage: Stage, step: int, index: int, engine: Engine, group: list[Objective], minibatch: Pool, learning: Learning
) -> None:
    """One optimizer step of an engine, of the objectives that share it; it is left out where a number is not finite."""
    assert stage.skips is not None, "a stage that learns counts what it leaves out"
    leader = group[0].group
    rate = learning_rate(group[0].optim, *update_number(stage, step, index, leader))
    if not math.isfinite(rate):
        stage.skips.add(leader, step, index, {"learning rate": str(rate)}, [])
        return
    pushed = []
    for objective in group:
        pushed.append(push(stage, step, index, objective, minibatch))
        if objective is stage.objectives[0] and pushed[-1].is_finite and not learning.is_guarded:
            stage.collector.guard(step, pushed[-1].totals.means())
            learning.is_guarded = True
    refuse_unreached(engine, leader)
    norm = engine.step(rate)
    if engine.is_skipped:
        found = {name: value for each in pushed for name, value in each.suspects.items()} | engine.not_finite
        rows = [row for each in pushed for row in each.suspect_rows]
        stage.skips.add(leader, step, index, found, rows or [row for each in pushed for row in each.rows])
        return
    stage.skips.passed(leader)
    for objective, each in zip(group, pushed, strict=True):
        learning.totals[objective.group].add(each.totals)
        if objective.group == "policy":
            learning.updates, learning.newest = learning.updates + 1, index
        if "kl_old" in each.totals.values:
            learning.metrics["policy/kl_moved"] = learning.moved = each.totals.means()["kl_old"]
    learning.norms[leader].append(norm)
    learning.metrics[f"{leader}/lr"] = rate
    follow(stage, engine)


def refuse_unreached(engine: Engine, what: str) -> None:
    """Before an engine's first step, every tensor that it trains has got a gradient from a backward of some rank."""
    mine = engine.unreached()
    if mine is not None:
        everywhere = set.intersection(*(set(names) for names in dist.gather_objects(mine)))
        check_reached(sorted(everywhere), len(engine.trained), what)


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


@dataclass
class Pushed:
    """What an objective's backward passes over a minibatch have come to."""

    totals: Totals
    is_finite: bool  # loss and metrics of every micro-batch on every rank
    rows: list[int]  # numbers of the records that this rank has learned from, where they are known
    suspect_rows: list[int]  # those of micro-batches whose loss is not finite
    suspects: dict[str, str]  # and what in them is not either: name -> value


def push(stage: Stage, step: int, index: int, objective: Objective, minibatch: Pool) -> Pushed:
    """Add an objective's gradient of a whole minibatch. Returns its metrics over all ranks."""
    meter, pool = Meter(), minibatch.of(objective.group)
    micros = list(pool.cut(stage.budget))  # equally many on every rank
    counts = counted(objective, micros)
    may_be_empty = objective.optional
    check_counts({name: count for name, count in counts.items() if name not in may_be_empty}, step, index)
    meter.add_counts(counts)
    divisors = {name: count or 1.0 for name, count in counts.items()}  # the sum over nothing is 0
    bad: list[Micro] = []
    for micro in micros:
        loss = micro.weighed(objective.loss(micro.rows))
        objective.engine.backward(loss, divisors)
        if objective.engine.saw_not_finite:
            bad.append(micro)
        meter.add(loss.metrics)
    meter.add_counts({_BAD: 1.0})
    meter.add({_BAD: (torch.tensor(len(bad)), _BAD)})
    totals = meter.reduce()
    is_finite = not totals.values.pop(_BAD)[0]
    found = [each for micro in bad for each in bad_fields(micro.rows).items()]
    suspects = {name: str(float(values[where][0])) for name, (values, _, where) in found}
    return Pushed(totals, is_finite, pool.records_of(micros), pool.records_of(bad), suspects)


def update_number(stage: Stage, step: int, index: int, group: str) -> tuple[int, int]:
    """(number of this optimizer step, how many there are) for a group of objectives; the policy may start late."""
    start = 0 if group == "value" else stage.policy_starts
    return (step - start) * stage.updates_per_step + index, (stage.steps - start) * stage.updates_per_step


def learning_rate(optim: OptimBlock, update_number: int, updates: int) -> float:
    """The learning rate of an optimizer step: a pure function of its number."""
    schedule = SCHEDULES[optim.schedule].function
    return optim.lr * schedule(update_number, updates, warmup=optim.warmup, min_lr_ratio=optim.min_lr_ratio)
