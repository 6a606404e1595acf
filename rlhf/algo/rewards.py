"""From one score per answer to one reward per token."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.masked import Moments, at_least_float32, select, whiten


def normalise_running(scores: Tensor, moments: Moments) -> Tensor:
    """(score - mean) / sqrt(variance + 1e-8) with the moments of all scores so far, these included: (B,) -> (B,).

    Bessel's correction. NaN, an unscored answer, stays NaN; `moments` leave it out.
    """
    scored = ~scores.isnan()
    return torch.where(scored, whiten(scores, scored, moments, unbiased=True), torch.nan)


def preference_scores(scores: Tensor, opponents: Tensor) -> Tensor:
    """P(answer preferred to its opponent) - 1/2, P = sigmoid(score - the opponent's score): (B,) twice -> (B,).

    The score of Nash-MD, with the rewards as a Bradley-Terry preference model.              [arXiv:2312.00886 sec. 7]
    NaN, unscored, where either answer is.
    """
    return torch.sigmoid(at_least_float32(scores) - at_least_float32(opponents)) - 0.5


def process_scores(
    scores: Tensor,
    finished: Tensor,
    lengths: Tensor,
    max_length: int,
    *,
    clip: float | None,
    missing_eos_penalty: float,
    missing_eos_score: float | None,
    length_penalty: float,
    overlong_buffer: int,
    overlong_penalty: float,
) -> Tensor:
    """Scores (B,) after what the options ask for, in their order; NaN, an unscored answer, stays NaN.

    finished (B,): the answer ended by itself. lengths (B,): its tokens, end token included, of at most max_length.
    The limit comes first, so that penalties are felt by a score at the limit too. `missing_eos_score` replaces the
    score together with `missing_eos_penalty`; penalties on length still come off it. The KL penalty is never clipped
    with the score.
    """
    scores = at_least_float32(scores)
    if clip is not None:
        scores = scores.clamp(-clip, clip)
    scores = scores - missing_eos_penalty * (~finished).to(scores)
    if missing_eos_score is not None:
        scores = torch.where(finished | scores.isnan(), scores, missing_eos_score)
    scores = scores - length_penalty * lengths.to(scores)
    punishment = overlong_punishment(lengths, max_length, buffer=overlong_buffer, penalty=overlong_penalty)
    return scores + punishment.to(scores)


def overlong_punishment(lengths: Tensor, max_length: int, *, buffer: int, penalty: float) -> Tensor:
    """0 up to max_length - buffer tokens, then linearly down to -penalty at max_length, -penalty above: (B,) -> (B,).

    DAPO's soft overlong punishment.                                                           [arXiv:2503.14476 eq. 13]
    Capped at -penalty as in the paper (verl goes on downwards). buffer 0 switches it off.
    """
    if buffer == 0:
        return torch.zeros_like(at_least_float32(lengths))
    return -penalty * ((at_least_float32(lengths) - (max_length - buffer)) / buffer).clamp(0, 1)


def shape_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """R_t = -kl_coef * KL_t, plus the score at the last response token.      [arXiv:1909.08593 eq. 2, arXiv:2203.02155]

    scores (B,), kl and mask (B, R), mask 1 on response tokens -> (B, R), 0 where mask is 0.
    The score stands on the end token itself (as in OpenRLHF and verl), not one position after it (TRL).
    """
    num_left = mask.flip(-1).cumsum(-1).flip(-1)  # response tokens from here to the end of the row
    is_last = mask & (num_left == 1)
    return -kl_coef * select(at_least_float32(kl), mask) + select(at_least_float32(scores).unsqueeze(-1), is_last)
