"""Losses of reward models on pairs of scores; one loss per pair, nothing averaged."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algo.masked import at_least_float32
from rlhf.algo.registry import Registry

REWARD_LOSSES = Registry("reward-model loss")


@REWARD_LOSSES.register(
    "rm_bt", paper="arXiv:2203.02155 eq. 1; margin arXiv:2307.09288 eq. 2; centring arXiv:2312.09244"
)
def rm_bt(chosen: Tensor, rejected: Tensor, margin: Tensor, *, center_coef: float) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + center_coef (chosen + rejected)^2: all (B,).

    margin is 0 where the data has none. A positive one raises the smallest loss: compare accuracies, not losses.
    """
    return -logsigmoid(_advantage(chosen, rejected, margin)) + _centring(chosen, rejected, center_coef)


@REWARD_LOSSES.register("rm_bt_smooth", paper="arXiv:2203.02155 eq. 1 with flipped labels; centring arXiv:2312.09244")
def rm_bt_smooth(
    chosen: Tensor, rejected: Tensor, margin: Tensor, *, label_smoothing: float, center_coef: float
) -> Tensor:
    """-(1 - e) log sigmoid(d) - e log sigmoid(-d) + center_coef (chosen + rejected)^2, d = chosen - rejected - margin.

    All (B,), e = label_smoothing, the probability that a label is wrong. Smallest at d = log((1 - e) / e).
    """
    logit = _advantage(chosen, rejected, margin)
    smooth = -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
    return smooth + _centring(chosen, rejected, center_coef)


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen score is strictly larger, else 0: (B,). A tie is not a success."""
    return at_least_float32(chosen > rejected)


def _advantage(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Score difference less the margin."""
    return at_least_float32(chosen) - at_least_float32(rejected) - margin


def _centring(chosen: Tensor, rejected: Tensor, coef: float) -> Tensor:
    """Differences do not fix the mean of the scores; this term keeps it near 0."""
    return coef * (at_least_float32(chosen) + at_least_float32(rejected)) ** 2
