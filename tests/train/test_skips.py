"""Updates that are left out: by whom, how they are counted and written down, when they end a run."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from rlhf.batch import Loss, Rows
from rlhf.data.dealing import Unit
from rlhf.data.origin import origins
from rlhf.engine import dist
from rlhf.engine.ema import Ema
from rlhf.engine.engine import Engine
from rlhf.errors import NotFiniteError, NumericsError, UserError
from rlhf.recipe.schema import DataBlock, LogBlock, OptimBlock, SourceBlock, ZeroBlock
from rlhf.run.rundir import RunDir
from rlhf.train.checkpoints import Checkpoints, Running, load_checkpoint
from rlhf.train.coupling import refuse_not_finite
from rlhf.train.loop import Collected, Stage, fit, update
from rlhf.train.metrics import MetricsLog
from rlhf.train.pool import Budget, Pool
from rlhf.train.progress import Progress
from rlhf.train.signals import StopRequest
from rlhf.train.skips import Skips

OPTIM = OptimBlock(lr=0.05, schedule="constant", warmup=0.0)


@dataclass(frozen=True)
class Points(Rows):
    inputs: Tensor  # (B, 3)
    policy: Tensor  # (B, 1) what the policy is to say
    value: Tensor  # (B, 1) and the critic


def points(seed: int, bad: str | None = None, row: int = 2) -> Points:
    """Four rows; in one of them the target of `bad` is NaN."""
    draw = torch.Generator().manual_seed(seed)
    found = Points(*(torch.randn(4, width, generator=draw) for width in (3, 1, 1)))
    if bad is not None:
        getattr(found, bad)[row] = torch.nan
    return found


def pool(rows: Points) -> Pool:
    return Pool([Unit.single(i, 1) for i in range(len(rows))], rows.select, records=[10, 11, 12, 13])


@dataclass
class Squares:
    engine: Engine
    group: str = "policy"
    optional: frozenset[str] = frozenset()
    optim: OptimBlock = OPTIM

    def counts(self, batch: Points) -> dict[str, Tensor]:
        return {"rows": torch.tensor(len(batch))}

    def loss(self, micro: Points) -> Loss:
        total = (self.engine(micro.inputs) - getattr(micro, self.group)).square().sum()
        return Loss({"squares": (total, "rows", 1.0)}, {"loss": (total, "rows")})


@dataclass
class Collector:
    """Two minibatches per step. bad: (step, minibatch) -> whose; fails: steps whose rollout is not finite."""

    bad: dict[tuple[int, int], str]
    fails: tuple[int, ...] = ()

    def collect(self, step: int) -> Collected:
        if step in self.fails:
            raise NotFiniteError("expected finite scores", found={"scores": "inf"}, rows=[11])
        return Collected([pool(points(2 * step + i, self.bad.get((step, i)))) for i in range(2)], {}, 8)

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        assert all(abs(value) < 1e9 for value in metrics.values())

    def learned(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
        return {}, None


def engine(seed: int, zero: int = 0) -> Engine:
    torch.manual_seed(seed)
    return Engine(nn.Linear(3, 1), ZeroBlock(stage=zero, persistence_threshold=0), bf16=False, optim=OPTIM)


def stage(folder: Path, objectives: list[Squares], collector: Collector, limit: int = 3, **changes) -> Stage:
    plain = Stage(
        steps=5,
        updates_per_step=2,
        budget=Budget(2),
        collector=collector,
        objectives=objectives,
        seed=0,
        key_metric="policy/loss",
        log_every=1,
        checkpoint_every=0,
        skips=Skips(
            limit, folder / "skipped.jsonl", lambda group, numbers: {n: f"rows.jsonl:{n + 1}" for n in numbers}
        ),
    )
    return replace(plain, **changes)


def run(folder: Path, one: Stage, first_step: int = 0) -> dict[str, float]:
    with Progress("test", one.steps, first_step, Console(quiet=True)) as progress:
        log = MetricsLog(folder / "metrics.jsonl", LogBlock(), "run", first_step)
        return fit(one, first_step, log, progress, StopRequest())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def same(one: Engine, other: Engine) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_policys_update_is_left_out_and_the_critics_made(forked, tmp_path):
    """Exactly what comes of the policy without that minibatch, of its average too, and of the critic with it."""

    def body():
        collector = Collector({(0, 1): "policy"})
        policy, value, alone, critic = engine(1), engine(2), engine(1), engine(2)
        average, expected = Ema(policy, 0.5), Ema(alone, 0.5)
        both = [Squares(policy), Squares(value, "value")]
        one = stage(tmp_path, both, collector, averages=[average])
        batch = collector.collect(0)
        metrics = update(one, 0, batch)
        straight = update(
            stage(tmp_path, [Squares(alone)], collector, averages=[expected]), 0, Collected(batch.minibatches[:1])
        )
        update(stage(tmp_path, [Squares(critic, "value")], collector), 0, batch)
        assert same(policy, alone) and same(value, critic) and metrics["policy/loss"] == straight["policy/loss"]
        assert torch.equal(average.average["weight"], expected.average["weight"])
        (line,) = lines(tmp_path / "skipped.jsonl")
        assert (line["step"], line["minibatch"], line["of"], line["in_a_row"]) == (1, 2, "policy", 1)
        assert [each["tensor"] for each in line["found"]][0] == "policy", "the field of the rows comes first"
        # micro-batches of two rows: the bad one is row 12, its neighbour is named with it
        assert {"row": 12, "where": "rows.jsonl:13"} in line["rows"] and len(line["rows"]) == 2
        # and the next step is the same for both
        update(one, 1, collector.collect(1))
        update(stage(tmp_path, [Squares(alone)], collector), 1, collector.collect(1))
        assert same(policy, alone) and one.skips.total == 1 and one.skips.in_a_row == {}

    forked(body)


def test_several_in_a_row_end_the_run_behind_their_step(forked, tmp_path):
    """By group: the critic's updates in between are good. Its step is finished, written and in a checkpoint."""

    def body():
        kept: list[int] = []
        collector = Collector({(1, 0): "policy", (1, 1): "policy", (2, 0): "policy", (3, 0): "policy"})
        objectives = [Squares(engine(1)), Squares(engine(2), "value")]
        one = stage(tmp_path, objectives, collector, checkpoint=kept.append)
        with pytest.raises(NumericsError, match=r"step 3, minibatch 1: .*found 3 updates of policy in a row") as caught:
            run(tmp_path, one)
        assert str(tmp_path / "skipped.jsonl") in str(caught.value) and kept == [3]
        assert [row["train/skipped"] for row in lines(tmp_path / "metrics.jsonl")] == [0.0, 2.0, 3.0]
        assert "policy/loss" not in lines(tmp_path / "metrics.jsonl")[1]
        assert [line["in_a_row"] for line in lines(tmp_path / "skipped.jsonl")] == [1, 2, 3]

    forked(body)


