"""Running out of memory in the user's words, and the largest micro-batch that fits, found once and kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf.batch import Loss
from rlhf.data.dealing import Unit
from rlhf.engine.engine import Engine
from rlhf.errors import ResourceError
from rlhf.recipe.schema import OptimBlock, ZeroBlock
from rlhf.run.rundir import RunDir
from rlhf.train import memory
from rlhf.train.checkpoints import Checkpoints, Running, load_checkpoint
from rlhf.train.pool import Budget, Pool


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_the_phase_and_the_key_to_lower_are_named(forked, error):
    def body() -> None:
        with pytest.raises(ResourceError) as caught, memory.phase("the update", "train.micro_tokens"):
            raise error
        assert str(caught.value).startswith("out of memory in the update, on rank 0: ")
        assert "Lower train.micro_tokens; " in str(caught.value) and caught.value.exit_code == 7

    forked(body)


def test_a_real_allocation_that_fails_is_recognised(forked):
    def body() -> None:
        with pytest.raises(ResourceError, match="out of memory in here"), memory.phase("here", "x"):
            torch.empty(2**60)

    forked(body)


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory.phase("the update", "train.micro_tokens"):
        raise RuntimeError("shapes do not agree")


def test_the_line_through_two_measurements():
    assert memory.fitting([1000, 2000], [600, 1100], 5100) == 10_000  # 100 and 0.5 a token
    assert memory.fitting([1000, 2000], [100, 1100], 500) == 500  # a constant below 0 is none
    assert memory.fitting([1000, 2000], [600, 600], 5100) is None


class Wide(nn.Module):
    """10,000 numbers for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10_000))

    def forward(self, tokens: Tensor) -> Tensor:
        return (tokens[:, None] * self.weight).tanh().sum()


class Total:
    """The sum of a wide layer's outputs."""

    group = "train"
    optional: frozenset[str] = frozenset()
    optim = OptimBlock()

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def loss(self, rows: Tensor) -> Loss:
        return Loss({"total": (self.engine(rows), "rows", 1.0)}, {})


def long_rows() -> Pool:
    """40 rows of 200 tokens."""
    return Pool([Unit.single(i, 200) for i in range(40)], lambda rows: torch.ones(200 * len(rows)))


def test_auto_measures_once_and_learns_nothing(forked, caplog):
    def body() -> None:
        caplog.set_level(logging.INFO, "rlhf.memory")
        engine = Engine(Wide(), ZeroBlock(), bf16=False, optim=OptimBlock())
        budget = Budget(1024, is_open=True)
        memory.settle(budget, [Total(engine)], long_rows())
        assert not budget.is_open and budget.is_found
        assert 1024 < budget.tokens <= 8000, "at most what a minibatch has"
        assert engine.module.weight.grad is None or not engine.module.weight.grad.any()
        assert "passes of 1000 and 2000 tokens took" in caplog.text and "MB per token" in caplog.text

    forked(body)


def test_where_there_is_nothing_to_measure_passes_stay_small(forked):
    def body() -> None:
        budget = Budget(1024, is_open=True)
        few = Pool([Unit.single(0, 3), Unit.single(1, 4)], lambda rows: torch.ones(3))
        memory.settle(budget, [Total(Engine(Wide(), ZeroBlock(), bf16=False, optim=OptimBlock()))], few)
        assert budget == Budget(1024, is_found=True)

    forked(body)


def test_a_resumed_run_cuts_as_the_first_did(forked, tmp_path):
    def body() -> None:
        stage = RunDir(tmp_path).stage("sft")
        stage.path.mkdir(parents=True)
        engine = Engine(nn.Linear(2, 1), ZeroBlock(), bf16=False, optim=OptimBlock())
        found = Budget(1024, is_open=True)
        found.settle(4321)
        with Checkpoints(stage, Running({"policy": engine}, budget=found), keep=1) as checkpoints:
            checkpoints.save(3)
            checkpoints.settle()
        assert json.loads((stage.checkpoint(3) / "MANIFEST.json").read_text())["micro_tokens"] == 4321
        again = Budget(1024, is_open=True)
        assert load_checkpoint(Path(stage.checkpoint(3)), Running({"policy": engine}, budget=again)) == 3
        assert again == found and not again.is_open

    forked(body)
