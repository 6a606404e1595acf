"""Policy losses per token, and the two ways to add them up."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.kl import MAX_LOG_RATIO
from rlhf.algo.masked import at_least_float32, masked_sum, row_means, select
from rlhf.algo.registry import Registry

POLICY_LOSSES = Registry("policy loss")


@POLICY_LOSSES.register("ppo_clip", paper="arXiv:1707.06347 eq. 7")
def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) with ratio = exp(logprobs - old_logprobs).

    All (B, R), mask 1 on response tokens. Returns (losses, clipped), both (B, R): `clipped` is true where the clipped
    branch is the smaller one, which is where the gradient is 0. Both are 0 where mask is 0. No dual clip.
    The log-ratio is clamped to +-20 before exp.
    """
    log_ratio = select(at_least_float32(logprobs) - at_least_float32(old_logprobs), mask)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    advantages = select(at_least_float32(advantages), mask)
    plain = -ratio * advantages
    limited = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(plain, limited), limited > plain


def token_sums(losses: Tensor, mask: Tensor) -> Tensor:
    """Sum over all response tokens, (B, R) -> (); divided by the number of tokens of the whole minibatch."""
    return masked_sum(losses, mask)


def sequence_sums(losses: Tensor, mask: Tensor) -> Tensor:
    """Sum over answers of the mean over each one's tokens, (B, R) -> (); divided by the number of sequences."""
    return row_means(losses, mask).sum()
