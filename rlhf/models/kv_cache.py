"""Keys and values of answers that are being sampled: a prompt's are held once, however many answers it has.

The cache attends itself, as the layout that a forward pass is handed (`rlhf.models.attention`). Its memory is laid out
once for `slots` answers. Answers that are sampled sit in the first slots and their prompts in the first places, so that
all matrix products read views: one that leaves is replaced by the last, which copies a single slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


@dataclass(frozen=True)
class LayerMemory:
    """One layer's keys and values: of prompts (places, Hkv, P, D), of answers (slots, Hkv, R, D)."""

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Segment:
    """A prompt in the flat row of a prefill: its tokens are start..stop - 1, its place in the cache."""

    start: int
    stop: int
    place: int


class KeyValueCache:
    """b answers of n prompts in the cache; `slots` and `places` are the most there may be of either.

    width: the longest prompt, room: the longest answer, both in tokens.
    """

    def __init__(self, *, slots: int, places: int, width: int, room: int, device: torch.device) -> None:
        self.slots, self.places, self.width, self.room, self.device = slots, places, width, room, device
        self.layers: dict[int, LayerMemory] = {}
        self.prompt_lengths: list[int] = []  # of the n prompts
        self.place_of: list[int] = []  # of the b answers
        self.lengths: list[int] = []  # tokens of the b answers that are in the cache

    # --- who is in ---

    def add_prompts(self, lengths: list[int]) -> list[Segment]:
        """Places for prompts of these lengths; the segments lie one behind the other."""
        segments, start = [], 0
        for length in lengths:
            segments.append(Segment(start, start + length, len(self.prompt_lengths)))
            self.prompt_lengths.append(length)
            start += length
        assert len(self.prompt_lengths) <= self.places
        return segments

    def add_answers(self, places: list[int]) -> None:
        """Answers without a token yet, each to the prompt at its place."""
        self.place_of += places
        self.lengths += [0] * len(places)
        assert len(self.lengths) <= self.slots

    def drop_answers(self, kept: list[int]) -> None:
        """Slot i is taken by what is in slot kept[i]; what is not kept leaves."""
        moved = [(slot, old) for slot, old in enumerate(kept) if slot != old]
        for layer in self.layers.values() if moved else ():
            _move(layer.keys, moved)
            _move(layer.values, moved)
        self.place_of, self.lengths = ([values[old] for old in kept] for values in (self.place_of, self.lengths))

    def drop_prompts(self, kept: list[int]) -> None:
        """The same for prompts: place i is taken by the prompt at kept[i]. None that leaves may have answers here."""
        moved = [(place, old) for place, old in enumerate(kept) if place != old]
        for layer in self.layers.values() if moved else ():
            _move(layer.prompt_keys, moved)
            _move(layer.prompt_values, moved)
        new = {old: place for place, old in enumerate(kept)}
        self.prompt_lengths = [self.prompt_lengths[old] for old in kept]
        self.place_of = [new[place] for place in self.place_of]

    # --- what a forward pass is handed ---

    def reading(self, segments: list[Segment]) -> Reading:
        """The layout of a prefill."""
        return Reading(self, segments)

    def decoding(self) -> Decoding:
        """The layout of one more token of each of the b answers, which is counted in `lengths` from now on."""
        self.lengths = [length + 1 for length in self.lengths]
        return Decoding(self)

    def memory(self, layer: int, key: Tensor, value: Tensor) -> LayerMemory:
        """A layer's memory, laid out when the layer is first seen with (., Hkv, ., D) keys and values."""
        if layer not in self.layers:
            sizes = ((self.places, self.width), (self.slots, self.room))
            # Zeros: what is masked is still multiplied by a probability of 0, which NaN would survive.
            # A CPU multiplies small matrices in float32 faster than it copies narrower ones into its own order.
            dtype = torch.float32 if key.device.type == "cpu" else key.dtype
            made = [x.new_zeros(n, x.shape[1], t, x.shape[3], dtype=dtype) for n, t in sizes for x in (key, value)]
            self.layers[layer] = LayerMemory(*made)
        return self.layers[layer]


def _move(values: Tensor, moved: list[tuple[int, int]]) -> None:
    """Copy rows (to, from); no row is both."""
    for to, old in moved:
        values[to] = values[old]


def holes_filled(keep: list[bool]) -> list[int]:
    """Which old place each remaining one takes: those that stay in front stay, the last fill the holes of others."""
    count = sum(keep)
    tail = [place for place in range(count, len(keep)) if keep[place]]
    return [place if keep[place] else tail.pop() for place in range(count)]


class Reading:
    """Prompts, read in one flat row without padding: each token attends to those of its own prompt before it."""

    def __init__(self, cache: KeyValueCache, segments: list[Segment]) -> None:
        self.cache, self.segments = cache, segments
        self.masks: dict[tuple[int, int], Tensor] = {}

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        dropout: float = 0.0,
    ) -> Tensor:
        """query (1, H, N, D), key and value (1, Hkv, N, D) -> (1, N, H, Dv); nothing drops out in sampling."""
        memory = self.cache.memory(layer, key, value)
        found = []
        for segment in self.segments:
            columns, length = slice(segment.start, segment.stop), segment.stop - segment.start
            k, v = key[:, :, columns], value[:, :, columns]
            memory.prompt_keys[segment.place, :, :length] = k[0]
            memory.prompt_values[segment.place, :, :length] = v[0]
            mask = self.mask(length, window) if window is not None and length > window else None
            found.append(
                scaled_dot_product_attention(
                    query[:, :, columns], k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=True
                )
            )
        return torch.cat(found, 2).transpose(1, 2)

    def mask(self, length: int, window: int) -> Tensor:
        """(length, length), true where the column is one of the `window` tokens up to the row's own."""
        if (length, window) not in self.masks:
            ones = torch.ones(length, length, dtype=torch.bool, device=self.cache.device)
            self.masks[length, window] = ones.tril().triu(1 - window)
        return self.masks[length, window]


