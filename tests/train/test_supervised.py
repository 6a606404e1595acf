"""Rows of a fixed dataset: which of them a step takes, how they are dealt out, and the mean over held-out ones."""

from __future__ import annotations

import pytest
import torch

from rlhf.batch import Tokens
from rlhf.engine.engine import Engine
from rlhf.recipe.schema import OptimBlock, ZeroBlock
from rlhf.train.objectives import SFTObjective
from rlhf.train.pool import Budget
from rlhf.train.signals import StopRequest
from rlhf.train.supervised import Dataset, SupervisedCollector, evaluate

LENGTHS = [3, 9, 4, 7, 5, 6, 8]


def dataset() -> Dataset:
    """Row i: LENGTHS[i] tokens i + 1, all but the first trained."""

    def batch(rows: list[int]) -> Tokens:
        columns = torch.arange(max(LENGTHS[row] for row in rows))
        attention = columns < torch.tensor([LENGTHS[row] for row in rows])[:, None]
        ids = torch.where(attention, torch.tensor(rows)[:, None] + 1, 0)
        return Tokens(ids, attention, attention & (columns > 0))

    return Dataset([2 * n for n in LENGTHS], LENGTHS, batch)


class LogProb(torch.nn.Module):
    """Every token has the log-prob -weight * id."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, ids, attention, mask):
        return -self.weight * ids[:, -mask.shape[1] :]


def test_a_step_takes_its_slice_of_the_order(forked):
    def body():
        seen = []
        data = dataset()
        collector = SupervisedCollector(data, 3, seed=5, check=lambda step, metrics: None)
        for step in range(7):
            collected = collector.collect(step)
            (pool,) = collected.minibatches
            seen.append((pool.batch([0, 1, 2]).ids[:, 0] - 1).tolist())
            assert collected.tokens == sum(2 * LENGTHS[row] for row in seen[-1]) and len(pool) == 3
            assert [unit.tokens for unit in pool.units] == [LENGTHS[row] for row in seen[-1]]
            cut = [row for micro in pool.cut(Budget(1)) for row in (micro.rows.ids[:, 0] - 1).tolist()]
            assert sorted(cut) == sorted(seen[-1])
            assert [LENGTHS[row] for row in cut] == sorted((LENGTHS[row] for row in cut), reverse=True)
        drawn = [row for rows in seen for row in rows]
        assert len(drawn) == 21 and all(drawn.count(row) == 3 for row in range(7))  # three whole epochs
        again = collector.collect(2).minibatches[0].batch([0, 1, 2])
        assert torch.equal(again.ids, data.batch(seen[2]).ids)

    forked(body)


def test_the_check_sees_the_first_metrics(forked):
    def body():
        calls = []
        collector = SupervisedCollector(dataset(), 2, 0, lambda step, metrics: calls.append((step, metrics)))
        collector.guard(4, {"loss": 1.0})
        assert calls == [(4, {"loss": 1.0})]

    forked(body)


@pytest.mark.parametrize("budget", [Budget(1), Budget(14), Budget(10_000), Budget(10_000, 2)])
def test_evaluation_is_the_mean_over_tokens(forked, budget):
    def body():
        engine = Engine(LogProb(), ZeroBlock(), bf16=False, optim=OptimBlock())
        found = evaluate(SFTObjective(engine, OptimBlock()), dataset(), budget, StopRequest())
        trained = [length - 1 for length in LENGTHS]
        expected = sum(0.5 * (row + 1) * count for row, count in enumerate(trained)) / sum(trained)
        assert found == {
            "eval/loss": pytest.approx(expected, rel=1e-6),
            "eval/tokens_per_row": pytest.approx(sum(trained) / 7),
        }
        assert engine.module.training and engine.module.weight.grad is None

    forked(body)
