"""Losses on K scored answers to each prompt; one loss per list.

s = beta (log policy - log reference), (B, K). Scores are higher for better answers; absent answers (`present` False)
take no part, whatever their numbers are. Only the order of the scores matters unless a loss says otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rlhf.algo.masked import at_least_float32, row_sums, select
from rlhf.algo.preference import LOG_2, PREFERENCE_LOSSES, always
from rlhf.algo.registry import Traits
from rlhf.batch import ListLogprobs


def list_ratios(lists: ListLogprobs) -> Tensor:
    """log policy - log reference of each answer, 0 where absent: (B, K), at least float32, nats."""
    assert lists.ref_logprobs is not None, "reference log-probs are missing"
    return select(at_least_float32(lists.logprobs) - at_least_float32(lists.ref_logprobs), lists.present)


def masked_logsumexp(x: Tensor, mask: Tensor) -> Tensor:
    """log of the sum of exp over the selected: (..., K) -> (...,); -inf without any."""
    return torch.where(mask, x, -torch.inf).logsumexp(-1)


def _log_softmax(x: Tensor, present: Tensor) -> Tensor:
    """log softmax over the present answers, 0 at absent ones: (B, K)."""
    return select(x - masked_logsumexp(x, present).unsqueeze(-1), present)


def _scores(lists: ListLogprobs) -> Tensor:
    """The data's scores, 0 where absent: (B, K)."""
    return select(at_least_float32(lists.scores), lists.present)


def _better(lists: ListLogprobs) -> Tensor:
    """[b, i, j]: answer i is strictly better than answer j, both present: (B, K, K) bool."""
    scores = _scores(lists)
    return (scores.unsqueeze(-1) > scores.unsqueeze(-2)) & lists.present.unsqueeze(-1) & lists.present.unsqueeze(-2)


def best_answers(scores: Tensor, present: Tensor) -> Tensor:
    """Column of the highest score among the present, the first of several: (B, K) -> (B,)."""
    return torch.where(present, at_least_float32(scores), -torch.inf).argmax(-1)


def best_nll(lists: ListLogprobs) -> Tensor:
    """-log policy of the best answer, summed over its tokens: (B,)."""
    logprobs = select(at_least_float32(lists.logprobs), lists.present)
    return -logprobs.gather(-1, best_answers(lists.scores, lists.present).unsqueeze(-1)).squeeze(-1)


@PREFERENCE_LOSSES.register("pl_dpo", paper="arXiv:2305.18290 app. A.3; arXiv:2402.01878 eq. 7")
def pl_dpo(lists: ListLogprobs, *, beta: float) -> Tensor:
    """Sum over answers k of log(sum of e^s_j over j no better than k) - s_k: (B,), the Plackett-Luce likelihood.

    The best is drawn from all, the second from what is left, and so on; `dpo` where K = 2, log K! at the reference.
    Equal scores stay in each other's sums (Breslow's form for ties), so no order among them is made up.
    """
    s, scores = beta * list_ratios(lists), _scores(lists)
    others = (scores.unsqueeze(-2) <= scores.unsqueeze(-1)) & lists.present.unsqueeze(-2)  # [b, k, j]
    totals = masked_logsumexp(s.unsqueeze(-2).expand(others.shape), others)  # (B, K)
    return row_sums(totals - s, lists.present)


@PREFERENCE_LOSSES.register("pair_logistic", paper="arXiv:2402.01878 eq. 5")
def pair_logistic(lists: ListLogprobs, *, beta: float) -> Tensor:
    """Sum over pairs i better than j of log(1 + e^-(s_i - s_j)): (B,). `dpo` on all pairs of a list; ties are none."""
    s = beta * list_ratios(lists)
    return select(softplus(s.unsqueeze(-2) - s.unsqueeze(-1)), _better(lists)).sum((-2, -1))


@PREFERENCE_LOSSES.register("lipo_lambda", paper="arXiv:2402.01878 eq. 8")
def lipo_lambda(lists: ListLogprobs, *, beta: float) -> Tensor:
    """`pair_logistic` with the pairs weighted by |G_i - G_j| |1 / D_i - 1 / D_j|, without gradient: (B,).

    G = 2^score - 1, for scores in [0, 1]; D = log(1 + rank), rank by the policy's own s, 1 for the highest. Mistakes at
    the top weigh most. Answers with equal s, as all are at the reference, are ranked in the order of the list.
    """
    s = beta * list_ratios(lists)
    order = torch.where(lists.present, s.detach(), -torch.inf).argsort(stable=True, descending=True)
    discounts = 1 / torch.log1p(order.argsort(-1).to(s) + 1)
    gains = torch.exp2(_scores(lists)) - 1
    weights = (gains.unsqueeze(-1) - gains.unsqueeze(-2)) * (discounts.unsqueeze(-1) - discounts.unsqueeze(-2))
    return select(weights.abs() * softplus(s.unsqueeze(-2) - s.unsqueeze(-1)), _better(lists)).sum((-2, -1))


