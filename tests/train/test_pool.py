"""Rows that ranks divide: turns in step, stand-ins that count nothing, results back in the order of the pool."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from rlhf.batch import Loss, Rows
from rlhf.data.dealing import Unit
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.recipe.schema import OptimBlock, ZeroBlock
from rlhf.recipe.stages import GRPORecipe, LabelRecipe, SFTRecipe
from rlhf.train.pool import CAREFUL, Budget, Micro, Pool, at_places, own_passes, sampled_units

MODEL = {"model": {"from": "sft"}, "data": {"path": "x"}}


@dataclass(frozen=True)
class Numbers(Rows):
    values: Tensor  # (B,)


def pool(lengths: list[int]) -> Pool:
    rows = Numbers(torch.arange(len(lengths)) + 10.0)
    return Pool([Unit.single(i, n) for i, n in enumerate(lengths)], rows.select)


def test_a_recipe_says_how_large_micro_batches_are():
    def budget(**train: object) -> Budget:
        return Budget.of(SFTRecipe.model_validate({**MODEL, "train": train}))

    assert budget() == Budget(8192) and budget(micro_tokens=100) == Budget(100)
    assert budget(micro_batch=4) == Budget(8192, 4), "a number means rows, as ever"
    assert budget(micro_batch="auto") == Budget(CAREFUL, is_open=True)
    assert budget(micro_batch="auto", micro_tokens=100) == Budget(100, is_open=True)
    assert Budget.of(GRPORecipe.model_validate(MODEL)) == Budget(8192)
    label = {**MODEL, "rewards": [{"kind": "length"}], "label": {"micro_tokens": 50, "micro_batch": 2}}
    assert Budget.of(LabelRecipe.model_validate(label)) == Budget(50, 2)


def test_results_come_back_in_the_order_of_the_pool(forked, two_ranks):
    lengths = [5, 3, 9, 1, 7, 2, 4]

    def found() -> tuple[list[float], list[bool]]:
        one = pool(lengths)
        micros = list(one.cut(Budget(10)))
        doubled = at_places(((micro, 2 * micro.rows.values) for micro in micros), len(one))
        assert all(micro.rows.values.tolist() == [place + 10 for place in micro.places] for micro in micros)
        return doubled.tolist(), [micro.is_real for micro in micros]

    def body() -> None:
        assert found() == ([2.0 * (i + 10) for i in range(7)], [True] * 4)

    forked(body)
    ranks = two_ranks(lambda rank: found())
    assert [values for values, _ in ranks] == [[2.0 * (i + 10) for i in range(7)]] * 2
    assert [len(real) for _, real in ranks] == [2, 2]


def test_booleans_and_whole_numbers_are_placed_too(two_ranks):
    def body(rank: int) -> list[list]:
        places = [[3, 0], [1]][rank]
        rows = torch.tensor(places)
        return [dist.placed(value, places, 5).tolist() for value in (rows > 0, rows, torch.stack([rows, rows], -1))]

    expected = [[False, True, False, True, False], [0, 1, 0, 3, 0], [[0, 0], [1, 1], [0, 0], [3, 3], [0, 0]]]
    assert two_ranks(body) == [expected, expected]


@pytest.mark.parametrize("zero", [0, 2])
def test_a_stand_in_changes_nothing(forked, zero):
    def body() -> None:
        def updated(stand_ins: int) -> Tensor:
            torch.manual_seed(0)
            engine = Engine(nn.Linear(1, 1), ZeroBlock(stage=zero), bf16=False, optim=OptimBlock(lr=0.1))
            for micro in [Micro(Numbers(torch.ones(2)), [0, 1], True)] + [
                Micro(Numbers(7 * torch.ones(1)), [2], False)
            ] * stand_ins:
                total = engine(micro.rows.values[:, None]).square().sum()
                loss = micro.weighed(Loss({"a": (total, "rows", 1.0)}, {"loss": (total, "rows")}))
                assert micro.is_real or float(loss.metrics["loss"][0]) == 0
                assert micro.counted({"rows": torch.tensor(2)})["rows"] == (2 if micro.is_real else 0)
                engine.backward(loss, {"rows": 2.0})
            engine.step(0.1)
            return engine.module.weight.detach().clone()

        assert torch.equal(updated(0), updated(3))

    forked(body)


def test_ranks_score_their_own_answers_in_step(two_ranks):
    def body(rank: int) -> list[tuple[list[int], bool]]:
        tokens = [[4], [4, 4, 3, 1]][rank]
        attention = torch.arange(5) < torch.tensor(tokens)[:, None]
        return list(own_passes(Budget(5))(attention, 0, range(len(tokens))))

    first, second = two_ranks(body)
    assert first == [([0], True), ([0], False), ([0], False)]
    assert sorted(row for rows, is_real in second if is_real for row in rows) == [0, 1, 2, 3]


def test_answers_to_one_prompt_are_a_unit():
    attention = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    assert sampled_units(attention, 2, ["a", "b", "a"]) == [Unit((0, 2), (2, 3), 1), Unit((1,), (1,), 2)]
