"""Losses on pairs that are not `dpo` with another inside: other shapes, targets from scores, no reference at all.

h, and what a loss returns, are as in `preference.py`; a = beta (log policy - log reference)(chosen), b the same of the
rejected answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rlhf.algo.kl import MAX_LOG_RATIO
from rlhf.algo.logprobs import log1mexp
from rlhf.algo.masked import at_least_float32, row_sums
from rlhf.algo.preference import LOG_2, PREFERENCE_LOSSES, always, gap, implicit_rewards, log_ratios
from rlhf.algo.registry import Traits
from rlhf.batch import PairLogprobs, TokenLogprobs

MAX_TOKEN_PROB = 1 - 1e-5  # of a token that unlikelihood pushes down: the gradient p / (1 - p) ends there

GPO = "arXiv:2402.05749 table 1"


# --- convex and bounded functions of h --------------------------------------------------------------------------------


@PREFERENCE_LOSSES.register(
    "rso_hinge", paper="arXiv:2309.06657 eq. 10", traits=Traits(scale="gamma", at_reference=always(1))
)
def rso_hinge(pairs: PairLogprobs, *, gamma: float) -> Tensor:
    """max(0, 1 - gamma h): (B,). A pair beyond the margin 1 / gamma has no gradient."""
    return torch.relu(1 - gamma * gap(pairs))


@PREFERENCE_LOSSES.register("gpo_exponential", paper=GPO, traits=Traits(at_reference=always(1)))
def gpo_exponential(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """exp(-beta h): (B,). Wrong pairs rule the batch.

    The exponent is clamped to 20, beyond which the loss stands still.
    """
    return (-beta * gap(pairs)).clamp(max=MAX_LOG_RATIO).exp()


@PREFERENCE_LOSSES.register("gpo_truncated_quadratic", paper=GPO, traits=Traits(at_reference=always(1)))
def gpo_truncated_quadratic(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """max(0, 1 - beta h)^2: (B,). `gpo_squared` without a pull back from wide gaps."""
    return torch.relu(1 - beta * gap(pairs)) ** 2


@PREFERENCE_LOSSES.register("gpo_savage", paper=GPO, traits=Traits(at_reference=always(0.25)))
def gpo_savage(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """1 / (1 + exp(beta h))^2: (B,), between 0 and 1. Very wrong pairs, perhaps mislabelled, count little."""
    return torch.sigmoid(-beta * gap(pairs)) ** 2


@PREFERENCE_LOSSES.register("gpo_squared", paper=GPO, traits=Traits(at_reference=always(1), signs="none"))
def gpo_squared(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(beta h - 1)^2: (B,). `ipo` with beta = 2 tau, divided by 1 / (2 tau)^2."""
    return (beta * gap(pairs) - 1) ** 2


