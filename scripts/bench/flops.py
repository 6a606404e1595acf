"""Useful floating point operations, and the peak that they are compared with.

Useful is what a perfect implementation that shares nothing between rows cannot avoid: two operations per weight and
real token forward, twice that backward, causal attention over real tokens, the head only where a loss or a sampler
needs it. Padding, recomputation, further logits and copies are not useful. An implementation that reads a prompt once
for several answers does less than this count, so its share of the peak may pass 100 %.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf.models.linear import is_for_onednn, product


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama-like decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Of a transformers configuration."""
        head_dim = config.hidden_size // config.num_attention_heads
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
            config.vocab_size,
            head_dim,
        )

    @property
    def trunk(self) -> int:
        """Weights of all linear layers but the head."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def head(self) -> int:
        """Weights of the head."""
        return self.hidden * self.vocab


def attended(tokens: float, before: float = 0) -> float:
    """Key positions that `tokens` tokens in a row look at, when `before` tokens stand in front: half a square, and a
    rectangle."""
    return tokens * tokens / 2 + tokens * before


def forward(shape: Shape, lengths: Sequence[float], head_tokens: float, before: Sequence[float] | None = None) -> float:
    """Of one pass over rows of these lengths. head_tokens: how many positions enter the head, over all rows.

    before: tokens in front of every row whose keys are there already, as in decoding.
    """
    fronts = [0.0] * len(lengths) if before is None else before
    seen = sum(attended(tokens, front) for tokens, front in zip(lengths, fronts, strict=True))
    attention = 4 * shape.layers * shape.heads * shape.head_dim * seen  # scores, and the sum over values
    return 2 * shape.trunk * sum(lengths) + attention + 2 * shape.head * head_tokens


def training(shape: Shape, lengths: Sequence[float], head_tokens: float, adapters: int | None = None) -> float:
    """Forward and backward: three times a forward pass.

    adapters: weights of the LoRA matrices where only they are trained. Then the weights of the model need no gradient
    of their own, which saves a third of what linear layers cost; attention keeps both halves of its backward.
    """
    whole = 3 * forward(shape, lengths, head_tokens)
    if adapters is None:
        return whole
    saved = 2 * shape.trunk * sum(lengths) + 2 * shape.head * head_tokens
    return whole - saved + 6 * adapters * sum(lengths)


def decoding(shape: Shape, prompts: Sequence[float], answers: int, answer_tokens: float) -> float:
    """Sampling: every prompt is read once for its `answers` answers; all answers are taken as equally long."""
    length = answer_tokens / (len(prompts) * answers)
    fronts = [prompt for prompt in prompts for _ in range(answers)]
    rows = [length] * len(fronts)
    return forward(shape, prompts, 0) + forward(shape, rows, answer_tokens, fronts)


# rows, inner size, columns: a large square, and the shapes of the benchmark's small models
_PRODUCTS = ((2048, 2048, 2048), (3000, 256, 256), (3000, 256, 1024), (3000, 1024, 256))


def matmul_peak(
    dtype: torch.dtype,
    device: torch.device,
    clock: str = "wall",
    seconds: float = 1.0,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.linear,
) -> float:
    """Operations per second of the fastest of a few matrix products, each tried for this long.

    clock: `wall`, or `cpu` for processor time, which is what one thread is measured by. multiply: (rows, in) and
    (out, in) -> (rows, out).
    """
    best = 0.0
    for rows, inner, columns in _PRODUCTS:
        left = torch.randn(rows, inner, device=device).to(dtype)
        right = torch.randn(columns, inner, device=device).to(dtype)
        ended = time.perf_counter() + seconds
        while time.perf_counter() < ended:
            taken = _timed(lambda x=left, y=right: multiply(x, y), left.is_cuda, clock)
            best = max(best, 2 * rows * inner * columns / taken)
    return best


def fast_peak(dtype: torch.dtype, device: torch.device, clock: str) -> float | None:
    """The same by the library that our layers multiply with; None where that is PyTorch's own choice."""
    if not is_for_onednn(torch.empty(1, device=device, dtype=dtype)):
        return None
    return matmul_peak(dtype, device, clock, multiply=product)


def _timed(work: Callable[[], torch.Tensor], on_gpu: bool, clock: str) -> float:
    if on_gpu:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3
    now = time.perf_counter if clock == "wall" else time.process_time
    started = now()
    work()
    return now() - started
