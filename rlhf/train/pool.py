"""Rows that the ranks divide among themselves, and the one place where they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.batch import Loss
from rlhf.data.dealing import Unit, deal
from rlhf.engine import dist
from rlhf.recipe.stages import LabelRecipe, LearningRecipe, Recipe
from rlhf.rewards.scorer import Cut

CAREFUL = 1024  # tokens of a pass before memory was measured


@dataclass
class Budget:
    """How much goes through a model at once: tokens, prompts that rows share counted once, and rows. Every rank's.

    is_open: the tokens are still to be found, see `rlhf.train.memory`; until then passes are small.
    """

    tokens: int
    rows: int | None = None
    is_open: bool = False
    is_found: bool = False  # it was open, and what was found goes into every checkpoint

    @classmethod
    def of(cls, recipe: Recipe) -> Budget:
        """As a recipe says."""
        if isinstance(recipe, LabelRecipe):
            return cls(recipe.label.micro_tokens, recipe.label.micro_batch)
        assert isinstance(recipe, LearningRecipe)
        block = recipe.train
        if block.micro_batch == "auto":
            return cls(min(CAREFUL, block.micro_tokens), is_open=True)
        return cls(block.micro_tokens, block.micro_batch)

    def settle(self, tokens: int) -> None:
        """From here on, this many tokens."""
        self.tokens, self.is_open, self.is_found = tokens, False, True


@dataclass(frozen=True)
class Micro:
    """What goes through a model at once. A stand-in keeps a rank in step that has no row left, and counts nothing."""

    rows: Any  # a record of `rlhf.batch`
    places: list[int]  # of its rows in the pool
    is_real: bool

    def weighed(self, loss: Loss) -> Loss:
        """A loss of these rows; of a stand-in, the same pass through the model with a gradient and metrics of 0."""
        if self.is_real:
            return loss
        terms = {name: (0.0 * total, unit, weight) for name, (total, unit, weight) in loss.terms.items()}
        return Loss(terms, {name: (torch.zeros_like(total), unit) for name, (total, unit) in loss.metrics.items()})

    def counted(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts of these rows; a stand-in has none."""
        return counts if self.is_real else {name: torch.zeros_like(count) for name, count in counts.items()}


@dataclass(frozen=True)
class Pool:
    """Rows of all ranks, by their places 0, 1, ...; `batch` makes a record of any of them, on every rank."""

    units: list[Unit]
    batch: Callable[[list[int]], Any]
    further: dict[str, Pool] = field(default_factory=dict)  # what an objective of this group learns from instead
    records: Sequence[int] = ()  # numbers of the data's records that the rows are made of, where they are known

    def __len__(self) -> int:
        return sum(len(unit.rows) for unit in self.units)

    def of(self, group: str) -> Pool:
        """The rows that objectives of a group learn from."""
        return self.further[group] if group in self.further else self

    def records_of(self, micros: Iterable[Micro]) -> list[int]:
        """Numbers of the data's records behind these micro-batches, where they are known; stand-ins are left out."""
        if not self.records:
            return []
        return [self.records[place] for micro in micros if micro.is_real for place in micro.places]

    def cut(self, budget: Budget) -> Iterator[Micro]:
        """This rank's micro-batches; equally many on every rank, made when they are asked for."""
        turns = deal(self.units, budget.tokens, dist.world_size(), budget.rows)[dist.rank()]
        return in_turns(self.units, turns, self.batch)


def in_turns(units: Sequence[Unit], turns: list[list[int]], batch: Callable[[list[int]], Any]) -> Iterator[Micro]:
    """The micro-batches of these turns, a stand-in where a turn has no rows: the cheapest row there is."""
    alone = min((unit.shared + own, row) for unit in units for row, own in zip(unit.rows, unit.own, strict=True))[1]
    for rows in turns:
        yield Micro(batch(rows or [alone]), rows or [alone], bool(rows))


def own_passes(budget: Budget) -> Cut:
    """Cuts a rank's own answers into the passes of a reward model, see `rlhf.rewards.scorer`."""

    def cut(attention: Tensor, prompt_columns: int, groups: Sequence[Any]) -> Iterator[tuple[list[int], bool]]:
        units = sampled_units(attention, prompt_columns, groups)
        for micro in in_turns(units, own_turns(units, budget), list):
            yield micro.rows, micro.is_real

    return cut


def own_turns(units: Sequence[Unit], budget: Budget) -> list[list[int]]:
    """Turns of rows that are this rank's alone: equally many turns on every rank, whatever each has."""
    (turns,) = deal(units, budget.tokens, 1, budget.rows)
    return turns + [[] for _ in range(dist.max_over_ranks(len(turns)) - len(turns))]


def sampled_units(attention: Tensor, prompt_columns: int, groups: Sequence[Any]) -> list[Unit]:
    """Answers to one prompt as a unit. attention: (B, T), the prompt left of `prompt_columns`; groups: B prompts."""
    prompts, answers = attention[:, :prompt_columns].sum(-1).tolist(), attention[:, prompt_columns:].sum(-1).tolist()
    members: dict[Any, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    return [Unit(tuple(m), tuple(answers[i] for i in m), prompts[m[0]]) for m in members.values()]


def sampled_pool(sampled: Any, rows: list[int], answers: int, records: Sequence[int] = ()) -> Pool:
    """These rows of sampled answers; `answers` neighbours are those to one prompt. records: of all prompts."""
    chosen = sampled.attention[torch.tensor(rows, dtype=torch.int64)]
    columns = chosen.shape[1] - sampled.response_mask.shape[1]
    units = sampled_units(chosen, columns, [row // answers for row in rows])
    numbers = [records[row] for row in rows] if records else ()
    return Pool(units, lambda places: sampled.select([rows[place] for place in places]), records=numbers)


def at_places(found: Iterable[tuple[Micro, Tensor]], size: int) -> Tensor:
    """What was found for the rows of every rank's micro-batches, (b, ...) each, in the order of the pool: (size, ...).

    On every rank. Stand-ins are left out; every place is filled by one rank.
    """
    parts = [(micro.places if micro.is_real else [], value) for micro, value in found]
    rows = torch.cat([value[: len(places)] for places, value in parts])
    return dist.placed(rows, [place for places, _ in parts for place in places], size)
