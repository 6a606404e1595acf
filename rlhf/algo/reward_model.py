"""Losses of reward models on pairs or lists of scores; one loss per pair or list, nothing averaged.

On lists: scores (B, K) are the model's, labels (B, K) the data's, higher being better, present (B, K) bool says which
answers there are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algo.masked import at_least_float32, select
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


@REWARD_LOSSES.register("rm_kwise", paper="arXiv:2203.02155 eq. 1")
def rm_kwise(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """Mean over the list's pairs i better than j of -log sigmoid(score_i - score_j): (B, K) three times -> (B,).

    A prompt counts once, however many answers it has; equal labels make no pair, and a list without any has loss 0.
    """
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    better = (labels.unsqueeze(-1) > labels.unsqueeze(-2)) & both  # [b, i, j]
    scores = select(at_least_float32(scores), present)
    losses = -logsigmoid(scores.unsqueeze(-1) - scores.unsqueeze(-2))
    return select(losses, better).sum((-2, -1)) / better.sum((-2, -1)).clamp(min=1)


@REWARD_LOSSES.register("rm_softmax", paper="arXiv:1909.08593 eq. 1")
def rm_softmax(scores: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """log(sum of e^score) - score of the best, which has the highest label: (B, K) three times -> (B,).

    `rm_bt` where K = 2. The first of several best ones is taken.
    """
    scores = select(at_least_float32(scores), present)
    total = torch.where(present, scores, -torch.inf).logsumexp(-1)
    best = torch.where(present, at_least_float32(labels), -torch.inf).argmax(-1, keepdim=True)
    return total - scores.gather(-1, best).squeeze(-1)


def pair_accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen score is strictly larger, else 0: (B,). A tie is not a success."""
    return at_least_float32(chosen > rejected)


def _advantage(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Score difference less the margin."""
    return at_least_float32(chosen) - at_least_float32(rejected) - margin


def _centring(chosen: Tensor, rejected: Tensor, coef: float) -> Tensor:
    """Differences do not fix the mean of the scores; this term keeps it near 0."""
    return coef * (at_least_float32(chosen) + at_least_float32(rejected)) ** 2
