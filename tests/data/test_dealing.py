"""Dealing rows to ranks and micro-batches: all rows once, within the budget, together where they can be, evenly."""

from __future__ import annotations

import random

import pytest

from rlhf.data.dealing import Unit, deal


def draw(seed: int) -> tuple[list[Unit], int, int, int | None]:
    """Prompts with one to eight answers, a budget that is tight or wide, ranks, and a bound on rows or none."""
    chance = random.Random(seed)
    units, row = [], 0
    for _ in range(chance.randint(1, 30)):
        own = tuple(chance.randint(1, 90) for _ in range(chance.choice((1, 1, 1, 4, 8))))
        units.append(Unit(tuple(range(row, row + len(own))), own, chance.randint(0, 40)))
        row += len(own)
    return units, chance.choice((30, 64, 300, 2000, 10_000)), chance.randint(1, 5), chance.choice((None, None, 1, 3, 8))


def cost(units: list[Unit], rows: list[int]) -> int:
    """Tokens of a pass: shared ones once for each prompt that has a row in it."""
    total = 0
    for unit in units:
        here = [own for row, own in zip(unit.rows, unit.own, strict=True) if row in rows]
        total += sum(here) + (unit.shared if here else 0)
    return total


@pytest.mark.parametrize("seed", range(60))
def test_every_row_once_within_the_budget_and_together(seed):
    units, budget, world, most = draw(seed)
    dealt = deal(units, budget, world, most)
    assert dealt == deal(units, budget, world, most)
    assert len(dealt) == world and len({len(turns) for turns in dealt}) == 1
    micros = [rows for turns in dealt for rows in turns if rows]
    assert sorted(row for rows in micros for row in rows) == [row for unit in units for row in unit.rows]
    for rows in micros:
        assert len(rows) <= (most or 10**9)
        assert cost(units, rows) <= budget or len(rows) == 1
    for unit in units:  # apart only where it must be
        holders = sum(bool(set(unit.rows) & set(rows)) for rows in micros)
        fits = unit.tokens <= budget and len(unit.rows) <= (most or 10**9)
        assert holders == 1 or not fits or len(units) < world
    turns = [max(cost(units, rows) for rows in turn) for turn in zip(*dealt, strict=True)]
    assert turns == sorted(turns, reverse=True)
    assert all(any(turn) for turn in zip(*dealt, strict=True)), "no turn for nothing"


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_are_in_balance_and_passes_few(seed, world):
    """Of many single rows: within an eighth of the least number of passes, ranks within the longest row."""
    chance = random.Random(seed)
    lengths = [chance.randint(20, 400) for _ in range(200)]
    dealt = deal([Unit.single(i, n) for i, n in enumerate(lengths)], 2000, world)
    least = -(-sum(lengths) // (2000 * world))
    assert len(dealt[0]) <= max(least + 1, 1.125 * least)
    loads = [sum(lengths[row] for rows in turns for row in rows) for turns in dealt]
    assert max(loads) - min(loads) <= max(lengths)
    pace = sum(max(sum(lengths[row] for row in rows) for rows in turn) for turn in zip(*dealt, strict=True))
    assert pace <= 1.05 * sum(lengths) / world + max(lengths)


def test_few_rows_are_spread_over_the_ranks():
    group = Unit(tuple(range(8)), (9, 8, 7, 6, 5, 4, 3, 2), 10)
    first, second = deal([group], 1000, 2)
    assert first == [[0, 2, 4, 6]] and second == [[1, 3, 5, 7]]
    assert deal([group], 1000, 1) == [[list(range(8))]]
    assert deal([Unit.single(0, 5)], 1000, 3) == [[[0]], [[]], [[]]]
    assert deal([], 1000, 2) == [[], []]


def test_a_long_row_goes_alone_and_first():
    units = [Unit.single(0, 10), Unit.single(1, 500), Unit.single(2, 20)]
    assert deal(units, 100, 1) == [[[1], [2, 0]]]


def test_the_prompt_of_a_group_is_counted_once():
    groups = [Unit((0, 1, 2), (10, 10, 10), 70), Unit((3, 4, 5), (10, 10, 10), 70)]
    assert deal(groups, 100, 1) == [[[0, 1, 2], [3, 4, 5]]]
    assert deal(groups, 99, 1) == [[[0, 1], [3, 4], [2], [5]]]
    assert deal(groups, 200, 1) == [[[0, 1, 2, 3, 4, 5]]]
