"""The loop on models of a few numbers: who learns when, what ends a step early, what a run leaves when it ends."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from rlhf.batch import Loss, Rows
from rlhf.data.dealing import Unit
from rlhf.engine.ema import Ema
from rlhf.engine.engine import Engine
from rlhf.errors import NumericsError, RecipeError, StoppedError, UserError
from rlhf.recipe.schema import KeepBestBlock, LogBlock, OptimBlock, ZeroBlock
from rlhf.train.loop import Collected, Stage, fit, learning_rate, update, update_number
from rlhf.train.metrics import MetricsLog
from rlhf.train.pool import Budget, Pool
from rlhf.train.progress import Progress
from rlhf.train.signals import StopRequest
from rlhf.train.skips import Skips
from rlhf.train.standing import Best, Standing

OPTIM = OptimBlock(optimizer="sgd", lr=0.5, schedule="linear", warmup=0.0, min_lr_ratio=0.0, max_grad_norm=0.0)


@dataclass(frozen=True)
class Points(Rows):
    """Inputs, and what is wanted of them."""

    inputs: Tensor  # (B, 3)
    wanted: Tensor  # (B, 1)


def points(rows: int = 4, seed: int = 0) -> Points:
    draw = torch.Generator().manual_seed(seed)
    return Points(torch.randn(rows, 3, generator=draw), torch.randn(rows, 1, generator=draw))


def pool(rows: Points) -> Pool:
    return Pool([Unit.single(i, 1) for i in range(len(rows))], rows.select)


def engine(seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    return Engine(nn.Linear(3, 1), ZeroBlock(), bf16=False, optim=OPTIM)


def weights(one: Engine) -> Tensor:
    return one.module.weight.detach().clone()


@dataclass
class Squares:
    """weight * mean of squared errors; `moved` are the KLs that it reports, a minibatch each."""

    engine: Engine
    group: str = "policy"
    optional: frozenset[str] = frozenset()
    weight: float = 1.0
    moved: list[float] = field(default_factory=list)
    optim: OptimBlock = OPTIM

    def counts(self, batch: Points) -> dict[str, Tensor]:
        return {"rows": torch.tensor(len(batch))}

    def loss(self, micro: Points) -> Loss:
        total = (self.engine(micro.inputs) - micro.wanted).square().sum()
        metrics = {"loss": (total, "rows")}
        if self.moved:
            metrics["kl_old"] = (torch.tensor(self.moved.pop(0) * len(micro)), "rows")
        return Loss({"squares": (total, "rows", self.weight)}, metrics)


@dataclass
class Collector:
    """Two minibatches per step. `fails`, `stops`: not collected; `alarms`: the step that ends the run."""

    fails: int | None = None
    alarms: int | None = None
    stops: int | None = None
    minibatches: int = 2
    guarded: list[int] = field(default_factory=list)

    def collect(self, step: int) -> Collected:
        if step == self.fails:
            raise RecipeError("no reward today", where="rewards", fix="come back")
        if step == self.stops:
            raise StoppedError("stopped in the rollout")
        return Collected(
            [pool(points(seed=10 * step + i)) for i in range(self.minibatches)], {"rollout/finished": 1.0}, 8
        )

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        self.guarded.append(step)

    def learned(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
        error = NumericsError("alarm", fix="look") if step == self.alarms else None
        return {"kl/coef": float(step)}, error


def stage(objectives: list[Squares], collector: Collector, **changes) -> Stage:
    plain = Stage(
        steps=4,
        updates_per_step=collector.minibatches,
        budget=Budget(2),
        collector=collector,
        objectives=objectives,
        seed=0,
        key_metric="policy/loss",
        log_every=1,
        checkpoint_every=0,
        skips=Skips(3, Path("skipped.jsonl"), lambda group, numbers: {}),
    )
    return replace(plain, **changes)


def run(path: Path, one: Stage, first_step: int = 0, stop: StopRequest | None = None) -> dict[str, float]:
    written = first_step - (one.standing.unfinished is not None)
    with Progress("test", one.steps, written, Console(quiet=True)) as progress:
        log = MetricsLog(path, LogBlock(), "run/ppo", first_step)
        return fit(one, first_step, log, progress, stop or StopRequest())


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- a step ---------------------------------------------------------------------------------------------------------


def test_the_critic_learns_alone_at_first(forked):
    def body():
        collector, policy, value = Collector(), engine(1), engine(2)
        one = stage([Squares(policy), Squares(value, "value")], collector, policy_starts=2, target_kl=1.0)
        average = Ema(policy, 0.5)
        one.averages = [average]
        start, start_value = weights(policy), weights(value)
        for step in range(2):
            metrics = update(one, step, collector.collect(step))
            assert not any(name.startswith("policy/") for name in metrics) and "value/loss" in metrics
        assert torch.equal(weights(policy), start) and not torch.equal(weights(value), start_value)
        assert torch.equal(average.average["weight"], start) and collector.guarded == []
        metrics = update(one, 2, collector.collect(2))
        assert not torch.equal(weights(policy), start) and collector.guarded == [2]
        assert not torch.equal(average.average["weight"], start)
        # The policy's rate falls from 0.5 over the 4 updates of its 2 steps, the critic's over the 8 of all 4: the
        # metrics show the second update of step 2, number 1 and number 5.
        assert metrics["policy/lr"] == pytest.approx(0.5 * 3 / 4) and metrics["value/lr"] == pytest.approx(0.5 * 3 / 8)

    forked(body)


def test_the_number_of_an_update():
    one = stage([], Collector(), policy_starts=1)
    assert [update_number(one, step, index, "value") for step in (0, 3) for index in (0, 1)] == [
        (0, 8), (1, 8), (6, 8), (7, 8)
    ]  # fmt: skip
    assert [update_number(one, step, index, "policy") for step in (1, 3) for index in (0, 1)] == [
        (0, 6), (1, 6), (4, 6), (5, 6)
    ]  # fmt: skip
    assert learning_rate(OPTIM, 2, 8) == pytest.approx(0.5 * 6 / 8)


def test_a_step_ends_once_the_policy_has_moved_far_enough(forked):
    def body():
        collector = Collector(minibatches=4)
        moved = [value for kl in (0.0, 0.02, 0.05, 0.9) for value in (kl, kl)]  # two micro-batches each
        policy, free = engine(1), engine(1)
        value, free_value = engine(2), engine(2)
        one = stage([Squares(policy, moved=moved), Squares(value, "value")], collector, target_kl=0.04)
        metrics = update(one, 0, collector.collect(0))
        assert metrics["policy/updates"] == 3 and metrics["policy/kl_moved"] == pytest.approx(0.05)
        assert metrics["policy/kl_old"] == pytest.approx((0.0 + 0.02 + 0.05) / 3)
        # exactly the weights of three updates, of both models
        other = stage([Squares(free), Squares(free_value, "value")], collector)
        update(other, 0, replace(collector.collect(0), minibatches=collector.collect(0).minibatches[:3]))
        assert torch.equal(weights(policy), weights(free)) and torch.equal(weights(value), weights(free_value))

    forked(body)


def test_objectives_of_one_engine_are_one_update(forked):
    def body():
        collector, both, single = Collector(minibatches=1), engine(1), engine(1)
        average = Ema(both, 0.0)
        two = stage([Squares(both), Squares(both, "ptx", weight=0.25)], collector, averages=[average])
        start = weights(both)
        metrics = update(two, 0, collector.collect(0))
        summed = update(stage([Squares(single, weight=1.25)], collector), 0, collector.collect(0))
        torch.testing.assert_close(weights(both), weights(single), atol=1e-6, rtol=0)
        assert metrics["policy/grad_norm"] == pytest.approx(summed["policy/grad_norm"], rel=1e-5)
        assert metrics["ptx/loss"] == metrics["policy/loss"] and "ptx/grad_norm" not in metrics
        # textbook: one step of size lr along the gradient of 1.25 times the mean of squares
        batch = points()
        plain = start.clone().requires_grad_()
        bias = engine(1).module.bias.detach()
        (1.25 * (batch.inputs @ plain.T + bias - batch.wanted).square().mean()).backward()
        torch.testing.assert_close(weights(both), start - 0.5 * plain.grad, atol=1e-6, rtol=0)
        assert torch.equal(average.average["weight"], weights(both))

    forked(body)


def test_metrics_are_means_over_all_updates_of_a_step(forked):
    def body():
        collector, policy = Collector(), engine(1)
        metrics = update(stage([Squares(policy)], collector), 0, collector.collect(0))
        other = engine(1)
        apart = [
            update(stage([Squares(other)], Collector(minibatches=1), steps=2), 0, Collected([batch]))
            for batch in collector.collect(0).minibatches
        ]
        # the second update's rate differs, but both losses are measured before it
        assert metrics["policy/loss"] == pytest.approx(sum(each["policy/loss"] for each in apart) / 2, rel=1e-5)

    forked(body)


# --- a run ----------------------------------------------------------------------------------------------------------


def test_every_step_is_written_with_what_was_learned_of_it(forked, tmp_path):
    def body():
        path, sampled = tmp_path / "metrics.jsonl", []
        last = run(path, stage([Squares(engine())], Collector(), sample=sampled.append, steps=3))
        assert [(row["step"], row["kl/coef"], row["rollout/finished"]) for row in rows(path)] == [
            (1, 0.0, 1.0), (2, 1.0, 1.0), (3, 2.0, 1.0)
        ]  # fmt: skip
        assert last["kl/coef"] == 2.0 and sampled == [0]

    forked(body)


def test_an_alarm_ends_the_run_after_its_row_and_a_checkpoint(forked, tmp_path):
    def body():
        path, saved = tmp_path / "metrics.jsonl", []
        one = stage([Squares(engine())], Collector(alarms=1), checkpoint=saved.append, log_every=10)
        with pytest.raises(NumericsError, match="alarm"):
            run(path, one)
        assert saved == [2] and [row["step"] for row in rows(path)] == [2]

    forked(body)


@pytest.mark.parametrize(
    ("first_step", "fails", "expected"), [(0, 1, [1]), (0, 2, [2]), (0, 0, []), (2, 2, []), (1, 3, [3])]
)
def test_what_was_learned_is_kept_where_a_batch_cannot_be_collected(forked, tmp_path, first_step, fails, expected):
    def body():
        saved = []
        one = stage([Squares(engine())], Collector(fails=fails), checkpoint=saved.append)
        with pytest.raises(RecipeError, match="no reward today"):
            run(tmp_path / "metrics.jsonl", one, first_step)
        assert saved == expected
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == list(range(first_step + 1, fails + 1))

    forked(body)


def test_checkpoints_are_regular_and_a_request_stops_after_its_step(forked, tmp_path):
    def body():
        saved = []
        run(tmp_path / "a.jsonl", stage([Squares(engine())], Collector(), checkpoint=saved.append, checkpoint_every=2))
        assert saved == [2]  # none after the last step: that is published
        stop = StopRequest()
        stop.requested = True
        with pytest.raises(StoppedError, match="after step 1 of 4"):
            run(tmp_path / "b.jsonl", stage([Squares(engine())], Collector(), checkpoint=saved.append), stop=stop)
        assert saved == [2, 1]

    forked(body)


@pytest.mark.parametrize(("first_step", "stops", "expected"), [(0, 2, [2]), (0, 0, []), (2, 2, [])])
def test_a_rollout_that_is_cut_off_is_not_in_the_checkpoint(forked, tmp_path, first_step, stops, expected):
    def body():
        path, saved = tmp_path / "metrics.jsonl", []
        one = stage([Squares(engine())], Collector(stops=stops), checkpoint=saved.append)
        with pytest.raises(StoppedError, match=f"after step {stops} of 4"):
            run(path, one, first_step)
        assert saved == expected and [row["step"] for row in rows(path)] == list(range(1, stops + 1))[first_step:]
        assert one.standing.unfinished is None

    forked(body)


def test_checkpoints_are_as_often_as_the_clock_says(forked, tmp_path):
    def body():
        for minutes, expected in ((1e-9, [1, 2, 3]), (60.0, [2])):
            saved = []
            changes = {"checkpoint": saved.append, "checkpoint_every": 2, "checkpoint_minutes": minutes}
            run(tmp_path / "metrics.jsonl", stage([Squares(engine())], Collector(), **changes))
            assert saved == expected

    forked(body)


@dataclass
class Judged:
    """Evaluates and samples after every second step. `stops`: (what, when) is cut off."""

    engine: Engine
    stops: tuple[str, int] | None = None
    sampled: list[int] = field(default_factory=list)

    def evaluate(self, done: int) -> dict[str, float]:
        self.look("evaluate", done)
        return {"eval/loss": float(weights(self.engine).sum())}

    def sample(self, done: int) -> None:
        self.look("sample", done)
        self.sampled.append(done)

    def look(self, what: str, done: int) -> None:
        if (what, done) == self.stops:
            raise StoppedError("stopped on the way")

    def stage(self, saved: list[int]) -> Stage:
        every = {name: lambda done: done % 2 == 0 for name in ("is_eval_step", "is_sample_step")}
        own = {"evaluate": self.evaluate, "sample": self.sample, "checkpoint": saved.append}
        return stage([Squares(self.engine)], Collector(), **every, **own)


def timeless(path: Path) -> list[dict]:
    return [{name: v for name, v in row.items() if not name.startswith(("time", "speed/"))} for row in rows(path)]


@pytest.mark.parametrize("cut_off", ["evaluate", "sample"])
@pytest.mark.parametrize("step", [2, 4])
def test_an_evaluation_that_is_cut_off_is_made_up_for(forked, tmp_path, cut_off, step):
    def body():
        straight = run(tmp_path / "straight.jsonl", Judged(engine()).stage([]))
        path, saved, policy = tmp_path / "cut.jsonl", [], engine()
        first = Judged(policy, (cut_off, step)).stage(saved)
        with pytest.raises(StoppedError, match=f"after step {step} of 4"):
            run(path, first)
        assert saved == [step] and [row["step"] for row in rows(path)] == list(range(1, step))
        judged = Judged(policy)
        second = replace(judged.stage(saved), checkpoint_every=1)
        second.standing.restore(json.loads(json.dumps(first.standing.as_json())))
        last = run(path, second, first_step=step)
        assert timeless(path) == timeless(tmp_path / "straight.jsonl") and last["eval/loss"] == straight["eval/loss"]
        assert judged.sampled == list(range(step, 5, 2)) and saved == [step, *range(step + 1, 4)]
        assert second.standing.unfinished is None

    forked(body)


def test_the_best_step_has_a_checkpoint(forked, tmp_path):
    def body():
        saved, losses = [], {1: 3.0, 2: 2.0, 3: 2.5, 4: 1.0}
        found = {"evaluate": lambda done: {"eval/loss": losses[done]}, "is_eval_step": lambda done: True}
        standing = Standing(KeepBestBlock(metric="eval/loss", larger_is_better=False))
        one = stage([Squares(engine())], Collector(), checkpoint=saved.append, standing=standing, **found)
        run(tmp_path / "metrics.jsonl", one)
        assert saved == [1, 2] and standing.best == Best(4, 1.0)  # the last step is published, there or not

    forked(body)
