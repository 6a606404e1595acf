"""The stages' losses over flat rows, in plain torch: what our objectives compute, without what carries them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.bench.raw_model import Flat, Ids, RawLlama

Pair = tuple[Ids, Ids, Ids]  # prompt, chosen, rejected


def sums_by_row(values: Tensor, flat: Flat) -> Tensor:
    """(M,) -> (answers,)."""
    return values.new_zeros(len(flat.ends)).index_add(0, flat.rows, values)


def lay_pairs(pairs: Sequence[Pair]) -> Flat:
    """Each prompt once, its chosen answer in front of the rejected one."""
    return Flat.of((prompt, [chosen, rejected]) for prompt, chosen, rejected in pairs)


def sft_loss(model: RawLlama, rows: Sequence[tuple[Ids, Ids]]) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens."""
    return -model.logprobs(Flat.whole(rows)).mean()


def pair_sums(model: RawLlama, pairs: Sequence[Pair]) -> Tensor:
    """Log-probs of both answers, (B, 2)."""
    flat = lay_pairs(pairs)
    return sums_by_row(model.logprobs(flat), flat).view(-1, 2)


def dpo_loss(model: RawLlama, pairs: Sequence[Pair], ref: Tensor, beta: float) -> Tensor:
    """Sigmoid DPO.                                                                     [arXiv:2305.18290 eq. 7]

    ref: (B, 2) summed reference log-probs.
    """
    ratios = pair_sums(model, pairs) - ref
    return -F.logsigmoid(beta * (ratios[:, 0] - ratios[:, 1])).mean()


def reward_loss(model: RawLlama, pairs: Sequence[Pair]) -> Tensor:
    """Bradley-Terry on the scores of both answers."""
    scores = model.scores(lay_pairs(pairs)).view(-1, 2)
    return -F.logsigmoid(scores[:, 0] - scores[:, 1]).mean()


def group_advantages(scores: Tensor, answers: int, eps: float = 1e-4) -> Tensor:
    """Scores against their group's mean, over its deviation, (B,).            [arXiv:2402.03300 sec. 4.1.2]"""
    groups = scores.view(-1, answers)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + eps)).flatten()


def grpo_loss(
    model: RawLlama, flat: Flat, advantages: Tensor, ref: Tensor, *, kl_coef: float, clip: tuple[float, float]
) -> Tensor:
    """Clipped surrogate plus KL (k3), a mean over each answer's tokens, then over answers.

    Made for the first update on fresh samples: the old policy's log-probs are the policy's own, detached.
    advantages: (answers,). ref: (M,) reference log-probs.
    """
    logprobs = model.logprobs(flat)
    per_token = surrogate(logprobs, logprobs.detach(), advantages[flat.rows], clip)
    apart = ref - logprobs
    per_token = per_token + kl_coef * (apart.exp() - 1 - apart)
    counts = torch.bincount(flat.rows, minlength=len(flat.ends))
    return (sums_by_row(per_token, flat) / counts).mean()


def surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: tuple[float, float]) -> Tensor:
    """-min(ratio A, clipped ratio A), per token."""
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)


def value_loss(model: RawLlama, flat: Flat, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """Half the squared error, the worse of the value and the value held to within `clip` of the old one."""
    values = model.values(flat)
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (held - returns) ** 2).mean()


def gae_by_row(rewards: Tensor, values: Tensor, flat: Flat, lam: float) -> tuple[Tensor, Tensor]:
    """Undiscounted generalised advantages and returns, (M,) each, answer by answer.   [arXiv:1506.02438 eq. 16]"""
    lengths = torch.bincount(flat.rows, minlength=len(flat.ends)).tolist()
    width, starts = max(lengths), [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]
    places = torch.tensor([start + i for start, size in zip(starts, lengths, strict=True) for i in range(size)])
    columns = torch.tensor([i for size in lengths for i in range(size)])
    grid = torch.zeros(2, len(lengths), width)
    grid[0, flat.rows, columns], grid[1, flat.rows, columns] = rewards[places], values[places]
    advantage, after, backwards = torch.zeros(len(lengths)), torch.zeros(len(lengths)), []
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    for t in reversed(range(width)):
        step = grid[0, :, t] + after - grid[1, :, t] + lam * advantage
        advantage = torch.where(inside[:, t], step, advantage)
        after = torch.where(inside[:, t], grid[1, :, t], after)
        backwards.append(advantage)
    found = torch.stack(backwards[::-1], 1)[flat.rows, columns]
    return found, found + values
