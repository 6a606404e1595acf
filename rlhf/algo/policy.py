"""Policy losses per token, from log-probs of the policy and of the old policy, which sampled the answers.

logprobs, old_logprobs, advantages, mask: (B, R), mask 1 on response tokens. Returned are (losses, clipped), both (B, R)
and 0 where mask is 0; `clipped` marks tokens at which a limit of the loss is in force. Log-ratios, of tokens and of
answers, are clamped to +-20 before exp: beyond, the ratio stands still and its gradient is 0.
Losses of whole answers put the answer's number on each of its tokens, so that its mean over them is that number; their
advantage is the mean over the tokens of `advantages`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.kl import MAX_LOG_RATIO, k3
from rlhf.algo.masked import at_least_float32, row_means, row_sums, select
from rlhf.algo.registry import Registry

POLICY_LOSSES = Registry("policy loss")


@POLICY_LOSSES.register("ppo_clip", paper="arXiv:1707.06347 eq. 7")
def ppo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) with ratio = exp(logprobs - old_logprobs).

    `clipped` is true where the clipped branch is the smaller one, which is where the gradient is 0. No dual clip.
    """
    ratio = _exp(_log_ratios(logprobs, old_logprobs, mask))
    return _surrogate(ratio, select(at_least_float32(advantages), mask), clip_low, clip_high)


@POLICY_LOSSES.register("ppo_dual_clip", paper="arXiv:1912.09729 eq. 5")
def ppo_dual_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[Tensor, Tensor]:
    """`ppo_clip`, but where A < 0 at most -dual_clip A: a bad token that became far likelier cannot rule the batch.

    `clipped` is true where either limit is in force; the gradient is 0 there.
    """
    losses, clipped = ppo_clip(logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high)
    advantages = select(at_least_float32(advantages), mask)
    is_above = (advantages < 0) & (losses > -dual_clip * advantages)
    return torch.where(is_above, -dual_clip * advantages, losses), clipped | is_above


@POLICY_LOSSES.register("ppo_penalty", paper="arXiv:1707.06347 eq. 8")
def ppo_penalty(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, beta: float
) -> tuple[Tensor, Tensor]:
    """-ratio A + beta (ratio - 1 - log ratio), ratio = exp(logprobs - old_logprobs). Nothing is clipped.

    The second term is k3 the other way round: never negative, an unbiased estimate of KL(old policy || policy).
    """
    log_ratio = _log_ratios(logprobs, old_logprobs, mask)
    divergence = k3(torch.zeros_like(log_ratio), log_ratio)
    losses = -_exp(log_ratio) * select(at_least_float32(advantages), mask) + beta * divergence
    return losses, torch.zeros_like(mask)


@POLICY_LOSSES.register("reinforce", paper="Williams 1992, doi:10.1007/BF00992696")
def reinforce(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """-logprobs A: its gradient is the policy gradient while the policy is the one that sampled, and only then.

    The value says nothing about progress. old_logprobs are not read.
    """
    losses = -select(at_least_float32(logprobs), mask) * select(at_least_float32(advantages), mask)
    return losses, torch.zeros_like(mask)


@POLICY_LOSSES.register("rloo_clip", paper="arXiv:2402.14740; TRL RLOOTrainer")
def rloo_clip(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(w A, clip(w, 1 - clip_low, 1 + clip_high) A) of whole answers, w = exp(sum of their tokens' log-ratios).

    w of hundreds of tokens leaves the limits soon: for few updates per rollout. `clipped` as in `ppo_clip`.
    """
    ratio = _exp(row_sums(_log_ratios(logprobs, old_logprobs, mask), mask))  # (B,)
    losses, clipped = _surrogate(ratio, row_means(advantages, mask), clip_low, clip_high)
    return select(losses.unsqueeze(-1), mask), clipped.unsqueeze(-1) & mask


@POLICY_LOSSES.register("gspo", paper="arXiv:2507.18071 eq. 5")
def gspo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) of whole answers, s = exp(mean of their tokens' log-ratios).

    All tokens of an answer share its ratio and are clipped together. `clipped` as in `ppo_clip`.
    """
    ratio = _exp(row_means(_log_ratios(logprobs, old_logprobs, mask), mask))  # (B,)
    losses, clipped = _surrogate(ratio, row_means(advantages, mask), clip_low, clip_high)
    return select(losses.unsqueeze(-1), mask), clipped.unsqueeze(-1) & mask


@POLICY_LOSSES.register("cispo", paper="arXiv:2506.13585 eq. 4")
def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, max_ratio: float
) -> tuple[Tensor, Tensor]:
    """-min(ratio, max_ratio) A logprobs, without a gradient through the ratio: a weight, not a gate.

    `clipped` is true where the ratio is above max_ratio; the gradient is limited there, not 0. No lower limit, as in
    the paper's experiments.
    """
    ratio = _exp(_log_ratios(logprobs, old_logprobs, mask)).detach()
    losses, _ = reinforce(logprobs, old_logprobs, advantages, mask)
    return ratio.clamp(max=max_ratio) * losses, ratio > max_ratio


@POLICY_LOSSES.register("mdloo", paper="arXiv:2407.21075; mirror descent arXiv:2005.09814")
def mdloo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, gamma: float
) -> tuple[Tensor, Tensor]:
    """-w A + gamma (w log w - (w - 1)) of whole answers, w = exp(sum of their tokens' log-ratios). Nothing is clipped.

    The second term is never negative, an unbiased estimate of KL(policy || old policy) per answer. The paper names the
    method without its estimator; this one and the fixed weight are a choice.
    """
    log_ratio = row_sums(_log_ratios(logprobs, old_logprobs, mask), mask)
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # (B,)
    ratio = log_ratio.exp()
    # expm1: near w = 1 the difference of the two terms would lose its digits
    losses = -ratio * row_means(advantages, mask) + gamma * (ratio * log_ratio - torch.expm1(log_ratio))
    return select(losses.unsqueeze(-1), mask), torch.zeros_like(mask)


# --- shared ---------------------------------------------------------------------------------------------------------


def _log_ratios(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """log(policy / old policy) per token, (B, R), 0 where mask is 0; not clamped."""
    return select(at_least_float32(logprobs) - at_least_float32(old_logprobs), mask)


def _exp(log_ratio: Tensor) -> Tensor:
    """The ratio, at most exp(20) and at least exp(-20)."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _surrogate(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> tuple[Tensor, Tensor]:
    """-min(ratio A, clip(ratio) A), elementwise, and where the clipped branch is the smaller one."""
    plain = -ratio * advantages
    limited = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return torch.maximum(plain, limited), limited > plain
