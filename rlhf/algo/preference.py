"""Losses on pairs of a better and a worse answer, from summed log-probs; one loss per pair, nothing averaged.

h = (log policy - log reference)(chosen) - (log policy - log reference)(rejected), in nats.

`preference.py` has the registry, DPO and what changes the inside of its sigmoid; `pairwise.py` other shapes and losses
without a reference, `unpaired.py` losses on single answers, `listwise.py` on scored lists; `losses.py` has them all.
A loss returns one number per row, (B,), or {denominator: (B,) numbers} where a term is not averaged over rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rlhf.algo.coupling import equal_rank_partners, reweighted_batch
from rlhf.algo.kl import MAX_LOG_RATIO
from rlhf.algo.masked import at_least_float32
from rlhf.algo.registry import Registry, Traits
from rlhf.batch import PairLogprobs

PREFERENCE_LOSSES = Registry("preference loss")

LOG_2 = math.log(2)


def always(value: float) -> Callable[..., float]:
    """The same number, whatever the options."""
    return lambda **_: value


def log_ratios(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    """log policy - log reference of the chosen and of the rejected side, both (B,), at least float32."""
    pairs = pairs.map(at_least_float32)
    assert pairs.ref_chosen is not None and pairs.ref_rejected is not None, "reference log-probs are missing"
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def implicit_rewards(pairs: PairLogprobs, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta * log(policy / reference) of the chosen and of the rejected side, both (B,).    [arXiv:2305.18290 sec. 4]"""
    chosen, rejected = log_ratios(pairs)
    return beta * chosen, beta * rejected


def gap(pairs: PairLogprobs) -> Tensor:
    """h: how much more the policy than the reference prefers the chosen answer, (B,), nats."""
    chosen, rejected = log_ratios(pairs)
    return chosen - rejected


def mean_gap(pairs: PairLogprobs) -> Tensor:
    """h from log-ratios per token, each side's divided by its length, (B,), nats per token."""
    chosen, rejected = log_ratios(pairs)
    return chosen / pairs.chosen_len - rejected / pairs.rejected_len


def displacement(pairs: PairLogprobs) -> Tensor:
    """max(0, log reference - log policy) of the chosen answer: how far it has fallen, (B,), nats."""
    return torch.relu(-log_ratios(pairs)[0])


