"""Distance to the reference policy, from tokens sampled from the policy; l = log policy - log reference.

Estimators are per token and know no mask: sum what they return with `masked_sum`, from log-probs that are finite
everywhere (padding included).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.masked import at_least_float32, row_sums
from rlhf.algo.registry import Registry

KL_ESTIMATORS = Registry("KL estimator")

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside of anything that trains, far inside of float32


@KL_ESTIMATORS.register("k1", paper="Schulman 2020, joschu.net/blog/kl-approx.html")
def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """l: unbiased for KL(policy || reference), can be negative, high variance. (...) -> (...), nats.

    The choice for a KL penalty inside the reward. As a loss term it is useless: its expected gradient is 0.
    """
    return at_least_float32(logprobs) - at_least_float32(ref_logprobs)


@KL_ESTIMATORS.register("k2", paper="Schulman 2020, joschu.net/blog/kl-approx.html")
def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """l^2 / 2: never negative, biased, exact to second order. (...) -> (...), nats.

    As a loss term on the policy's own samples its expected gradient is that of KL(policy || reference).
    """
    return 0.5 * k1(logprobs, ref_logprobs) ** 2


@KL_ESTIMATORS.register("k3", paper="Schulman 2020, joschu.net/blog/kl-approx.html; arXiv:2402.03300 eq. 4")
def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-l) - 1 + l: never negative, unbiased as a value, low variance near l = 0. (...) -> (...), nats.

    The KL term in GRPO's loss; its expected gradient there is that of KL(reference || policy).
    l is clamped to +-20 before exp; below -20 the whole term stands still, above 20 it goes on growing like l.
    """
    log_ratio = k1(logprobs, ref_logprobs)
    # expm1: near l = 0, where training lives, exp(-l) - 1 would lose all digits of the sum in float32
    return torch.expm1(-log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)) + log_ratio.clamp(min=-MAX_LOG_RATIO)


@KL_ESTIMATORS.register("abs", paper="verl kl_penalty, arXiv:2409.19256")
def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|l|: never negative, biased upwards, grows only linearly. (...) -> (...), nats."""
    return k1(logprobs, ref_logprobs).abs()


def seq_kl_exact(logits: Tensor, ref_logits: Tensor, mask: Tensor) -> Tensor:
    """Sum over t of KL(policy(.|s_t) || reference(.|s_t)), over the whole vocabulary: (B, R, V) twice -> (B,), nats.

    On prefixes sampled from the policy it is unbiased for the sequence KL, with far less variance than sums of k1.
    Takes untruncated logits, at the sampling temperature.
    """
    log_policy = at_least_float32(logits).log_softmax(-1)
    log_reference = at_least_float32(ref_logits).log_softmax(-1)
    return row_sums((log_policy.exp() * (log_policy - log_reference)).sum(-1), mask)
