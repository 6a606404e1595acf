"""Sampling in plain torch, as lean as it gets: prompts read once for their answers, a static cache, finished answers
leave, and tokens are drawn by inverting the cumulative distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench.raw_model import Flat, Ids, RawLlama, Segment, attend_segments

_COMPACT_BELOW = 0.75  # share of growing answers below which finished ones are taken out of the cache


@dataclass
class Sampled:
    """Answers, prompt by prompt, and the log-probs of their tokens."""

    answers: list[list[int]]
    logprobs: list[Tensor]


@torch.no_grad()
def generate(
    model: RawLlama, prompts: Sequence[Ids], answers: int, limit: int, stop_ids: Sequence[int], seed: int
) -> Sampled:
    """`answers` answers of at most `limit` tokens to each prompt, from the model's own distribution."""
    draw = torch.Generator(model.norm.device).manual_seed(seed)
    stops = torch.tensor(stop_ids)
    cache, hidden = _read(model, prompts, answers, limit)
    total = len(prompts) * answers
    tokens, logprobs = torch.zeros(total, limit, dtype=torch.long), torch.zeros(total, limit)
    lengths = torch.full((total,), limit)
    rows, alive = torch.arange(total), torch.ones(total, dtype=torch.bool)
    for step in range(limit):
        logits = F.linear(hidden, model.head).float()  # (b, V)
        chances = logits.softmax(-1)
        sums = chances.cumsum(-1)
        point = torch.rand(len(rows), 1, generator=draw) * sums[:, -1:]
        choice = torch.searchsorted(sums, point, right=True).clamp(max=logits.shape[-1] - 1)  # (b, 1)
        tokens[rows, step] = choice[:, 0]
        logprobs[rows, step] = chances.gather(1, choice)[:, 0].log()
        ended = alive & torch.isin(choice[:, 0], stops)
        lengths[rows[ended]] = step + 1
        alive &= ~ended
        if step + 1 == limit or not alive.any():
            break
        if float(alive.float().mean()) < _COMPACT_BELOW:
            kept = alive.nonzero()[:, 0]
            cache.select(kept)
            rows, choice, alive = rows[kept], choice[kept], alive[kept]
        hidden = model.hidden(choice[:, 0], cache.lengths + step, cache.at(step))
    cut = [(tokens[i, :length].tolist(), logprobs[i, :length]) for i, length in enumerate(lengths.tolist())]
    return Sampled([each for each, _ in cut], [each for _, each in cut])


class _Cache:
    """Keys and values of b growing answers: prompts end in column `width`, answers follow."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], lengths: Tensor, width: int) -> None:
        self.keys, self.values = keys, values  # (b, Hkv, columns, D) each, one per layer
        self.lengths, self.width = lengths, width  # (b,) tokens of the prompts
        columns = torch.arange(keys[0].shape[2])
        self.seen = (columns >= width - lengths[:, None])[:, None, None]  # (b, 1, 1, columns)

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        self.keys = [key[rows] for key in self.keys]
        self.values = [value[rows] for value in self.values]
        self.lengths, self.seen = self.lengths[rows], self.seen[rows]

    def at(self, step: int):  # type: ignore[no-untyped-def]
        """The attention of one decoding step; it puts the new keys and values into the cache."""
        place = self.width + step

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            key, value = self.keys[layer], self.values[layer]
            key[:, :, place], value[:, :, place] = k, v
            # The queries that share a key head stand where positions usually do: no key is copied.
            grouped = q.view(len(q), k.shape[1], -1, q.shape[-1])  # (b, Hkv, H / Hkv, D)
            past = slice(0, place + 1)
            seen = self.seen[..., past]
            mixed = F.scaled_dot_product_attention(grouped, key[:, :, past], value[:, :, past], attn_mask=seen)
            return mixed.reshape(len(q), -1)

        return attend


def _read(model: RawLlama, prompts: Sequence[Ids], answers: int, limit: int) -> tuple[_Cache, Tensor]:
    """The prompts in one flat pass. Returns the cache and the hidden state before each answer, both per answer."""
    flat = Flat.of((prompt, []) for prompt in prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width, shape = int(lengths.max()), model.shape
    size = (len(prompts), shape.kv_heads, width + limit, shape.head_dim)
    keys = [torch.zeros(size, dtype=model.norm.dtype) for _ in range(shape.layers)]
    values = [torch.zeros(size, dtype=model.norm.dtype) for _ in range(shape.layers)]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for row, part in enumerate(flat.segments):
            columns = slice(width - (part.end - part.start), width)
            keys[layer][row, :, columns] = k[part.start : part.end].transpose(0, 1)
            values[layer][row, :, columns] = v[part.start : part.end].transpose(0, 1)
        return attend_segments(q, k, v, flat.segments, shape.heads // shape.kv_heads)

    hidden = model.hidden(flat.ids, flat.positions, attend)
    last = torch.tensor([part.end - 1 for part in flat.segments if isinstance(part, Segment)])
    copies = [[each.repeat_interleave(answers, 0) for each in side] for side in (keys, values)]
    return _Cache(*copies, lengths.repeat_interleave(answers), width), hidden[last].repeat_interleave(answers, 0)
