"""Sampling answers: a prompt is read once for all its answers, and whoever has finished makes room for who waits.

An answer is a function of the weights, its prompt and its seed: not of the other rows, of how many are sampled at a
time, nor of the rank. (Equal up to the rounding of batched matrix products, which can turn a draw only where it falls
on the edge between two tokens.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import torch
from torch import Tensor

from rlhf.batch import Prompts, Rollout
from rlhf.errors import RecipeError
from rlhf.models.attention import Step
from rlhf.models.build import max_positions
from rlhf.models.cached import Wave
from rlhf.models.draw import Drawn
from rlhf.models.forward import PolicyModule, evaluating
from rlhf.models.kv_cache import Decoding, KeyValueCache, holes_filled
from rlhf.models.load import DTYPES
from rlhf.recipe.schema import SamplingBlock

# Those who wait enter a few at a time: reading one prompt costs hardly less than reading several.
_ENTER_TOGETHER = 1 / 8


class Generator(Protocol):
    """Whatever answers prompts: `generate` here, or an engine outside of this process."""

    def __call__(
        self,
        policy: PolicyModule,
        prompts: Prompts,
        *,
        answers: int,
        sampling: SamplingBlock,
        stop_ids: Collection[int],
        pad_id: int,
        seeds: list[int],
        decode: Callable[[list[int]], str],
        slots: int,
        poll: Callable[[], None],
    ) -> Rollout:
        """`answers` answers to each prompt; row n * answers + g is answer g of prompt n. Tensors come back on the CPU.

        policy: with whole weights. seeds: one per row; equal seeds give equal answers. An answer ends with a token of
        `stop_ids`, which belongs to it, or unfinished after `sampling.max_new_tokens`. R is the length of the longest
        answer of this call. `sample_logprobs` are those of the distribution that was drawn from, after temperature,
        top-k and top-p, in nats. slots: answers sampled at a time, which decides the speed and the memory alone. poll:
        called again and again on the way; it raises where sampling must end early.
        """


@torch.no_grad()
def generate(
    policy: PolicyModule,
    prompts: Prompts,
    *,
    answers: int,
    sampling: SamplingBlock,
    stop_ids: Collection[int],
    pad_id: int,
    seeds: list[int],
    decode: Callable[[list[int]], str],
    slots: int = 64,
    poll: Callable[[], None] = lambda: None,
) -> Rollout:
    """A `Generator` in this process, on the policy's own weights and device.

    Tokens are drawn by inverting the cumulative distribution at uniforms drawn up front from each row's seed (of which
    torch uses the lower 32 bits). Models whose attention takes layouts run on a cache of our own; others run on that of
    transformers, where the answers to as many prompts as `slots` has room for are sampled before the next ones enter.
    """
    assert len(seeds) == len(prompts) * answers, f"{len(prompts)} x {answers} rows need as many seeds, got {len(seeds)}"
    _check_room(policy, prompts, sampling.max_new_tokens)
    device = next(policy.parameters()).device
    drawn = Drawn(sampling, seeds, stop_ids, pad_id, device)
    dtype = None if sampling.decode_dtype == "auto" else DTYPES[sampling.decode_dtype]
    with evaluating(policy), policy.decoding(dtype) as forward:
        if forward is not None:
            engine = _Engine(forward, prompts, answers, drawn, slots)
            while engine.step():
                poll()
        else:
            together = max(1, slots // answers)
            for start in range(0, len(prompts), together):
                wave = Wave(policy, prompts, answers, drawn, range(start, min(start + together, len(prompts))))
                while wave.step():
                    poll()
    return drawn.rollout(prompts, answers, decode)


class _Engine:
    """Continuous batching. Of the B rows of the result, b are in the cache, in slots 0..b - 1, and others wait."""

    def __init__(self, forward: Step, prompts: Prompts, answers: int, drawn: Drawn, slots: int) -> None:
        total, device = len(drawn.lengths), drawn.tokens.device
        self.forward, self.answers, self.drawn, self.device = forward, answers, drawn, device
        self.prompts = [ids[real] for ids, real in zip(prompts.ids.cpu(), prompts.attention.cpu().bool(), strict=True)]
        slots = min(slots, total)
        self.cache = KeyValueCache(
            slots=slots,
            places=min(slots, len(prompts)),
            width=max(map(len, self.prompts)),
            room=drawn.tokens.shape[1],
            device=device,
        )
        self.enter_together = max(1, int(slots * _ENTER_TOGETHER))
        self.entered = 0  # rows enter in their order
        self.rows: list[int] = []  # in the slots
        self.read: list[int] = []  # prompts in the places
        self.first: dict[int, Tensor] = {}  # prompt -> logits of an answer's first token, while answers to it wait
        self.choice = torch.zeros(0, dtype=torch.long, device=device)  # the last token in every slot
        self.layout: Decoding | None = None  # None: who is in the cache has changed

    def step(self) -> bool:
        """Sample one token of every answer in the cache, new ones included. False when all are done."""
        found = [self.advance()] if self.rows else []
        waiting = len(self.drawn.lengths) - self.entered
        if waiting and self.cache.slots - len(self.rows) >= min(waiting, self.enter_together):
            found.append(self.enter())
        self.choice, keep = self.drawn.draw(self.rows, torch.cat(found) if len(found) > 1 else found[0])
        if not all(keep):
            self.leave(keep)
        return bool(self.rows) or self.entered < len(self.drawn.lengths)

    def advance(self) -> Tensor:
        """Run the model on the tokens just drawn; logits (b, V) of what follows them."""
        if self.layout is None:
            self.layout = self.cache.decoding()
        else:
            self.layout.next()
        return self.forward(self.choice[:, None], self.layout.positions, self.layout, None)

    def enter(self) -> Tensor:
        """Let in as many answers as there is room for; their first logits (m, V)."""
        end = min(self.entered + self.cache.slots - len(self.rows), len(self.drawn.lengths))
        rows = list(range(self.entered, end))
        prompts = [row // self.answers for row in rows]
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.first]:
            self.read_prompts(new)
        self.cache.add_answers([self.read.index(prompt) for prompt in prompts])
        self.rows += rows
        self.entered, self.layout = end, None
        logits = torch.stack([self.first[prompt] for prompt in prompts])
        self.first = {prompt: each for prompt, each in self.first.items() if (prompt + 1) * self.answers > end}
        return logits

    def read_prompts(self, new: list[int]) -> None:
        """Run the model on prompts, in one row without padding."""
        device, ids = self.device, [self.prompts[prompt] for prompt in new]
        segments = self.cache.add_prompts(list(map(len, ids)))
        positions = torch.cat([torch.arange(len(each)) for each in ids]).to(device)
        last = torch.tensor([segment.stop - 1 for segment in segments], device=device)
        logits = self.forward(torch.cat(ids)[None].to(device), positions[None], self.cache.reading(segments), last)
        self.read += new
        self.first |= dict(zip(new, logits, strict=True))

    def leave(self, keep: list[bool]) -> None:
        """Take ended answers out of the cache, and prompts that nobody needs any more."""
        kept = holes_filled(keep)
        self.cache.drop_answers(kept)
        self.rows = [self.rows[old] for old in kept]
        self.choice = self.choice[torch.tensor(kept, dtype=torch.long, device=self.choice.device)]
        needed = {row // self.answers for row in self.rows} | self.first.keys()
        kept = holes_filled([prompt in needed for prompt in self.read])
        self.cache.drop_prompts(kept)
        self.read = [self.read[old] for old in kept]
        self.layout = None


def _check_room(policy: PolicyModule, prompts: Prompts, max_new_tokens: int) -> None:
    room, longest = max_positions(policy.core.config), int(prompts.attention.sum(-1).max())
    if room is not None and longest + max_new_tokens > room:
        raise RecipeError(
            f"expected at most {room - longest}: the model has {room} positions and a prompt takes {longest},"
            f" found {max_new_tokens}",
            where="sampling.max_new_tokens",
            fix="Lower it, or limit prompts with data.max_prompt_length.",
        )
