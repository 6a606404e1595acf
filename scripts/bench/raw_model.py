"""A Llama forward in plain torch, as lean as it gets: one flat row, no padding, prompts once for all their answers.

There is no module, no engine, no configuration: it is what our stages are measured against, not a part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench.flops import Shape

Ids = Sequence[int]


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of the flat row that attend causally to each other, and to all of `prompt` (a span)."""

    start: int
    end: int
    prompt: tuple[int, int] | None = None


@dataclass(frozen=True)
class Flat:
    """N tokens in one row. M of them are predicted: from position `reads[i]`, in answer `rows[i]`, the token
    `targets[i]`."""

    ids: Tensor  # (N,)
    positions: Tensor  # (N,) counted anew in every sequence
    segments: list[Segment]
    reads: Tensor  # (M,)
    targets: Tensor  # (M,)
    rows: Tensor  # (M,)
    ends: Tensor  # (answers,) the position of every answer's last token

    @classmethod
    def of(cls, groups: Iterable[tuple[Ids, Sequence[Ids]]]) -> Flat:
        """Of prompts with their answers, each prompt laid down once; all answer tokens are predicted."""
        ids: list[int] = []
        positions: list[int] = []
        segments, reads, targets, rows, ends = [], [], [], [], []
        for prompt, answers in groups:
            start, front = len(ids), len(ids) + len(prompt)
            segments.append(Segment(start, front))
            ids += prompt
            positions += range(len(prompt))
            for answer in answers:
                own = len(ids)
                segments.append(Segment(own, own + len(answer), (start, front)))
                reads += [front - 1, *range(own, own + len(answer) - 1)]
                targets += answer
                rows += [len(ends)] * len(answer)
                ids += answer
                positions += range(len(prompt), len(prompt) + len(answer))
                ends.append(len(ids) - 1)
        return cls(*map(torch.tensor, (ids, positions)), segments, *map(torch.tensor, (reads, targets, rows, ends)))

    @classmethod
    def whole(cls, sequences: Iterable[tuple[Ids, Ids]]) -> Flat:
        """Of (prompt, answer) pairs, each as one causal segment: cheaper where nothing is shared."""
        flat = cls.of((prompt, [answer]) for prompt, answer in sequences)
        pairs = zip(flat.segments[::2], flat.segments[1::2], strict=True)
        joined = [Segment(prompt.start, answer.end) for prompt, answer in pairs]
        return cls(flat.ids, flat.positions, joined, flat.reads, flat.targets, flat.rows, flat.ends)


Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (N, H, D), k and v (N, Hkv, D) -> (N, H * D)


class RawLlama:
    """The weights, with projections of one input side by side, and the forward pass."""

    def __init__(self, model: Any) -> None:
        """Copies the weights of a transformers Llama with a language-model head or a score head."""
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.shape = Shape.of(model.config)
        self.eps, self.theta = model.config.rms_norm_eps, _theta(model.config)
        self.embedding = state["model.embed_tokens.weight"]
        self.norm = state["model.norm.weight"]
        tied = model.config.tie_word_embeddings and "score.weight" not in state
        self.head = self.embedding if tied else state["score.weight" if "score.weight" in state else "lm_head.weight"]
        self.layers = [self._layer(state, number) for number in range(self.shape.layers)]

    @staticmethod
    def _layer(state: dict[str, Tensor], number: int) -> dict[str, Tensor]:
        def weight(name: str) -> Tensor:
            return state[f"model.layers.{number}.{name}.weight"]

        return {
            "input_norm": weight("input_layernorm"),
            "qkv": torch.cat([weight(f"self_attn.{name}_proj") for name in "qkv"]),
            "o": weight("self_attn.o_proj"),
            "post_norm": weight("post_attention_layernorm"),
            "gate_up": torch.cat([weight(f"mlp.{name}_proj") for name in ("gate", "up")]),
            "down": weight("mlp.down_proj"),
        }

    def parameters(self) -> list[Tensor]:
        """All weights, each once."""
        found = [self.embedding, self.norm, *(value for layer in self.layers for value in layer.values())]
        return found if self.head is self.embedding else [*found, self.head]

    def train(self) -> RawLlama:
        """Let the weights collect gradients."""
        for parameter in self.parameters():
            parameter.requires_grad_(True)
        return self

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states behind the last norm, (N, H)."""
        shape, size = self.shape, self.shape.head_dim
        cos, sin = self._rotation(positions)
        x = F.embedding(ids, self.embedding)
        split = [shape.heads * size, shape.kv_heads * size, shape.kv_heads * size]
        for number, layer in enumerate(self.layers):
            q, k, v = F.linear(self._normed(x, layer["input_norm"]), layer["qkv"]).split(split, -1)
            q, k, v = (part.view(len(ids), -1, size) for part in (q, k, v))
            mixed = attend(number, _rotated(q, cos, sin), _rotated(k, cos, sin), v)
            x = x + F.linear(mixed, layer["o"])
            gate, up = F.linear(self._normed(x, layer["post_norm"]), layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return self._normed(x, self.norm)

    def flat_hidden(self, flat: Flat) -> Tensor:
        """Hidden states of a flat row, (N, H)."""
        groups = self.shape.heads // self.shape.kv_heads
        return self.hidden(flat.ids, flat.positions, lambda _, q, k, v: attend_segments(q, k, v, flat.segments, groups))

    def logprobs(self, flat: Flat) -> Tensor:
        """Log-probs of the predicted tokens, (M,): only their positions enter the head."""
        logits = F.linear(self.flat_hidden(flat)[flat.reads], self.head)
        return -F.cross_entropy(logits.float(), flat.targets, reduction="none")

    def scores(self, flat: Flat) -> Tensor:
        """The score head at the end of every answer, (answers,)."""
        return F.linear(self.flat_hidden(flat)[flat.ends], self.head).squeeze(-1)

    def values(self, flat: Flat) -> Tensor:
        """The score head before every predicted token, (M,)."""
        return F.linear(self.flat_hidden(flat)[flat.reads], self.head).squeeze(-1)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        size = self.shape.head_dim
        rates = self.theta ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = (positions[:, None].float() * rates).repeat(1, 2)[:, None]  # (N, 1, D)
        return angles.cos().to(self.norm.dtype), angles.sin().to(self.norm.dtype)


def _theta(config: Any) -> float:
    return float(config.rope_parameters["rope_theta"])


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], groups: int) -> Tensor:
    """Attention segment by segment: q (N, H, D), k and v (N, Hkv, D) -> (N, H * D). groups: H / Hkv."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)  # (H, N, D)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    mixed = []
    for part in segments:
        own = slice(part.start, part.end)
        if part.prompt is None:
            found = F.scaled_dot_product_attention(q[None, :, own], k[None, :, own], v[None, :, own], is_causal=True)
        else:
            front = slice(*part.prompt)
            keys, values = (torch.cat([x[None, :, front], x[None, :, own]], 2) for x in (k, v))
            length, before = part.end - part.start, part.prompt[1] - part.prompt[0]
            seen = torch.ones(length, before + length, dtype=torch.bool, device=q.device).tril(before)
            found = F.scaled_dot_product_attention(q[None, :, own], keys, values, attn_mask=seen)
        mixed.append(found[0].transpose(0, 1).flatten(1))  # (n, H * D)
    return torch.cat(mixed)
