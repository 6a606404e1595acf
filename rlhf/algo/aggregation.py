"""From losses per token to one sum, and the name of what that sum is divided by.

The division is the caller's: denominators are counted over the whole minibatch, all devices and micro-batches, so that
no split of it changes the gradient. `tokens` are response tokens, `sequences` answers that have any. `length` is that
of the longest possible answer.
"""

from __future__ import annotations

from torch import Tensor

from rlhf.algo.masked import masked_sum, row_means
from rlhf.algo.registry import Registry

AGGREGATIONS = Registry("aggregation")

DENOMINATORS = {
    "token_mean": "tokens",
    "sequence_mean": "sequences",
    "sequence_sum": "sequences",
    "constant": "sequences",
}


@AGGREGATIONS.register("token_mean", paper="arXiv:2503.14476 sec. 3.3 (DAPO)")
def token_mean(losses: Tensor, mask: Tensor, *, length: int) -> Tensor:
    """Sum over all response tokens, divided by `tokens`: long answers weigh more. (B, R) -> ()."""
    return masked_sum(losses, mask)


@AGGREGATIONS.register("sequence_mean", paper="arXiv:2402.03300 eq. 3 (GRPO)")
def sequence_mean(losses: Tensor, mask: Tensor, *, length: int) -> Tensor:
    """Sum over answers of the mean over their tokens, divided by `sequences`: answers weigh the same. (B, R) -> ()."""
    return row_means(losses, mask).sum()


@AGGREGATIONS.register("sequence_sum", paper="Williams 1992, doi:10.1007/BF00992696 (REINFORCE)")
def sequence_sum(losses: Tensor, mask: Tensor, *, length: int) -> Tensor:
    """Sum over all response tokens, divided by `sequences`: the policy gradient as derived. (B, R) -> ()."""
    return masked_sum(losses, mask)


@AGGREGATIONS.register("constant", paper="arXiv:2503.20783 (Dr. GRPO)")
def constant(losses: Tensor, mask: Tensor, *, length: int) -> Tensor:
    """Sum over all response tokens / length, divided by `sequences`: a mean without a bias by length. (B, R) -> ()."""
    return masked_sum(losses, mask) / length
