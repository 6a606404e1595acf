"""The L1 penalty on what training changes: what it computes, under every ZeRO stage, on two ranks and when resumed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rlhf.batch import Loss
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.engine.proximal import pulled
from rlhf.recipe.schema import OptimBlock, ZeroBlock

L1, LR, STEPS = 0.15, 0.1, 3


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def rows() -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def engine_of(stage: int, l1: float = L1) -> Engine:
    zero = ZeroBlock(stage=stage, persistence_threshold=0, bucket_size=1000)
    engine = Engine(network(), zero, bf16=False, optim=OptimBlock(optimizer="sgd", max_grad_norm=0.0))
    engine.pull_to_start(l1)
    return engine


def train(engine: Engine, steps: int) -> dict[str, Tensor]:
    inputs = rows()[dist.rank() :: dist.world_size()]
    for _ in range(steps):
        engine.backward(Loss({"square": (engine(inputs).pow(2).sum(), "rows", 1.0)}), {"rows": 4.0})
        engine.step(LR)
    return engine.state_dict()


def textbook() -> dict[str, Tensor]:
    """Gradient step, then soft thresholding of the change, written out for single numbers."""
    module, start = network(), network().state_dict()
    for _ in range(STEPS):
        module.zero_grad()
        (module(rows()).pow(2).sum() / 4).backward()
        with torch.no_grad():
            for name, weight in module.named_parameters():
                moved = (weight - LR * weight.grad - start[name]).flatten().tolist()
                nearer = [max(abs(x) - LR * L1, 0.0) * (1 if x > 0 else -1) for x in moved]
                weight.copy_(start[name] + torch.tensor(nearer).view_as(weight))
    return module.state_dict()


def check(found: dict[str, Tensor]) -> None:
    expected, start = textbook(), network().state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)
        assert torch.equal(found[name] == start[name], value == start[name]), name
    unchanged = sum(int((found[name] == start[name]).sum()) for name in start)
    assert 5 < unchanged < 45, "some of the 50 weights stayed exactly where they were, others moved"


def test_a_weight_goes_nearer_by_the_distance_and_no_further_than_its_start():
    start = torch.tensor([1.0, 1.0, 1.0, 1.0, -2.0])
    weight = torch.tensor([1.5, 0.5, 1.1, 1.0, -2.25])
    torch.testing.assert_close(pulled(weight, start, 0.25), torch.tensor([1.25, 0.75, 1.0, 1.0, -2.0]), atol=0, rtol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_is_the_textbook(forked, stage):
    forked(lambda: check(train(engine_of(stage), STEPS)))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_are_one(two_ranks, stage):
    found, nothing = two_ranks(lambda rank: train(engine_of(stage), STEPS))
    assert nothing is None
    check(found)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_resumed_engine_knows_where_training_began(forked, stage, tmp_path):
    def body():
        first = engine_of(stage)
        train(first, 2)
        first.save(tmp_path)
        again = engine_of(stage)
        again.load(tmp_path)
        check(train(again, STEPS - 2))

    forked(body)


def test_a_penalty_that_no_gradient_exceeds_changes_nothing(forked):
    def body():
        found = train(engine_of(0, l1=1e3), STEPS)
        assert all(torch.equal(found[name], value) for name, value in network().state_dict().items())

    forked(body)
