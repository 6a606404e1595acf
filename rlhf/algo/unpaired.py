"""Losses on single answers that are known to be good or bad, or that have a reward; r = log policy - log reference.

What a loss returns is as in `preference.py`: one number per answer, or {denominator: (B,)}, where `good` and `bad` are
the numbers of such answers in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algo.coupling import mean_reward, mismatched_kl, quantile_partners
from rlhf.algo.masked import at_least_float32, select
from rlhf.algo.preference import LOG_2, PREFERENCE_LOSSES, always, smoothed
from rlhf.algo.registry import Traits
from rlhf.batch import AnswerLogprobs


def answer_ratios(answers: AnswerLogprobs) -> Tensor:
    """r = log policy - log reference of each answer, (B,), at least float32, nats."""
    assert answers.ref_logprobs is not None, "reference log-probs are missing"
    return at_least_float32(answers.logprobs) - at_least_float32(answers.ref_logprobs)


def _signs(answers: AnswerLogprobs, like: Tensor) -> Tensor:
    """1 for a good answer, -1 for a bad one, (B,)."""
    return torch.where(answers.is_good, like.new_tensor(1), like.new_tensor(-1))


@PREFERENCE_LOSSES.register(
    "kto",
    paper="arXiv:2402.01306 eq. 7-8",
    traits=Traits(
        at_reference=lambda *, beta, lambda_d, lambda_u: (lambda_d + lambda_u) / 4,
        couple=mismatched_kl,
    ),
)
def kto(answers: AnswerLogprobs, z0: Tensor, *, beta: float, lambda_d: float, lambda_u: float) -> Tensor:
    """lambda_d (1 - sigmoid(beta (r - z0))) if good, lambda_u (1 - sigmoid(beta (z0 - r))) if bad: (B,).

    z0 (): the reference point, a number without gradient, from `mismatched_kl`. Flat far away on both sides: very wrong
    answers, perhaps mislabelled, count little. Averaged over all answers and not over each class, so the two weights
    are there to balance unequal numbers: lambda_d good / (lambda_u bad) in 1 .. 4/3.
    """
    ratios = answer_ratios(answers)
    weights = torch.where(answers.is_good, ratios.new_tensor(lambda_d), ratios.new_tensor(lambda_u))
    return weights * torch.sigmoid(-_signs(answers, ratios) * beta * (ratios - z0))


@PREFERENCE_LOSSES.register(
    "apo_zero_unpaired", paper="arXiv:2408.06266 eq. 7, answer by answer", traits=Traits(at_reference=always(0.5))
)
def apo_zero_unpaired(answers: AnswerLogprobs, *, beta: float) -> Tensor:
    """1 - sigmoid(beta r) if good, sigmoid(beta r) if bad: (B,). `kto` with the reference point at 0."""
    ratios = answer_ratios(answers)
    return torch.sigmoid(-_signs(answers, ratios) * beta * ratios)


@PREFERENCE_LOSSES.register(
    "bco", paper="arXiv:2404.04656", traits=Traits(at_reference=always(LOG_2), couple=mean_reward)
)
def bco(
    answers: AnswerLogprobs,
    shift: Tensor,
    density: Tensor,
    *,
    beta: float,
    min_density_ratio: float,
    max_density_ratio: float,
) -> Tensor:
    """-log sigmoid(beta r - shift) if good, -w log sigmoid(shift - beta r) if bad: (B,).

    A binary classifier with the implicit reward as its logit. shift (): the running mean reward, without gradient, from
    `mean_reward`. w = p / (1 - p) within [min_density_ratio, max_density_ratio], p = density (B,): P(good | prompt),
    1/2 where nothing is known, which corrects bad answers that come with other prompts than the good ones.
    """
    ratios = answer_ratios(answers)
    odds = (density / (1 - density)).clamp(min_density_ratio, max_density_ratio)
    weights = torch.where(answers.is_good, torch.ones_like(ratios), odds.to(ratios))
    return -weights * logsigmoid(_signs(answers, ratios) * (beta * ratios - shift))


@PREFERENCE_LOSSES.register(
    "npo", paper="arXiv:2404.05868", traits=Traits(at_reference=lambda *, beta: 2 * LOG_2 / beta)
)
def npo(answers: AnswerLogprobs, *, beta: float) -> dict[str, Tensor]:
    """-(2 / beta) log sigmoid(-beta r) of bad answers, averaged over these: {bad: (B,)}. Good ones take no part.

    Unlearning: the gradient is that of gradient ascent at the reference and fades as the answer becomes unlikely, so
    that nothing collapses. Has no term that keeps what is to be kept: add one.
    """
    losses = -(2 / beta) * logsigmoid(-beta * answer_ratios(answers))
    return {"bad": select(losses, ~answers.is_good)}


@PREFERENCE_LOSSES.register(
    "cringe", paper="arXiv:2211.05826", traits=Traits(reference=False, scale=None, invariant=False)
)
def cringe(answers: AnswerLogprobs, contrast: Tensor, *, alpha: float) -> dict[str, Tensor]:
    """-log policy(answer) per token of good answers, alpha contrast per token of bad ones.

    contrast (B,): summed over the answer's tokens, how far each is above what the policy would say instead, see
    `token_contrast`; pushes a bad token below the best other ones and then leaves it alone.
    """
    return {
        "good_tokens": select(-at_least_float32(answers.logprobs), answers.is_good),
        "bad_tokens": alpha * select(at_least_float32(contrast), ~answers.is_good),
    }


@PREFERENCE_LOSSES.register(
    "aot_unpaired",
    paper="arXiv:2406.05882 (unpaired)",
    traits=Traits(at_reference=always(LOG_2), signs="none", couple=quantile_partners),
)
def aot_unpaired(
    answers: AnswerLogprobs, partners: Tensor, *, beta: float, label_smoothing: float
) -> dict[str, Tensor]:
    """`cdpo` on r of a good answer - r of the bad one of equal rank: {good: (B,), bad: (B,)}.

    Makes the whole distribution of good answers' r lie above that of the bad ones'. partners (B,): each answer's match,
    without gradient, from `quantile_partners`. The value of a match counts once, with the good answer; the bad answer's
    term is 0 and brings its gradient. An answer without a match, NaN, has loss 0.
    """
    ratios = answer_ratios(answers)
    has_match = partners.isfinite()
    distance = _signs(answers, ratios) * (ratios - torch.where(has_match, partners, ratios.detach()))
    losses = select(smoothed(beta * distance, label_smoothing), has_match)
    return {
        "good": select(losses, answers.is_good),
        "bad": select(losses - losses.detach(), ~answers.is_good),
    }


# --- with a value network ---------------------------------------------------------------------------------------------


@PREFERENCE_LOSSES.register(
    "dro_v", paper="arXiv:2405.19107 eq. 4, 7, alg. 1", traits=Traits(scale="tau", signs="none")
)
def dro_v(answers: AnswerLogprobs, rewards: Tensor, values: Tensor, *, tau: float) -> Tensor:
    """(reward - V - tau r)^2 / 2 as value, with the policy's own gradient: (B,).

    rewards (B,) from the data, values (B,): V(prompt) of a second network, whose loss is `dro_value`. The gradient is
    that of `dro_surrogate`, 1 / tau times that of the value; it does not flow into `values`.
    """
    surrogate = dro_surrogate(answers, rewards, values, tau=tau)
    joint = dro_value(values, rewards, answer_ratios(answers), tau=tau).detach()
    return joint + (surrogate - surrogate.detach())


def dro_surrogate(answers: AnswerLogprobs, rewards: Tensor, values: Tensor, *, tau: float) -> Tensor:
    """-log policy (reward - V) + (tau / 2) r^2: what dro_v's policy goes down, (B,).        [arXiv:2405.19107 eq. 7]"""
    advantages = (at_least_float32(rewards) - at_least_float32(values)).detach()
    return -at_least_float32(answers.logprobs) * advantages + 0.5 * tau * answer_ratios(answers) ** 2


def dro_value(values: Tensor, rewards: Tensor, ratios: Tensor, *, tau: float) -> Tensor:
    """(V - reward + tau r)^2 / 2: the loss of dro_v's value network, (B,), whose gradient stays out of r. [eq. 8]"""
    return 0.5 * (at_least_float32(values) - at_least_float32(rewards) + tau * ratios.detach()) ** 2
