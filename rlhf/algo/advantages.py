"""How much better an action was than expected. Constants for the update: call them without gradients.

An estimator is called with what its parameters name, always of a whole rollout (B = N x G rows, a prompt's answers are
neighbours): `rewards` and `values` per token; `mask`, true on response tokens; `group_returns`, each answer's score,
less its summed KL penalty where that is part of the reward; `scores`, `greedy_scores` and `penalties` apart;
`baseline`, a mean of earlier returns; `step_scores`, one where a step of the answer ends.
NaN means unscored: such an answer has advantage 0 and is in no statistic. Sums over answers are taken in float64: the
rounding of a mean, divided by a small deviation, would be a signal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.masked import at_least_float32, moments, select, whiten
from rlhf.algo.registry import Registry

ADVANTAGES = Registry("advantage estimator")


@ADVANTAGES.register("gae", paper="arXiv:1506.02438 eq. 16")
def gae(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages, A_t = d_t + gamma lam A_{t+1} with d_t = r_t + gamma V_{t+1} - V_t, and returns A + V.

    rewards, values, mask: (B, R), mask 1 on response tokens; V_t is the value of the state before token t.
    Returns (advantages, returns), both (B, R), 0 where mask is 0. Not whitened.
    Nothing follows the last token (V = 0): a truncated answer is treated as ended. Masked positions between response
    tokens are stepped over. A row with a NaN reward is unscored: its returns are its values, no error for the critic.
    """
    scored = _scored_tokens(rewards, mask)
    rewards = select(at_least_float32(rewards), scored)
    values = select(at_least_float32(values), mask)
    advantage = next_value = rewards.new_zeros(rewards.shape[0])  # (B,)
    backwards = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(scored[:, t], delta + gamma * lam * advantage, advantage)
        next_value = torch.where(scored[:, t], values[:, t], next_value)
        backwards.append(advantage)
    advantages = select(torch.stack(backwards[::-1], dim=1), scored)  # (B, R)
    return advantages, advantages + values


@ADVANTAGES.register("grpo", paper="arXiv:2402.03300 sec. 4.1.2")
def grpo(group_returns: Tensor, *, eps: float) -> Tensor:
    """(return - mean) / (std + eps) inside each group of answers to one prompt: (N, G) -> (N, G).

    std with Bessel's correction, as in TRL and verl. A group of equal returns (or with a single one) gets exactly 0.
    """
    scored = ~group_returns.isnan()
    return _narrow(_centred(group_returns, scored) / (_deviation(group_returns, scored) + eps), group_returns)


@ADVANTAGES.register("grpo_batch", paper="arXiv:2508.08221 (Lite PPO)")
def grpo_batch(group_returns: Tensor, *, eps: float) -> Tensor:
    """(return - the group's mean) / (std of all returns of the batch + eps): (N, G) -> (N, G).

    The deviation is that of the returns themselves around their common mean, with Bessel's correction, as in TRL; not
    that of the centred returns. Groups with little spread are not blown up.
    """
    scored = ~group_returns.isnan()
    std = _deviation(group_returns.reshape(1, -1), scored.reshape(1, -1))  # (1, 1)
    return _narrow(_centred(group_returns, scored) / (std + eps), group_returns)


@ADVANTAGES.register("dr_grpo", paper="arXiv:2503.20783")
def dr_grpo(group_returns: Tensor) -> Tensor:
    """return - mean of its group, divided by nothing: (N, G) -> (N, G), in units of the score.

    Its other half is the aggregation `constant`, which does not divide by the length of the answer either.
    """
    return _narrow(_centred(group_returns, ~group_returns.isnan()), group_returns)


@ADVANTAGES.register("process_grpo", paper="arXiv:2402.03300 sec. 4.1.3")
def process_grpo(step_scores: Tensor, *, eps: float) -> Tensor:
    """A_t = sum over steps ending at or after t of (score - mean) / (std + eps): (N, G, R) -> (N, G, R).

    step_scores: NaN where no step ends. Mean and std (Bessel's correction) are those of all steps of all answers of
    the group. Tokens behind the last step have 0, and so has a group in which a single answer has steps.
    """
    ends = ~step_scores.isnan()
    ends = ends & (ends.any(-1).sum(-1) > 1)[:, None, None]  # (N, G, R)
    scores, is_end = step_scores.flatten(1), ends.flatten(1)  # (N, G * R)
    normalised = _centred(scores, is_end) / (_deviation(scores, is_end) + eps)
    return _narrow(normalised.reshape(step_scores.shape).flip(-1).cumsum(-1).flip(-1), step_scores)


