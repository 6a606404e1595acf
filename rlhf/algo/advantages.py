"""How much better an action was than expected. Constants for the update: call them without gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.masked import at_least_float32, select
from rlhf.algo.registry import Registry

ADVANTAGES = Registry("advantage estimator")


@ADVANTAGES.register("gae", paper="arXiv:1506.02438 eq. 16")
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages, A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t, and returns A + V.

    rewards, values, mask: (B, R), mask 1 on response tokens; V_t is the value of the state before token t.
    Returns (advantages, returns), both (B, R), 0 where mask is 0. Not whitened.
    Nothing follows the last token (V = 0): a truncated answer is treated as ended. Masked positions between response
    tokens are stepped over.
    """
    rewards = select(at_least_float32(rewards), mask)
    values = select(at_least_float32(values), mask)
    advantage = next_value = rewards.new_zeros(rewards.shape[0])  # (B,)
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        backwards.append(advantage)
    advantages = select(torch.stack(backwards[::-1], dim=1), mask)  # (B, R)
    return advantages, advantages + values


@ADVANTAGES.register("grpo", paper="arXiv:2402.03300 sec. 4.1.2")
def grpo(scores: Tensor, *, eps: float) -> Tensor:
    """(score - mean) / (std + eps) inside each group of answers to one prompt: (N, G) -> (N, G).

    std with Bessel's correction, as in TRL and verl. NaN marks an unscored answer: it gets 0 and its group's statistics
    leave it out. A group of equal scores (or with a single one) gets exactly 0: sums are taken in float64, else the
    rounding of the mean, divided by eps, would be a signal.
    """
    scored = ~scores.isnan()
    count = scored.sum(-1, keepdim=True)  # (N, 1)
    wide = select(scores.double(), scored)
    centred = select(wide - wide.sum(-1, keepdim=True) / count.clamp(min=1), scored)
    std = ((centred**2).sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (centred / (std + eps)).to(at_least_float32(scores).dtype)
