"""From one score per answer to one reward per token."""

from __future__ import annotations

from torch import Tensor

from rlhf.algo.masked import at_least_float32, select


def process_scores(scores: Tensor, finished: Tensor, *, clip: float | None, missing_eos_penalty: float) -> Tensor:
    """Scores (B,) clipped to +-clip, then less the penalty where the answer did not end by itself (`finished` false).

    In this order, so that the penalty is felt by a score at the limit too. The KL penalty is never clipped with it.
    """
    scores = at_least_float32(scores)
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    return scores - missing_eos_penalty * (~finished).to(scores)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """R_t = -kl_coef * KL_t, plus the score at the last response token.      [arXiv:1909.08593 eq. 2, arXiv:2203.02155]

    scores (B,), kl and mask (B, R), mask 1 on response tokens -> (B, R), 0 where mask is 0.
    The score stands on the end token itself (as in OpenRLHF and verl), not one position after it (TRL).
    """
    num_left = mask.flip(-1).cumsum(-1).flip(-1)  # response tokens from here to the end of the row
    is_last = mask & (num_left == 1)
    return -kl_coef * select(at_least_float32(kl), mask) + select(at_least_float32(scores).unsqueeze(-1), is_last)
