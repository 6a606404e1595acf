"""The supervised loss per token."""

from __future__ import annotations

from torch import Tensor

from rlhf.algo.masked import at_least_float32, select


def sft(logprobs: Tensor, mask: Tensor) -> Tensor:
    """-logprobs on supervised tokens, 0 elsewhere: (B, T-1) -> (B, T-1), nats.             [arXiv:2203.02155 sec. 3.5]

    Summed by the caller and divided by the number of supervised tokens of the whole batch.
    """
    return -select(at_least_float32(logprobs), mask)
