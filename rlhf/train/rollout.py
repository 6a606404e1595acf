"""Answers to prompts from the current policy: sampled in chunks, joined to one rollout."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

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


def generate(policy: Any, prompts: list[PromptExample], seeds: list[int], sampling: Any, sampler: Sampler) -> Rollout:
    """Answers to prompts, len(seeds) / len(prompts) each."""
    batch = collate.prompts(prompts, sampler.pad_id)
    return sample.generate(
        policy,
        batch,
        answers=len(seeds) // len(prompts),
        sampling=sampling,
        stop_ids=sampler.stop_ids,
        pad_id=sampler.pad_id,
        seeds=seeds,
        decode=sampler.decode,
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


def join_rollouts(parts: list[Rollout], pad_id: int) -> Rollout:
    """Rollouts of several chunks as one, padded to common prompt and response widths."""
    wide_r = max(part.response_mask.shape[1] for part in parts)
    wide_p = max(part.ids.shape[1] - part.response_mask.shape[1] for part in parts)
    widened = []
    for part in parts:
        responses = part.response_mask.shape[1]
        left, right = wide_p - (part.ids.shape[1] - responses), wide_r - responses
        pad = torch.nn.functional.pad
        widened.append(
            Rollout(
                pad(part.ids, (left, right), value=pad_id),
                pad(part.attention, (left, right)),
                pad(part.response_mask, (0, right)),
                pad(part.sample_logprobs, (0, right)),
                part.finished,
                part.texts,
                part.rows,
            )
        )
    tensors = [
        torch.cat([getattr(part, name) for part in widened])
        for name in ("ids", "attention", "response_mask", "sample_logprobs", "finished")
    ]
    return Rollout(*tensors, [t for part in widened for t in part.texts], [r for part in widened for r in part.rows])