@PREFERENCE_LOSSES.register("listnet_softmax", paper="arXiv:2402.01878 eq. 11 (ListNet)", traits=Traits(signs="none"))
def listnet_softmax(lists: ListLogprobs, *, beta: float) -> Tensor:
    """-sum p_i log softmax(s)_i, p = score / sum of the list's scores: (B,).

    For scores in [0, 1], whose sizes matter here. A list whose scores are all 0 has loss 0.
    """
    scores = _scores(lists)
    shares = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return -(shares * _log_softmax(beta * list_ratios(lists), lists.present)).sum(-1)


@PREFERENCE_LOSSES.register(
    "dpo_rw", paper="arXiv:2402.00856 (DPO on rewards)", traits=Traits(scale="beta_pi", signs="none")
)
def dpo_rw(lists: ListLogprobs, *, beta_pi: float, beta_r: float) -> Tensor:
    """-sum p_i log softmax(s)_i, p = softmax(score / beta_r): (B,), the forward direction of `exo_rw`."""
    log_shares = _log_softmax(_scores(lists) / beta_r, lists.present)
    shares = select(log_shares.exp(), lists.present)
    return -(shares * _log_softmax(beta_pi * list_ratios(lists), lists.present)).sum(-1)


@PREFERENCE_LOSSES.register("exo_rw", paper="arXiv:2402.00856", traits=Traits(scale="beta_pi", signs="none"))
def exo_rw(lists: ListLogprobs, *, beta_pi: float, beta_r: float) -> Tensor:
    """KL(softmax(s) || softmax(score / beta_r)): (B,). The reverse of `dpo_rw`: seeks the best answers, not all."""
    log_shares = _log_softmax(_scores(lists) / beta_r, lists.present)
    log_policy = _log_softmax(beta_pi * list_ratios(lists), lists.present)
    return select(log_policy.exp() * (log_policy - log_shares), lists.present).sum(-1)


@PREFERENCE_LOSSES.register("d2o", paper="arXiv:2403.03419 eq. 3", traits=Traits(at_reference=always(LOG_2)))
def d2o(lists: ListLogprobs, *, beta: float, alpha: float) -> Tensor:
    """-log sigmoid(beta mean of r over the others - alpha r of the worst), r = log policy - log reference: (B,).

    The worst answer (the first of several) is the human's bad one; the others are samples of the model itself, whose
    mean stands in for the good answer that the data has not got.
    """
    ratios = list_ratios(lists)
    worst = best_answers(-at_least_float32(lists.scores), lists.present).unsqueeze(-1)
    bad = ratios.gather(-1, worst).squeeze(-1)
    others = (lists.present.sum(-1) - 1).clamp(min=1)
    return -logsigmoid(beta * (ratios.sum(-1) - bad) / others - alpha * bad)


# --- no reference -----------------------------------------------------------------------------------------------------

NO_REFERENCE = Traits(reference=False, average=True, scale=None, invariant=False)


@PREFERENCE_LOSSES.register("rrhf", paper="arXiv:2304.05302 eq. 1-4", traits=NO_REFERENCE)
def rrhf(lists: ListLogprobs, *, length_penalty: float, rank_weight: float) -> Tensor:
    """rank_weight sum over i better than j of max(0, p_j - p_i) - log policy(best): (B,).

    p = log policy / tokens^length_penalty. No margin: a right order has no loss. The second term is the sum over the
    best answer's tokens; the released code divides it by the padded length.
    """
    logprobs = select(at_least_float32(lists.logprobs), lists.present)
    p = logprobs / lists.length.clamp(min=1) ** length_penalty
    ranking = select(torch.relu(p.unsqueeze(-2) - p.unsqueeze(-1)), _better(lists)).sum((-2, -1))
    return rank_weight * ranking + best_nll(lists)


@PREFERENCE_LOSSES.register("pro", paper="arXiv:2306.17492; DAMO-ConvAI/PRO", traits=NO_REFERENCE)
def pro(lists: ListLogprobs, *, sft_weight: float) -> Tensor:
    """Sum over k of log(1 + sum over later j of e^(p_j T_kj - p_k T_k)) - sft_weight (K - 1)^2 log policy(best): (B,).

    p = log policy / tokens; j runs over the answers after k, best first; T_kj = score_k - score_j, T_k the largest of
    them: the further apart, the sharper, so the sizes of scores matter. Ties keep the order of the list.
    """
    order = torch.where(lists.present, at_least_float32(lists.scores), -torch.inf).argsort(stable=True, descending=True)
    present, scores = lists.present.gather(-1, order), _scores(lists).gather(-1, order)
    logprobs = select(at_least_float32(lists.logprobs), lists.present)
    p = (logprobs / lists.length.clamp(min=1)).gather(-1, order)
    later = torch.ones_like(present).unsqueeze(-1).expand(*present.shape, present.shape[-1]).triu(1)
    later = later & present.unsqueeze(-2) & present.unsqueeze(-1)  # [b, k, j]
    apart = select(scores.unsqueeze(-1) - scores.unsqueeze(-2), later)
    own = p * apart.amax(-1)  # (B, K)
    logits = torch.cat([own.unsqueeze(-1), p.unsqueeze(-2) * apart], -1)
    totals = masked_logsumexp(logits, torch.cat([later.any(-1, keepdim=True), later], -1))
    ranking = row_sums(totals - own, later.any(-1))
    return ranking + sft_weight * (present.sum(-1) - 1) ** 2 * best_nll(lists)