def test_a_rollout_that_is_not_finite_is_a_step_without_an_update(forked, tmp_path):
    def body():
        objective, straight = Squares(engine(1)), Squares(engine(1))
        run(tmp_path, stage(tmp_path, [objective], Collector({}, fails=(1, 2, 4))))
        (tmp_path / "other").mkdir()
        for step in (0, 3):
            update(stage(tmp_path, [straight], Collector({})), step, Collector({}).collect(step))
        assert same(objective.engine, straight.engine)
        found = lines(tmp_path / "skipped.jsonl")
        assert [(line["step"], line["of"], line["minibatch"], line["in_a_row"]) for line in found] == [
            (2, "rollout", None, 1), (3, "rollout", None, 2), (5, "rollout", None, 1)
        ]  # fmt: skip
        assert found[0]["rows"] == [{"row": 11, "where": "rows.jsonl:12"}]
        with pytest.raises(NumericsError, match="step 2: .*found 1 updates of rollout in a row.*scores is inf"):
            run(tmp_path / "other", stage(tmp_path / "other", [objective], Collector({}, fails=(1,)), limit=1))

    forked(body)


def test_a_learning_rate_that_is_none_is_left_out_before_anything_is_computed(forked, tmp_path):
    def body():
        one = stage(tmp_path, [Squares(engine(1))], Collector({}))
        object.__setattr__(one.objectives[0], "optim", OPTIM.model_copy(update={"lr": float("nan")}))
        before = one.objectives[0].engine.state_dict()
        update(one, 0, one.collector.collect(0))
        after = one.objectives[0].engine.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert lines(tmp_path / "skipped.jsonl")[0]["found"] == [{"rank": 0, "tensor": "learning rate", "value": "nan"}]

    forked(body)


def test_the_count_in_a_row_goes_on_where_a_run_is_resumed(forked, tmp_path):
    def body():
        folder = RunDir(tmp_path / "run").stage("sft")
        folder.path.mkdir(parents=True)
        policy = engine(1)
        one = stage(tmp_path, [Squares(policy)], Collector({(0, 1): "policy", (1, 0): "policy", (1, 1): "policy"}))
        update(one, 0, one.collector.collect(0))
        with Checkpoints(folder, Running({"policy": policy}, skips=one.skips), keep=1) as checkpoints:
            checkpoints.save(1)
            checkpoints.settle()
        again = stage(tmp_path, [Squares(engine(7))], one.collector)
        resumed = Running({"policy": again.objectives[0].engine}, skips=again.skips)
        assert load_checkpoint(folder.checkpoint(1), resumed) == 1
        assert again.skips.total == 1 and again.skips.in_a_row == {"policy": 1}
        update(again, 1, again.collector.collect(1))
        assert again.skips.reason is not None and again.skips.total == 3

    forked(body)


