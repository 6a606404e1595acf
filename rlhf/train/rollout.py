"""Answers to prompts from the current policy: sampled by all ranks at once, or in turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf.batch import Rollout
from rlhf.data import collate
from rlhf.data.examples import PromptExample
from rlhf.engine import dist
from rlhf.models import sample

Batch, Result = TypeVar("Batch"), TypeVar("Result")


@dataclass(frozen=True)
class Sampler:
    """How this stage turns prompts into answers; shared with the sample generations of every stage."""

    stop_ids: list[int]
    pad_id: int
    decode: Callable[[list[int]], str]
    poll: Callable[[], None] = lambda: None  # raises where sampling must end early
    engine: sample.Generator = sample.generate


def generate(
    policy: Any, prompts: list[PromptExample], seeds: list[int], sampling: Any, sampler: Sampler, slots: int = 64
) -> Rollout:
    """Answers to prompts, len(seeds) / len(prompts) each, of which `slots` are sampled at a time."""
    return sampler.engine(
        policy,
        collate.prompts(prompts, sampler.pad_id),
        answers=len(seeds) // len(prompts),
        sampling=sampling,
        stop_ids=sampler.stop_ids,
        pad_id=sampler.pad_id,
        seeds=seeds,
        decode=sampler.decode,
        slots=slots,
        poll=sampler.poll,
    )


def in_turns(batches: Sequence[Batch], work: Callable[[Batch], list[Result]]) -> list[Result]:
    """The results of all batches, on every rank. The ranks take turns.

    Every rank works equally often, since sharded models are called in step: where a turn has no batch left for a rank,
    it works on the last one, whose further results are dropped.
    """
    mine: list[Result] = []
    for turn in range(math.ceil(len(batches) / dist.world_size())):
        number = turn * dist.world_size() + dist.rank()
        found = work(batches[min(number, len(batches) - 1)])
        mine += found if number < len(batches) else []
    return list(itertools.chain.from_iterable(dist.gather_objects(mine)))
