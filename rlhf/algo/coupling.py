"""What some preference losses need of the whole batch, computed before any of its rows has a gradient.

A coupling sees the global batch, all ranks and micro-batches: (view, state, draws, options) -> (inputs, new state).
view: the batch's log-probs without gradient. state: running numbers, empty at the start. draws (B,): uniform in (0, 1),
in place of a generator, so that every rank comes to the same result. inputs: what the loss takes beside `view`, by
name: (B,) tensors with a number per row, or () for all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.masked import at_least_float32
from rlhf.batch import AnswerLogprobs, PairLogprobs

State = dict[str, float]
Inputs = dict[str, Tensor]

MIN_BETA = 1e-3  # beta_dpo's beta stays above, however far below the running mean a batch is


def gap_log_weights(gaps: Tensor, *, mean: float, std: float) -> Tensor:
    """-((gap - mean) / std)^2 / 2: log of the weight with which beta_dpo keeps a pair, (B,).      [arXiv:2407.08639]"""
    return -0.5 * ((gaps - mean) / std) ** 2


def reweighted_batch(
    view: PairLogprobs, state: State, draws: Tensor, *, beta: float, a: float, momentum: float, keep: float
) -> tuple[Inputs, State]:
    """beta_dpo's pairs to keep and its beta: {selected (B,) bool, batch_beta ()}.                    [arXiv:2407.08639]

    The running mean and standard deviation of the gaps h (both 0 at the start) move by 1 - momentum towards this
    batch's before they are used. floor(keep B) pairs, at least one, are drawn without replacement with weights
    exp(-((h - mean) / std)^2 / 2): the largest of log-weight + Gumbel noise. While std is 0 all are kept.
    batch_beta = beta (1 + a (mean h of the kept - running mean)), at least 1e-3.
    """
    assert view.ref_chosen is not None and view.ref_rejected is not None
    gaps = ((view.chosen - view.ref_chosen) - (view.rejected - view.ref_rejected)).double()
    rows = len(gaps)
    spread = float(gaps.std()) if rows > 1 else 0.0  # with Bessel's correction
    old = state or {"mean": 0.0, "std": 0.0}
    mean = momentum * old["mean"] + (1 - momentum) * float(gaps.mean())
    std = momentum * old["std"] + (1 - momentum) * spread
    selected = torch.ones_like(gaps, dtype=torch.bool)
    if std > 0:
        # the small addend: 0.29 * 100 is 28.999999999999996
        num_kept = max(1, int(keep * rows + 1e-9))
        noise = -(-draws.double().log()).log()
        kept = (gap_log_weights(gaps, mean=mean, std=std) + noise).topk(num_kept).indices
        selected = torch.zeros_like(selected).index_fill(0, kept, True)
    batch_beta = max(MIN_BETA, beta * (1 + a * (float(gaps[selected].mean()) - mean)))
    return {"selected": selected, "batch_beta": gaps.new_tensor(batch_beta)}, {"mean": mean, "std": std}


def equal_rank_partners(view: PairLogprobs, state: State, draws: Tensor) -> tuple[Inputs, State]:
    """aot's matching: {partners (B,)}, for each pair the reference's difference that has the policy's rank.

    Differences are log-prob of the chosen - log-prob of the rejected; both sets are sorted apart.    [arXiv:2406.05882]
    """
    view = view.map(at_least_float32)
    assert view.ref_chosen is not None and view.ref_rejected is not None
    order = (view.chosen - view.rejected).argsort(stable=True)
    reference = (view.ref_chosen - view.ref_rejected).sort().values
    return {"partners": torch.empty_like(reference).index_copy(0, order, reference)}, state


def quantile_partners(view: AnswerLogprobs, state: State, draws: Tensor) -> tuple[Inputs, State]:
    """aot_unpaired's matching: {partners (B,)}, for each answer the log-ratio of equal quantile in the other class.

    Good and bad answers are sorted apart by log policy - log reference. Equally many are matched rank by rank; else the
    other class's quantile function is interpolated linearly. Without the other class it is NaN.   [arXiv:2406.05882]
    """
    assert view.ref_logprobs is not None
    ratios = at_least_float32(view.logprobs) - at_least_float32(view.ref_logprobs)
    partners = torch.full_like(ratios, torch.nan)
    good, bad = view.is_good.nonzero().squeeze(-1), (~view.is_good).nonzero().squeeze(-1)
    if len(good) and len(bad):
        for own, other in ((good, bad), (bad, good)):
            quantiles = _quantiles(ratios[other].sort().values, len(own))
            partners[own[ratios[own].argsort(stable=True)]] = quantiles
    return {"partners": partners}, state


def mismatched_kl(view: AnswerLogprobs, state: State, mismatched: Tensor, draws: Tensor) -> tuple[Inputs, State]:
    """kto's reference point: {z0 ()} = max(0, mean of `mismatched`), nats.                      [arXiv:2402.01306]

    mismatched (B,): log policy - log reference of every prompt with another prompt's answer. An estimate of
    KL(policy || reference) that no answer's own label takes part in.
    """
    return {"z0": mismatched.double().mean().clamp(min=0)}, state


def mean_reward(view: AnswerLogprobs, state: State, draws: Tensor, *, beta: float) -> tuple[Inputs, State]:
    """bco's reward shift: {shift ()} = mean of beta (log policy - log reference) over all answers up to this batch's.

    The mean over answers, as TRL has it; the paper's is that of the two classes' means, which is the same where there
    are as many good as bad answers.                                                         [arXiv:2404.04656]
    """
    assert view.ref_logprobs is not None
    rewards = beta * (view.logprobs - view.ref_logprobs).double()
    old = state or {"count": 0.0, "mean": 0.0}
    count = old["count"] + len(rewards)
    mean = old["mean"] + float((rewards - old["mean"]).sum()) / count
    return {"shift": rewards.new_tensor(mean)}, {"count": count, "mean": mean}


def _quantiles(values: Tensor, num: int) -> Tensor:
    """`num` evenly spaced quantiles of sorted values, from the smallest to the largest; the middle where num is 1."""
    if num == len(values):
        return values
    places = torch.linspace(0, 1, num).to(values) if num > 1 else values.new_tensor([0.5])
    return torch.quantile(values, places)