@pytest.mark.parametrize("what", ["weights", "moments", "average"])
def test_a_checkpoint_that_is_not_finite_never_gets_its_name(forked, tmp_path, what):
    def body():
        folder = RunDir(tmp_path / "run").stage("sft")
        folder.path.mkdir(parents=True)
        policy = engine(1)
        average = Ema(policy, 0.5)
        update(stage(tmp_path, [Squares(policy)], Collector({})), 0, Collector({}).collect(0))
        with Checkpoints(folder, Running({"policy": policy}, {"ema": average}), keep=1) as checkpoints:
            checkpoints.save(1)
            checkpoints.settle()
            broken = {
                "weights": policy.module.weight.data,
                "moments": next(iter(policy._engine.optimizer.state.values()))["exp_avg_sq"],
                "average": average.average["weight"],
            }[what]
            broken.view(-1)[0] = torch.inf
            with pytest.raises(NumericsError, match=r"after step 2: expected finite weights, found inf in"):
                checkpoints.save(2)
        assert [path.name for path in folder.checkpoints.iterdir()] == ["step-000001"]

    forked(body)


def test_one_ranks_number_leaves_out_the_update_on_all(two_ranks, tmp_path):
    """Under every stage of ZeRO, for a loss, a gradient and a weight of rank 1 alone, and both ranks go on alike."""

    def body(rank: int) -> list:
        found = []
        for zero in (0, 1, 2, 3):
            for what in ("row", "weight"):
                folder = tmp_path / f"{zero}-{what}"
                if rank == 0:
                    folder.mkdir()
                dist.barrier()
                policy, straight = engine(1, zero), engine(1, zero)
                one = stage(folder, [Squares(policy)], Collector({}))
                collected = Collector({}).collect(0)
                update(one, 0, collected)
                update(stage(folder, [Squares(straight)], Collector({})), 0, collected)
                bad = pool(points(9))
                if what == "weight" and rank == 1:
                    held = policy.module.weight
                    held = (held.ds_tensor if zero == 3 else held).data.view(-1)
                    kept, held[0] = held[0].clone(), torch.nan
                elif what == "row":
                    bad = pool(points(9, "policy", row=1))
                update(one, 1, Collected([bad]))
                if what == "weight" and rank == 1:
                    held[0] = kept
                whole, expected = policy.state_dict(), straight.state_dict()
                if rank == 0:
                    assert all(torch.equal(value, expected[name]) for name, value in whole.items()), (zero, what)
                    (line,) = lines(folder / "skipped.jsonl")
                    first = line["found"][0]
                    found.append((zero, what, first["rank"], first["tensor"]))
                assert one.skips.in_a_row == {"policy": 1}
                update(one, 2, collected)
                assert one.skips.in_a_row == {}
        return found

    seen, _ = two_ranks(body)
    names = {"row": "policy", "weight": "weight weight"}
    assert seen == [(zero, what, 1, names[what]) for zero in (0, 1, 2, 3) for what in names]


def test_rows_are_found_in_their_files_again(tmp_path):
    for name, count in (("a", 3), ("b", 4)):
        rows = [{"prompt": f"{name}{i}", "completion": "x"} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataBlock(sources=[SourceBlock(path=str(tmp_path / f"{name}.jsonl")) for name in "ab"])
    found = origins(data, "tokens", [1, 3, 6])
    assert found == {1: f"{tmp_path}/a.jsonl:2", 3: f"{tmp_path}/b.jsonl:1", 6: f"{tmp_path}/b.jsonl:4"}


def test_what_was_left_out_is_cut_back_with_the_other_logs(tmp_path):
    folder = RunDir(tmp_path).stage("sft")
    folder.path.mkdir()
    folder.skipped.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 3, 3, 4)))
    folder.cut_logs(3)
    assert [line["step"] for line in lines(folder.skipped)] == [1, 3, 3]


def test_running_numbers_of_a_loss_take_in_nothing_that_is_not_finite():
    sums, rows = torch.tensor([[-1.0, -2.0], [-3.0, -torch.inf]]), torch.tensor([4, 9])
    refuse_not_finite(sums[:1], rows[:1], 0)
    with pytest.raises(NotFiniteError, match="step 3: expected finite log-probs, found 1 of 2 rows") as caught:
        refuse_not_finite(sums, rows, 2)
    assert caught.value.rows == [9] and caught.value.found == {"log-probs of answers": "-inf"}
