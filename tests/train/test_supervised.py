"""Rows of a fixed dataset: which of them a step takes, how they are dealt out, and the mean over held-out ones."""

from __future__ import annotations

import pytest
import torch

from rlhf.batch import Tokens
from rlhf.engine.engine import Engine
from rlhf.recipe.schema import OptimBlock, ZeroBlock
from rlhf.train.objectives import SFTObjective
from rlhf.train.supervised import Dataset, SupervisedCollector, balanced_share, evaluate, even_batches

LENGTHS = [3, 9, 4, 7, 5, 6, 8]


def dataset() -> Dataset:
    """Row i: LENGTHS[i] tokens i + 1, all but the first trained."""

    def batch(rows: list[int]) -> Tokens:
        columns = torch.arange(max(LENGTHS[row] for row in rows))
        attention = columns < torch.tensor([LENGTHS[row] for row in rows])[:, None]
        ids = torch.where(attention, torch.tensor(rows)[:, None] + 1, 0)
        return Tokens(ids, attention, attention & (columns > 0))

    return Dataset(LENGTHS, batch)


class LogProb(torch.nn.Module):
    """Every token has the log-prob -weight * id."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.5]))

    def forward(self, ids, attention, start):
        return -self.weight * ids[:, start:]


def test_a_step_takes_its_slice_of_the_order(forked):
    def body():
        seen = []
        data = dataset()
        watched = Dataset(data.lengths, lambda rows: seen.append(rows) or data.batch(rows))
        collector = SupervisedCollector(watched, 3, seed=5, check=lambda step, metrics: None)
        for step in range(7):
            collected = collector.collect(step)
            assert collected.tokens == sum(LENGTHS[row] for row in seen[-1])
            assert len(collected.minibatches) == 1 and len(collected.minibatches[0]) == 3
            lengths = [LENGTHS[row] for row in seen[-1]]
            assert lengths == sorted(lengths, reverse=True)
        drawn = [row for rows in seen for row in rows]
        assert len(drawn) == 21 and all(drawn.count(row) == 3 for row in range(7))  # three whole epochs
        again = collector.collect(2).minibatches[0]
        assert torch.equal(again.ids, data.batch(seen[2]).ids)

    forked(body)


def test_the_check_sees_the_first_metrics(forked):
    def body():
        calls = []
        collector = SupervisedCollector(dataset(), 2, 0, lambda step, metrics: calls.append((step, metrics)))
        collector.guard(4, {"loss": 1.0})
        assert calls == [(4, {"loss": 1.0})]

    forked(body)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_disjoint_equal_and_balanced(world):
    shares = [balanced_share([0, 1, 2, 3, 4, 5], LENGTHS, rank, world) for rank in range(world)]
    assert sorted(row for share in shares for row in share) == [0, 1, 2, 3, 4, 5]
    assert {len(share) for share in shares} == {6 // world}
    work = [sum(LENGTHS[row] for row in share) for share in shares]
    assert max(work) - min(work) <= max(LENGTHS) - min(LENGTHS)
    assert all(LENGTHS[share[0]] == max(LENGTHS[row] for row in share) for share in shares)


@pytest.mark.parametrize(("size", "micro_batch", "world"), [(7, 2, 1), (7, 2, 2), (1, 4, 2), (8, 4, 2), (5, 1, 3)])
def test_even_batches_cover_every_row_once_in_equally_many_calls(size, micro_batch, world):
    per_rank = [even_batches(size, micro_batch, rank, world) for rank in range(world)]
    assert len({len(batches) for batches in per_rank}) == 1
    real = [row for batches in per_rank for rows, is_real in batches if is_real for row in rows]
    assert sorted(real) == list(range(size))
    assert all(rows == [0] for batches in per_rank for rows, is_real in batches if not is_real)
    assert all(len(rows) <= micro_batch for batches in per_rank for rows, _ in batches)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
def test_evaluation_is_the_mean_over_tokens(forked, micro_batch):
    def body():
        engine = Engine(LogProb(), ZeroBlock(), bf16=False, optim=OptimBlock())
        found = evaluate(SFTObjective(engine, OptimBlock()), dataset(), micro_batch)
        trained = [length - 1 for length in LENGTHS]
        expected = sum(0.5 * (row + 1) * count for row, count in enumerate(trained)) / sum(trained)
        assert found == {
            "eval/loss": pytest.approx(expected, rel=1e-6),
            "eval/tokens_per_row": pytest.approx(sum(trained) / 7),
        }
        assert engine.module.training and engine.module.weight.grad is None

    forked(body)