class Decoding:
    """One token per answer. Answers to a prompt are multiplied with its keys together, and each with its own.

    Both kinds of scores go through one softmax.
    """

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache = cache
        self.count, self.prompts = len(cache.lengths), len(cache.prompt_lengths)
        self.wide, self.longest = max(cache.prompt_lengths), max(cache.lengths)
        self.grid, self.members = _grid(cache.place_of, self.prompts)
        self.is_square = self.grid == list(range(self.prompts * self.members))
        self.index = torch.tensor(self.grid, device=cache.device)
        self.slots = torch.arange(self.count, device=cache.device)
        self.is_even = min(cache.lengths) == self.longest
        self.lengths = torch.tensor(cache.lengths, device=cache.device)
        self.masks: dict[int | None, Tensor | None] = {}

    def next(self) -> None:
        """Move on by a token, with the same answers."""
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        self.lengths += 1
        self.longest += 1
        self.masks = {}

    @property
    def own(self) -> tuple[Any, ...]:
        """Where this token's keys and values go: an index of (slots, Hkv, R, D)."""
        if self.is_even:  # a slice is several times faster
            return slice(self.count), slice(None), self.longest - 1
        return self.slots, slice(None), self.lengths - 1

    @property
    def positions(self) -> Tensor:
        """(b, 1) positions of the tokens."""
        prompts = torch.tensor(self.cache.prompt_lengths, device=self.cache.device)
        places = torch.tensor(self.cache.place_of, device=self.cache.device)
        return (prompts[places] + self.lengths - 1)[:, None]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        dropout: float = 0.0,
    ) -> Tensor:
        """query (b, H, 1, D), key and value (b, Hkv, 1, D) -> (b, 1, H, Dv); nothing drops out."""
        memory, n, b = self.cache.memory(layer, key, value), self.prompts, self.count
        groups, dim, wide = key.shape[1], query.shape[-1], self.wide
        narrow, query = query.dtype, query.reshape(b, groups, -1, dim).to(memory.keys.dtype)
        if scale != 1:
            query = query * (1 / math.sqrt(dim) if scale is None else scale)
        memory.keys[self.own] = key[:, :, 0].to(memory.keys.dtype)
        memory.values[self.own] = value[:, :, 0].to(memory.keys.dtype)
        keys, values = (x[:b, :, : self.longest] for x in (memory.keys, memory.values))
        of_prompt = self.by_prompt(query) @ memory.prompt_keys[:n, :, :wide].transpose(-1, -2)
        scores = torch.cat([self.by_answer(of_prompt), query @ keys.transpose(-1, -2)], -1)  # (b, Hkv, q, P + R)
        if (mask := self.mask(window, scores.dtype)) is not None:
            scores += mask
        probs = scores.softmax(-1)
        from_prompt = self.by_prompt(probs[..., :wide]) @ memory.prompt_values[:n, :, :wide]
        found = self.by_answer(from_prompt) + probs[..., wide:] @ values
        return found.reshape(b, 1, groups * query.shape[2], -1).to(narrow)

    def by_prompt(self, values: Tensor) -> Tensor:
        """(b, Hkv, q, X) -> (n, Hkv, G * q, X): answers to a prompt side by side, with room for as many to each."""
        _, groups, queries, size = values.shape
        if not self.is_square:
            spread = values.new_zeros(self.prompts * self.members, groups, queries, size)
            values = spread.index_copy_(0, self.index, values)
        values = values.view(self.prompts, self.members, groups, queries, size).transpose(1, 2)
        return values.reshape(self.prompts, groups, self.members * queries, size)

    def by_answer(self, values: Tensor) -> Tensor:
        """The way back."""
        _, groups, _, size = values.shape
        values = values.view(self.prompts, groups, self.members, -1, size).transpose(1, 2)
        values = values.reshape(self.prompts * self.members, groups, -1, size)
        return values if self.is_square else values[self.index]

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(b, 1, 1, P + R), 0 where a token may attend, -inf elsewhere; None where it may everywhere."""
        if window not in self.masks:
            self.masks[window] = self._mask(window, dtype)
        return self.masks[window]

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        cache = self.cache
        lengths = [cache.prompt_lengths[place] for place in cache.place_of]
        if min(lengths) == self.wide and min(cache.lengths) == self.longest:
            if window is None or self.wide + self.longest <= window:
                return None
        prompts = torch.tensor(lengths, device=cache.device)[:, None]  # (b, 1)
        before = torch.arange(self.wide, device=cache.device)  # positions of the prompt's tokens
        own = torch.arange(self.longest, device=cache.device)
        allowed = torch.cat([before < prompts, own < self.lengths[:, None]], 1)
        if window is not None:
            first = prompts + self.lengths[:, None] - window
            allowed &= torch.cat([before >= first, own + prompts >= first], 1)
        mask = torch.zeros(allowed.shape, dtype=dtype, device=cache.device).masked_fill_(~allowed, -torch.inf)
        return mask[:, None, None]


def _grid(place_of: list[int], prompts: int) -> tuple[list[int], int]:
    """Where each answer stands in a grid of prompts x members, and how many members it needs."""
    counts = [0] * prompts
    ranks = []
    for place in place_of:
        ranks.append(counts[place])
        counts[place] += 1
    members = max(counts)
    return [place * members + rank for place, rank in zip(place_of, ranks, strict=True)], members