@PREFERENCE_LOSSES.register(
    "exo_pref",
    paper="arXiv:2402.00856 eq. 16",
    traits=Traits(
        at_reference=lambda *, beta, label_smoothing: -LOG_2 - 0.5 * math.log(label_smoothing * (1 - label_smoothing)),
        signs="none",
    ),
)
def exo_pref(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """KL of (q, 1 - q), q = sigmoid(beta h), to the labels (1 - e, e), e = label_smoothing: (B,).

    The reverse direction of `cdpo`'s cross-entropy. Not convex: the gradient of a very wrong pair vanishes.
    """
    logit = beta * gap(pairs)
    right = torch.sigmoid(logit) * (logsigmoid(logit) - math.log(1 - label_smoothing))
    return right + torch.sigmoid(-logit) * (logsigmoid(-logit) - math.log(label_smoothing))


@PREFERENCE_LOSSES.register(
    "discopop", paper="arXiv:2406.08414 eq. 5", traits=Traits(at_reference=always((1 + LOG_2) / 2), signs="none")
)
def discopop(pairs: PairLogprobs, *, beta: float, tau: float) -> Tensor:
    """(1 - m) log(1 + e^-x) + m e^-x with x = beta h, m = sigmoid(x / tau): (B,).

    Found by a search over programs. Not convex: just around h = 0 its gradient has the wrong sign. x >= -20 in e^-x.
    """
    logit = beta * gap(pairs)
    mix = torch.sigmoid(logit / tau)
    return (1 - mix) * softplus(-logit) + mix * (-logit).clamp(max=MAX_LOG_RATIO).exp()


# --- each answer by itself --------------------------------------------------------------------------------------------


@PREFERENCE_LOSSES.register(
    "nca_pair", paper="arXiv:2402.05369 (NCA, pairs)", traits=Traits(at_reference=always(2 * LOG_2), signs="rejected")
)
def nca_pair(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log sigmoid(a) - (log sigmoid(-a) + log sigmoid(-b)) / 2: (B,).

    Fits rewards themselves and not their difference: a rises to log 2 and no further, so likelihoods do not drift off.
    """
    chosen, rejected = implicit_rewards(pairs, beta=beta)
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


@PREFERENCE_LOSSES.register("apo_zero", paper="arXiv:2408.06266 eq. 7", traits=Traits(at_reference=always(1)))
def apo_zero(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """1 - sigmoid(a) + sigmoid(b): (B,). The chosen answer up, the rejected one down; for chosen ones that are good."""
    chosen, rejected = implicit_rewards(pairs, beta=beta)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@PREFERENCE_LOSSES.register(
    "apo_down", paper="arXiv:2408.06266 eq. 8", traits=Traits(at_reference=always(1), signs="rejected")
)
def apo_down(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """sigmoid(a) + 1 - sigmoid(a - b): (B,). Both answers down, the chosen one less, for a policy better than both."""
    chosen, rejected = implicit_rewards(pairs, beta=beta)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@PREFERENCE_LOSSES.register(
    "bco_pair", paper="arXiv:2404.04656 on pairs, no reward shift (TRL)", traits=Traits(at_reference=always(2 * LOG_2))
)
def bco_pair(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log sigmoid(a) - log sigmoid(-b): (B,). A binary classifier of each answer."""
    chosen, rejected = implicit_rewards(pairs, beta=beta)
    return -logsigmoid(chosen) - logsigmoid(-rejected)


# --- targets from scores ----------------------------------------------------------------------------------------------


@PREFERENCE_LOSSES.register(
    "sppo", paper="arXiv:2405.00675 eq. 4.7; uclaml/SPPO", traits=Traits(at_reference=always(0), signs="none")
)
def sppo(pairs: PairLogprobs, win_rates: Tensor, *, beta: float) -> Tensor:
    """((r_w - (P_w - 1/2) / beta)^2 + (r_l - (P_l - 1/2) / beta)^2) / 2, r = log policy - log reference: (B,).

    win_rates (B, 2): P of chosen and rejected, the probability that the answer beats the policy. With beta = 1e-3 the
    targets are some +-500 nats and losses near 1e5 are what to expect.
    """
    targets = (at_least_float32(win_rates) - 0.5) / beta
    chosen, rejected = log_ratios(pairs)
    return 0.5 * ((chosen - targets[:, 0]) ** 2 + (rejected - targets[:, 1]) ** 2)


@PREFERENCE_LOSSES.register(
    "sppo_hard",
    paper="arXiv:2405.00675 eq. 4.7 with P = 1, 0 (TRL)",
    traits=Traits(at_reference=lambda *, beta: 0.5 / beta**2, signs="none"),
)
def sppo_hard(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, r = log policy - log reference: (B,). No half, unlike `sppo`."""
    chosen, rejected = log_ratios(pairs)
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@PREFERENCE_LOSSES.register(
    "dno", paper="arXiv:2404.03715 alg. 1", traits=Traits(scale="eta", at_reference=always(LOG_2), signs="none")
)
def dno(pairs: PairLogprobs, scores: Tensor, *, eta: float) -> Tensor:
    """-p log sigmoid(eta h) - (1 - p) log sigmoid(-eta h), p = sigmoid(score_chosen - score_rejected): (B,).

    scores (B, 2) of chosen and rejected: soft labels in place of a winner, so equal answers are not torn apart.
    """
    scores = at_least_float32(scores)
    wins = torch.sigmoid(scores[:, 0] - scores[:, 1])
    logit = eta * gap(pairs)
    return -wins * logsigmoid(logit) - (1 - wins) * logsigmoid(-logit)


# --- no reference -----------------------------------------------------------------------------------------------------


def log_odds(pairs: PairLogprobs) -> Tensor:
    """log of odds(chosen) / odds(rejected), odds = p / (1 - p), log p being the mean per token: (B,)."""
    chosen = at_least_float32(pairs.chosen) / pairs.chosen_len
    rejected = at_least_float32(pairs.rejected) / pairs.rejected_len
    return chosen - rejected - (log1mexp(chosen) - log1mexp(rejected))


def cringe_gate(pairs: PairLogprobs, *, b: float, tau: float) -> Tensor:
    """sigmoid((b - (log policy(chosen) - log policy(rejected))) / tau): near 0 where a pair is told apart, (B,)."""
    return torch.sigmoid((b - (at_least_float32(pairs.chosen) - at_least_float32(pairs.rejected))) / tau)


@PREFERENCE_LOSSES.register(
    "simpo", paper="arXiv:2405.14734 eq. 6", traits=Traits(reference=False, average=True, invariant=False)
)
def simpo(pairs: PairLogprobs, *, beta: float, gamma: float) -> Tensor:
    """-log sigmoid(beta (log policy(chosen) / tokens - log policy(rejected) / tokens) - gamma): (B,).

    gamma is the margin itself, in the unit of the logit; the released code takes gamma / beta.
    """
    chosen, rejected = at_least_float32(pairs.chosen), at_least_float32(pairs.rejected)
    return -logsigmoid(beta * (chosen / pairs.chosen_len - rejected / pairs.rejected_len) - gamma)


@PREFERENCE_LOSSES.register(
    "orpo",
    paper="arXiv:2403.07691 eq. 6-7",
    traits=Traits(reference=False, average=True, scale=None, invariant=False),
)
def orpo(pairs: PairLogprobs, *, lam: float) -> Tensor:
    """-log policy(chosen) / tokens - lam log sigmoid(log odds ratio): (B,). Supervised learning and preference at once.

    Starts from a base model and takes the place of SFT. The first term is the mean over the answer's tokens, each pair
    counting the same.
    """
    return -at_least_float32(pairs.chosen) / pairs.chosen_len - lam * logsigmoid(log_odds(pairs))


@PREFERENCE_LOSSES.register("cpo", paper="arXiv:2401.08417 eq. 3-5", traits=Traits(reference=False, invariant=False))
def cpo(pairs: PairLogprobs, *, beta: float, alpha: float) -> dict[str, Tensor]:
    """-log sigmoid(beta (log policy(chosen) - log policy(rejected))) per pair, -alpha log policy(chosen) per token.

    `dpo` with a uniform reference; the second term is averaged over all chosen tokens of the batch, as in the code.
    """
    chosen, rejected = at_least_float32(pairs.chosen), at_least_float32(pairs.rejected)
    return {"rows": -logsigmoid(beta * (chosen - rejected)), "chosen_tokens": -alpha * chosen}


@PREFERENCE_LOSSES.register(
    "slic_hf", paper="arXiv:2305.10425 eq. 1", traits=Traits(reference=False, scale=None, invariant=False)
)
def slic_hf(pairs: PairLogprobs, *, delta: float, lam: float) -> Tensor:
    """max(0, delta - log policy(chosen) + log policy(rejected)) - lam log policy(chosen): (B,), of summed log-probs.

    The target of the second term, which keeps the policy near its data, is the chosen answer.
    """
    chosen, rejected = at_least_float32(pairs.chosen), at_least_float32(pairs.rejected)
    return torch.relu(delta - chosen + rejected) - lam * chosen


@PREFERENCE_LOSSES.register(
    "unlikelihood_seq",
    paper="arXiv:2305.18290 sec. 6 (baseline)",
    traits=Traits(reference=False, scale=None, invariant=False, unbounded=True),
)
def unlikelihood_seq(pairs: PairLogprobs, *, alpha: float) -> Tensor:
    """-log policy(chosen) + alpha log policy(rejected): (B,).

    Has no smallest value and a gradient that never weakens: it degenerates soon. A baseline, to be stopped early.
    """
    return -at_least_float32(pairs.chosen) + alpha * at_least_float32(pairs.rejected)


@PREFERENCE_LOSSES.register(
    "unlikelihood_token",
    paper="arXiv:1908.04319 (token level)",
    traits=Traits(reference=False, scale=None, invariant=False),
)
def unlikelihood_token(pairs: PairLogprobs, rejected_tokens: TokenLogprobs, *, alpha: float) -> Tensor:
    """-log policy(chosen) - alpha sum over the rejected answer's tokens of log(1 - p): (B,).

    p is at most 1 - 1e-5, as in the released code: a token that is nearly certain has no gradient.
    """
    likely = at_least_float32(rejected_tokens.logprobs).clamp(max=math.log(MAX_TOKEN_PROB))
    return -at_least_float32(pairs.chosen) - alpha * row_sums(log1mexp(likely), rejected_tokens.mask)


@PREFERENCE_LOSSES.register(
    "preferred_ft",
    paper="arXiv:2305.18290 sec. 6 (Preferred-FT)",
    traits=Traits(reference=False, scale=None, invariant=False),
)
def preferred_ft(pairs: PairLogprobs) -> dict[str, Tensor]:
    """-log policy(chosen), averaged over all chosen tokens: {chosen_tokens: (B,)}. SFT on the better answers alone."""
    return {"chosen_tokens": -at_least_float32(pairs.chosen)}


@PREFERENCE_LOSSES.register(
    "pairwise_cringe",
    paper="arXiv:2312.16682 (the gate's form is a reading of it)",
    traits=Traits(reference=False, scale=None, invariant=False),
)
def pairwise_cringe(pairs: PairLogprobs, contrast: Tensor, *, b: float, tau: float, alpha: float) -> Tensor:
    """gate (-log policy(chosen) + alpha contrast): (B,), where `cringe_gate` is near 0 once a pair is told apart.

    contrast (B,): the rejected answer's tokens against what the policy would say instead, see `token_contrast`.
    Pairs that are told apart by more than b fade out; the gradient goes through the gate too.
    """
    return cringe_gate(pairs, b=b, tau=tau) * (alpha * contrast - at_least_float32(pairs.chosen))
