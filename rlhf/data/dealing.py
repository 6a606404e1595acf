"""Dealing rows out to ranks and micro-batches by their number of tokens: a pure function, the same on every rank.

A unit is what a model reads most cheaply in one pass: answers to one prompt, whose tokens are then computed once. A
turn is one pass on every rank; ranks wait for each other, so a turn takes as long as its largest micro-batch.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

Rows = list[int]


@dataclass(frozen=True)
class Unit:
    """Rows with tokens in common: single rows, or the answers to one prompt."""

    rows: tuple[int, ...]
    own: tuple[int, ...]  # tokens of every row that no other has
    shared: int = 0  # tokens that all of them begin with

    @classmethod
    def single(cls, row: int, tokens: int) -> Unit:
        """A row that has nothing in common with others."""
        return cls((row,), (tokens,))

    @property
    def tokens(self) -> int:
        """What one pass over all its rows costs."""
        return self.shared + sum(self.own)

    def part(self, picked: Sequence[int]) -> Unit:
        """The rows at these places of the unit, as a unit of their own."""
        return Unit(tuple(self.rows[i] for i in picked), tuple(self.own[i] for i in picked), self.shared)


def deal(units: Sequence[Unit], budget: int, world: int, most_rows: int | None = None) -> list[list[Rows]]:
    """For every rank the rows of each of its micro-batches; equally many on all of them, as few as can be.

    budget: tokens of a micro-batch; only a row that is longer by itself has one over it, alone. most_rows: of a
    micro-batch. A rank that has nothing in a turn has an empty list there. Units are taken apart where one does not fit
    into a micro-batch, or where there are fewer than ranks. Heaviest turns first, so that memory errors show at once.

    The number of micro-batches is that of best-fit decreasing; they are then evened out, longest processing time first
    [Graham 1969, Bounds on multiprocessing timing anomalies], where this keeps to the budget. All ties are broken by
    the order of the units.
    """
    assert budget > 0 and world > 0 and (most_rows is None or most_rows > 0), (budget, world, most_rows)
    limits = _Limits(budget, sum(len(unit.rows) for unit in units) if most_rows is None else most_rows)
    pieces = [piece for unit in units for piece in _fitting(unit, limits)]
    pieces = sorted(_enough(pieces, world), key=lambda piece: -piece.tokens)
    if not pieces:
        return [[] for _ in range(world)]
    packed = _best_fit(pieces, limits)
    turns = math.ceil(len(packed) / world)
    bins = _even(pieces, turns * world, limits) or packed
    return _in_turns(bins, turns, world)


@dataclass(frozen=True)
class _Limits:
    tokens: int
    rows: int


class _Bin:
    """A micro-batch while it is filled."""

    def __init__(self) -> None:
        self.tokens, self.rows = 0, Rows()

    def add(self, unit: Unit) -> None:
        self.tokens += unit.tokens
        self.rows += unit.rows


def _fitting(unit: Unit, limits: _Limits) -> list[Unit]:
    """A unit as it is, or in pieces that fit: its longest rows first, each to the first piece with room."""
    if unit.tokens <= limits.tokens and len(unit.rows) <= limits.rows:
        return [unit]
    pieces: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(unit.rows)), key=lambda i: -unit.own[i]):
        for number, piece in enumerate(pieces):
            if unit.own[i] <= room[number] and len(piece) < limits.rows:
                piece.append(i)
                room[number] -= unit.own[i]
                break
        else:
            pieces.append([i])
            room.append(limits.tokens - unit.shared - unit.own[i])
    return [unit.part(sorted(piece)) for piece in pieces]


def _enough(pieces: list[Unit], world: int) -> list[Unit]:
    """At least as many pieces as ranks, while any can be halved: the heaviest first."""
    while len(pieces) < world:
        divisible = [i for i, piece in enumerate(pieces) if len(piece.rows) > 1]
        if not divisible:
            break
        at = max(divisible, key=lambda i: (pieces[i].tokens, -i))
        longest_first = sorted(range(len(pieces[at].rows)), key=lambda i: -pieces[at].own[i])
        halves = [pieces[at].part(sorted(longest_first[side::2])) for side in (0, 1)]
        pieces = [*pieces[:at], *halves, *pieces[at + 1 :]]
    return pieces


def _best_fit(pieces: list[Unit], limits: _Limits) -> list[_Bin]:
    """Each piece to the fullest micro-batch that has room for it. pieces: heaviest first."""
    bins: list[_Bin] = []
    free: list[tuple[int, int]] = []  # (room in tokens, number) of those that have room, in order
    for piece in pieces:
        at = bisect.bisect_left(free, (piece.tokens, -1))
        while at < len(free) and len(bins[free[at][1]].rows) + len(piece.rows) > limits.rows:
            at += 1
        number = free.pop(at)[1] if at < len(free) else len(bins)
        if number == len(bins):
            bins.append(_Bin())
        bins[number].add(piece)
        room = limits.tokens - bins[number].tokens
        if room > 0 and len(bins[number].rows) < limits.rows:
            bisect.insort(free, (room, number))
    return bins


def _even(pieces: list[Unit], count: int, limits: _Limits) -> list[_Bin] | None:
    """Each piece to the lightest of `count` micro-batches; None where one of them gets too large."""
    bins = [_Bin() for _ in range(count)]
    lightest = [(0, number) for number in range(count)]
    for piece in pieces:
        full = []
        while lightest and len(bins[lightest[0][1]].rows) + len(piece.rows) > limits.rows:
            full.append(heapq.heappop(lightest))
        if not lightest:
            return None
        number = lightest[0][1]
        if bins[number].rows and bins[number].tokens + piece.tokens > limits.tokens:
            return None
        bins[number].add(piece)
        heapq.heapreplace(lightest, (bins[number].tokens, number))
        for each in full:
            if len(bins[each[1]].rows) < limits.rows:
                heapq.heappush(lightest, each)
    return bins


def _in_turns(bins: list[_Bin], turns: int, world: int) -> list[list[Rows]]:
    """Micro-batches of like weight in one turn; within it the heaviest goes to the rank with the least so far."""
    ordered = sorted(bins, key=lambda each: -each.tokens) + [_Bin() for _ in range(turns * world - len(bins))]
    dealt: list[list[Rows]] = [[] for _ in range(world)]
    load = [0] * world
    for turn in range(turns):
        ranks = sorted(range(world), key=lambda rank: load[rank])
        for rank, each in zip(ranks, ordered[turn * world : (turn + 1) * world], strict=True):
            dealt[rank].append(each.rows)
            load[rank] += each.tokens
    return dealt