def smoothed(logit: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(logit) - e log sigmoid(-logit): cross-entropy with labels of which a share e is wrong."""
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


AT_LOG_2 = Traits(at_reference=always(LOG_2))
PER_TOKEN_AT_LOG_2 = Traits(average=True, at_reference=always(LOG_2))


@PREFERENCE_LOSSES.register("dpo", paper="arXiv:2305.18290 eq. 7", traits=AT_LOG_2)
def dpo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log sigmoid(beta h): (B,), each pair's loss; log 2 where policy and reference agree."""
    return -logsigmoid(beta * gap(pairs))


@PREFERENCE_LOSSES.register(
    "cdpo",
    paper="Mitchell 2023, ericmitchell.ai/cdpo.pdf eq. 3",
    traits=Traits(at_reference=always(LOG_2), signs="none"),
)
def cdpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): (B,), with e = label_smoothing.

    Smallest at beta h = log((1 - e) / e): a finite margin, beyond which the gradient turns around.
    """
    return smoothed(beta * gap(pairs), label_smoothing)


@PREFERENCE_LOSSES.register(
    "robust_dpo", paper="arXiv:2403.00409 (robust loss)", traits=Traits(at_reference=always(LOG_2), unbounded=True)
)
def robust_dpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e): (B,), with e = label_smoothing.

    Unbiased for the loss on clean labels where a share e < 1/2 of them is flipped. Has no smallest value: at large h it
    goes on falling with slope e beta / (1 - 2e).
    """
    logit = beta * gap(pairs)
    wrong = -logsigmoid(-logit)
    return (-(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * wrong) / (1 - 2 * label_smoothing)


@PREFERENCE_LOSSES.register(
    "ipo",
    paper="arXiv:2310.12036 eq. 17",
    traits=Traits(scale="tau", at_reference=lambda *, tau: (0.5 / tau) ** 2, signs="none"),
)
def ipo(pairs: PairLogprobs, *, tau: float) -> Tensor:
    """(h - 1 / (2 tau))^2 with h from summed log-probs, as in the paper: (B,).

    The margin to reach is finite, so certain preferences do not drive the policy to the edge. Values at different tau
    do not compare.
    """
    return (gap(pairs) - 0.5 / tau) ** 2


@PREFERENCE_LOSSES.register(
    "ipo_avg",
    paper="arXiv:2310.12036 eq. 17 with log-ratios per token (TRL, HALOs, LLaMA-Factory)",
    traits=Traits(scale="tau", average=True, at_reference=lambda *, tau: (0.5 / tau) ** 2, signs="none"),
)
def ipo_avg(pairs: PairLogprobs, *, tau: float) -> Tensor:
    """(h - 1 / (2 tau))^2 with h from log-ratios per token, which most implementations mean by IPO: (B,)."""
    return (mean_gap(pairs) - 0.5 / tau) ** 2


@PREFERENCE_LOSSES.register("dpo_norm", paper="arXiv:2411.15124; arXiv:2405.14734 app. I", traits=PER_TOKEN_AT_LOG_2)
def dpo_norm(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log sigmoid(beta h) with h from log-ratios per token: (B,). beta is some 50 times that of `dpo`."""
    return -logsigmoid(beta * mean_gap(pairs))


@PREFERENCE_LOSSES.register(
    "dpo_reward_margin", paper="arXiv:2402.10571 (an offset inside), linear in the scores", traits=AT_LOG_2
)
def dpo_reward_margin(pairs: PairLogprobs, scores: Tensor, *, beta: float, kappa: float) -> Tensor:
    """-log sigmoid(beta h - kappa (score_chosen - score_rejected)): (B,); scores (B, 2) of chosen and rejected.

    A pair that the scores tell well apart asks for a wider gap. kappa = 0 is `dpo`.
    """
    scores = at_least_float32(scores)
    return -logsigmoid(beta * gap(pairs) - kappa * (scores[:, 0] - scores[:, 1]))


# --- f-divergences ----------------------------------------------------------------------------------------------------


def _reverse_kl(log_ratio: Tensor, alpha: float | None) -> Tensor:
    return log_ratio


def _forward_kl(log_ratio: Tensor, alpha: float | None) -> Tensor:
    return -(-log_ratio).clamp(max=MAX_LOG_RATIO).exp()


def _jensen_shannon(log_ratio: Tensor, alpha: float | None) -> Tensor:
    return LOG_2 - softplus(-log_ratio)


def _alpha(log_ratio: Tensor, alpha: float | None) -> Tensor:
    assert alpha is not None, "the alpha divergence needs its exponent"
    return -torch.expm1((-alpha * log_ratio).clamp(max=MAX_LOG_RATIO)) / alpha


# f'(u) with u = policy / reference, as functions of log u; additive constants cancel between the two answers
DIVERGENCES: dict[str, Callable[[Tensor, float | None], Tensor]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js": _jensen_shannon,
    "alpha": _alpha,
}


@PREFERENCE_LOSSES.register("f_dpo", paper="arXiv:2309.16240 (f-DPO)", traits=AT_LOG_2)
def f_dpo(pairs: PairLogprobs, *, beta: float, divergence: str, alpha: float | None) -> Tensor:
    """-log sigmoid(beta (f'(u_chosen) - f'(u_rejected))), u = policy / reference: (B,).

    f' is log u (reverse_kl: `dpo`), -1 / u (forward_kl), log(2u / (1 + u)) (js) or (1 - u^-alpha) / alpha (alpha: from
    reverse_kl at 0 to forward_kl at 1). TRL's coefficient is 1 - alpha. Exponents are clamped to 20: an answer that has
    become e^20 times unlikelier (e^(20 / alpha) with alpha) has no gradient.
    """
    chosen, rejected = log_ratios(pairs)
    slope = DIVERGENCES[divergence]
    return -logsigmoid(beta * (slope(chosen, alpha) - slope(rejected, alpha)))


# --- modified margins -------------------------------------------------------------------------------------------------


@PREFERENCE_LOSSES.register("dpop", paper="arXiv:2402.13228 eq. 3", traits=AT_LOG_2)
def dpop(pairs: PairLogprobs, *, beta: float, lam: float) -> Tensor:
    """-log sigmoid(beta (h - lam max(0, log reference - log policy of the chosen))): (B,).

    Keeps the chosen answer from becoming unlikelier while the gap widens: where it has fallen, its gradient is 1 + lam
    times that of the rejected one.
    """
    return -logsigmoid(beta * (gap(pairs) - lam * displacement(pairs)))


@PREFERENCE_LOSSES.register("r_dpo", paper="arXiv:2403.19159 eq. 9", traits=AT_LOG_2)
def r_dpo(pairs: PairLogprobs, *, beta: float, alpha: float) -> Tensor:
    """-log sigmoid(beta h + alpha (tokens of the chosen - tokens of the rejected)): (B,).

    Against a growing length: a chosen answer that is longer needs less of a gap. The sign is plus.
    """
    return -logsigmoid(beta * gap(pairs) + alpha * (pairs.chosen_len - pairs.rejected_len))


@PREFERENCE_LOSSES.register("rpo_nll", paper="arXiv:2404.19733; arXiv:2405.16436", traits=Traits(invariant=False))
def rpo_nll(pairs: PairLogprobs, *, beta: float, alpha: float) -> Tensor:
    """-log sigmoid(beta h) - alpha log policy(chosen) / its tokens: (B,).

    The second term keeps the chosen answer likely, which `dpo` alone does not.
    """
    return dpo(pairs, beta=beta) - alpha * at_least_float32(pairs.chosen) / pairs.chosen_len


@PREFERENCE_LOSSES.register("tdpo1", paper="arXiv:2404.11999 (TDPO1)", traits=AT_LOG_2)
def tdpo1(pairs: PairLogprobs, sequence_kl: Tensor, *, beta: float) -> Tensor:
    """-log sigmoid(beta (h - (D_rejected - D_chosen))): (B,); sequence_kl (B, 2) has D of chosen and rejected, nats.

    D = sum over t of KL(reference(.|s_t) || policy(.|s_t)), with gradient, over the whole vocabulary.
    """
    return -logsigmoid(beta * (gap(pairs) - (sequence_kl[:, 1] - sequence_kl[:, 0])))


@PREFERENCE_LOSSES.register("tdpo2", paper="arXiv:2404.11999 (TDPO2)", traits=AT_LOG_2)
def tdpo2(pairs: PairLogprobs, sequence_kl: Tensor, *, beta: float, alpha: float) -> Tensor:
    """-log sigmoid(beta (h - alpha (D_rejected - sg(D_chosen)))): (B,); sequence_kl (B, 2) as in `tdpo1`.

    sg: the chosen answer's KL is a number without gradient. Holds the rejected answer's KL back.
    """
    return -logsigmoid(beta * (gap(pairs) - alpha * (sequence_kl[:, 1] - sequence_kl[:, 0].detach())))


# --- of the whole batch -----------------------------------------------------------------------------------------------


@PREFERENCE_LOSSES.register(
    "beta_dpo",
    paper="arXiv:2407.08639; junkangwu/beta-DPO",
    traits=Traits(at_reference=always(LOG_2), couple=reweighted_batch),
)
def beta_dpo(pairs: PairLogprobs, selected: Tensor, batch_beta: Tensor) -> dict[str, Tensor]:
    """-log sigmoid(batch_beta h) of the pairs that the batch keeps, averaged over these: {selected: (B,)}.

    selected (B,) bool and batch_beta () come from `reweighted_batch`: outlying gaps are dropped by chance, and a batch
    with wide gaps is held closer to the reference.
    """
    losses = -logsigmoid(batch_beta * gap(pairs))
    return {"selected": torch.where(selected, losses, losses.new_zeros(()))}


@PREFERENCE_LOSSES.register(
    "aot",
    paper="arXiv:2406.05882 (paired)",
    traits=Traits(at_reference=always(LOG_2), signs="none", invariant=False, couple=equal_rank_partners),
)
def aot(pairs: PairLogprobs, partners: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """`cdpo` on (log policy(chosen) - log policy(rejected)) - partner: (B,), distributions compared and not pairs.

    partners (B,): the reference's difference of the same rank in the batch, from `equal_rank_partners`.
    """
    difference = at_least_float32(pairs.chosen) - at_least_float32(pairs.rejected)
    return smoothed(beta * (difference - partners), label_smoothing)
