"""The order of rows: a pure function of seed and step, shared out without a rank's influence."""

from __future__ import annotations

import pytest

from rlhf.data import order


def test_every_row_once_per_epoch_and_tails_continue() -> None:
    seen = [row for step in range(7) for row in order.rows(10, 6, step, seed=3)]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_may_hold_several_epochs() -> None:
    assert sorted(order.rows(3, 7, 0, seed=0) + order.rows(3, 7, 1, seed=0)[:2]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_steps_are_a_pure_function_of_seed_and_step() -> None:
    forward = [order.rows(50, 8, step, seed=1) for step in range(40)]
    backward = [order.rows(50, 8, step, seed=1) for step in reversed(range(40))]
    assert forward == backward[::-1]
    assert order.rows(50, 8, 0, seed=2) != forward[0]
    assert order.rows(10, 10, 0, seed=5) == [7, 4, 5, 2, 6, 3, 8, 0, 9, 1]  # a run can be resumed by a later version


@pytest.mark.parametrize("world", [1, 2, 4])
def test_all_ranks_together_see_the_same_global_batch(world: int) -> None:
    rows = order.rows(100, 8, 5, seed=0)
    shares = [order.share(rows, rank, world) for rank in range(world)]
    assert [row for share in shares for row in share] == rows
    assert {len(share) for share in shares} == {8 // world}


def test_uneven_shares_are_a_mistake() -> None:
    with pytest.raises(AssertionError):
        order.share([1, 2, 3], 0, 2)


def test_purposes_draw_apart() -> None:
    draws = {
        tuple(order.generator(seed, purpose, n).integers(0, 1 << 30, 4).tolist())
        for seed, purpose, n in ((0, "a", 1), (0, "b", 1), (1, "a", 1), (0, "a", 2))
    }
    assert len(draws) == 4