@ADVANTAGES.register("rloo", paper="arXiv:2402.14740")
def rloo(group_returns: Tensor) -> Tensor:
    """return - mean of the group's other returns, which is G / (G - 1) (return - mean): (N, G) -> (N, G).

    G counts the scored answers. An answer without another one to compare it with gets 0.
    """
    scored = ~group_returns.isnan()
    count = scored.sum(-1, keepdim=True).double()
    return _narrow(_centred(group_returns, scored) * (count / (count - 1).clamp(min=1)), group_returns)


@ADVANTAGES.register("reinforce", paper="Williams 1992, doi:10.1007/BF00992696")
def reinforce(group_returns: Tensor, baseline: Tensor, *, decay: float) -> tuple[Tensor, Tensor]:
    """return - baseline, and the next baseline, decay * baseline + (1 - decay) * mean of these returns.

    group_returns (N, G), baseline () -> (advantages (N, G), next baseline ()). The baseline of a rollout comes from
    earlier ones, since one that depends on the sample itself would bias the gradient. NaN is none yet: nothing is
    subtracted, and the next one is the mean. A rollout without a score leaves it as it is.
    """
    scored = ~group_returns.isnan()
    subtracted = select(baseline.double(), ~baseline.isnan())
    wide = select(group_returns.double(), scored)
    mean = wide.sum() / scored.sum().clamp(min=1)
    following = torch.where(baseline.isnan(), mean, decay * subtracted + (1 - decay) * mean)
    following = torch.where(scored.any(), following, baseline.double())
    return _narrow(select(wide - subtracted, scored), group_returns), _narrow(following, baseline)


@ADVANTAGES.register("reinforce_pp", paper="arXiv:2501.03262")
def reinforce_pp(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """G_t = sum over s >= t of gamma^(s-t) r_s, whitened over all response tokens of the rollout: (B, R) -> (B, R).

    rewards, mask: (B, R). Bessel's correction, as in verl. One deviation for all prompts: easy ones are not blown up.
    Masked positions between response tokens are stepped over. A row with a NaN reward is unscored.
    """
    scored = _scored_tokens(rewards, mask)
    to_go, _ = gae(rewards, torch.zeros_like(rewards), scored, gamma=gamma, lam=1.0)
    return whiten(to_go, scored, moments(to_go, scored), unbiased=True)


@ADVANTAGES.register("reinforce_pp_baseline", paper="arXiv:2501.03262 (baseline variant)")
def reinforce_pp_baseline(group_returns: Tensor, mask: Tensor) -> Tensor:
    """return - mean of its group on every token, whitened over all response tokens: (N, G), (B, R) -> (B, R).

    Bessel's correction, as in verl. Answers weigh in mean and deviation by their lengths, so a group of equal returns
    need not end at 0. One with a single scored answer does, and is left out of both.
    """
    scored = ~group_returns.isnan()
    comparable = scored & (scored.sum(-1, keepdim=True) > 1)
    tokens = mask & comparable.reshape(-1, 1)  # (B, R)
    per_token = _centred(group_returns, scored).reshape(-1, 1).expand(mask.shape)
    return _narrow(whiten(per_token, tokens, moments(per_token, tokens), unbiased=True), group_returns)


@ADVANTAGES.register("remax", paper="arXiv:2310.10505; liziniu/ReMax")
def remax(scores: Tensor, greedy_scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """A_t = score - score of the greedy answer + penalty_t on every response token: (B,) twice, (B, R) twice -> (B, R).

    penalties: -coef * KL_t, each token its own, as in the released code; the sum of the later ones is not added.
    A row has 0 everywhere if its answer or its prompt's greedy answer is unscored.
    """
    gain = at_least_float32(scores) - at_least_float32(greedy_scores)  # (B,)
    return select(gain.unsqueeze(-1) + at_least_float32(penalties), mask & ~gain.isnan().unsqueeze(-1))


# --- shared ---------------------------------------------------------------------------------------------------------


def _centred(x: Tensor, selected: Tensor) -> Tensor:
    """x less the mean of its row's selected values, 0 where not selected: (N, M) -> (N, M), float64."""
    wide = select(x.double(), selected)
    return select(wide - wide.sum(-1, keepdim=True) / selected.sum(-1, keepdim=True).clamp(min=1), selected)


def _deviation(x: Tensor, selected: Tensor) -> Tensor:
    """Standard deviation (Bessel) of each row's selected values: (N, M) -> (N, 1), float64; 0 of fewer than two."""
    squares = (_centred(x, selected) ** 2).sum(-1, keepdim=True)
    return (squares / (selected.sum(-1, keepdim=True) - 1).clamp(min=1)).sqrt()


def _scored_tokens(rewards: Tensor, mask: Tensor) -> Tensor:
    """The response tokens of rows without a NaN reward, (B, R)."""
    return mask & ~select(rewards, mask).isnan().any(-1, keepdim=True)


def _narrow(wide: Tensor, like: Tensor) -> Tensor:
    """Back to the type of what came in, at least float32."""
    return wide.to(at_least_float32(like).dtype)
