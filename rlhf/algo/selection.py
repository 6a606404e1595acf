"""Which of the answers to one prompt are kept, and what keeping the best of n does to scores and KL.

Scores are of answers to the same prompt. Sums are taken in float64, as in `advantages.py`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.algo.masked import at_least_float32, select


def rso_accept(scores: Tensor, uniforms: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """One pass of statistical rejection sampling: accepted where u < exp((r - max r) / beta): (K,) twice -> (K,) twice.

    Returns (probabilities, accepted). The best answer has probability 1. beta -> 0 accepts the best alone, beta -> inf
    all. beta is in units of the score; uniforms in [0, 1).                              [arXiv:2309.06657 Algorithm 1]
    """
    scores = at_least_float32(scores)
    probabilities = ((scores - scores.max()) / beta).exp()
    return probabilities, uniforms < probabilities


def rejection_sample(scores: Tensor, *, accept: int, beta: float, generator: torch.Generator) -> list[int]:
    """Indices of at most `accept` of the answers (K,), drawn as from exp(r / beta) without replacement.

    Passes of `rso_accept` over what is left, each in a random order and with its own maximum, until enough are
    accepted. Every pass accepts its best answer, so K passes are the most; fewer candidates than `accept` end up
    accepted all (the published loop would not end). In the order of acceptance.         [arXiv:2309.06657 Algorithm 1]
    """
    left = torch.arange(len(scores))
    accepted: list[int] = []
    while len(accepted) < accept and len(left):
        left = left[torch.randperm(len(left), generator=generator)]
        _, taken = rso_accept(scores[left], torch.rand(len(left), generator=generator), beta=beta)
        accepted += left[taken][: accept - len(accepted)].tolist()
        left = left[~taken]
    return accepted


def bon_kl(n: Tensor) -> Tensor:
    """log n - (n - 1) / n: an upper bound on KL(best of n, policy), in nats: (M,) -> (M,).

    Exact where scores are continuous; ties make the true KL smaller.    [arXiv:2009.01325 app. G.3; arXiv:2401.01879]
    """
    n = at_least_float32(n)
    return n.log() - (n - 1) / n


def bon_expected(scores: Tensor, *, n: int) -> Tensor:
    """Unbiased estimate of the expected best score among n answers, from K >= n of them: (..., K) -> (...).

    sum over k of C(k, n - 1) / C(K, n) * (the k-th smallest score, counted from 0): the mean of the maximum over all
    subsets of n.                                                             [arXiv:2112.09332 app. I; cf. pass@k]
    """
    ordered = at_least_float32(scores).sort(-1).values
    count = ordered.shape[-1]
    assert 1 <= n <= count, f"n: expected 1..{count}, found {n}"
    weights = [math.comb(k, n - 1) / math.comb(count, n) for k in range(count)]
    return (ordered * torch.tensor(weights, dtype=ordered.dtype)).sum(-1)


def win_rates(scores: Tensor) -> Tensor:
    """How often each answer beats another one of its prompt: the mean over the others of sigmoid(s_i - s_j).

    (..., K) -> (..., K). A reward model read as a Bradley-Terry preference model; both orders of a pair agree by
    construction. NaN, an unscored answer, takes no part and stays NaN; so does one without another to compare with.
                                                                                                     [arXiv:2405.00675]
    """
    wide = scores.double()
    scored = ~wide.isnan()
    beats = torch.sigmoid(wide.unsqueeze(-1) - wide.unsqueeze(-2))  # (..., K, K)
    both = scored.unsqueeze(-1) & scored.unsqueeze(-2) & ~torch.eye(wide.shape[-1], dtype=torch.bool)
    rates = select(beats, both).sum(-1) / both.sum(-1)  # 0 / 0 is NaN: there is nothing to compare with
    return rates.to(at_least_float32(scores).dtype)
