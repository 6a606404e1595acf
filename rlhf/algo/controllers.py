"""How the weight of a KL term follows the KL that was measured. Called once per rollout, with plain numbers.

`kl` is the mean over the rollout of all devices, `episodes` the number of its answers.
"""

from __future__ import annotations

from rlhf.algo.registry import Registry

KL_CONTROLLERS = Registry("KL controller")

MAX_RELATIVE_ERROR = 0.2
TOLERANCE = 1.5


@KL_CONTROLLERS.register("fixed", paper="arXiv:2203.02155 eq. 2")
def fixed(coef: float, kl: float, episodes: int) -> float:
    """coef, whatever the KL."""
    return coef


@KL_CONTROLLERS.register("adaptive", paper="arXiv:1909.08593 sec. 2.2")
def adaptive(coef: float, kl: float, episodes: int, *, target: float, horizon: float) -> float:
    """coef (1 + e episodes / horizon), e = kl / target - 1 clipped to +-0.2: up while the policy is too far away.

    kl: KL(policy || reference), nats per answer, like the target. horizon: in answers; above a fifth of a rollout's
    answers, else the factor could reach 0.
    """
    error = min(max(kl / target - 1, -MAX_RELATIVE_ERROR), MAX_RELATIVE_ERROR)
    return coef * (1 + error * episodes / horizon)


def ppo_penalty_beta(coef: float, kl: float, episodes: int, *, target: float) -> float:
    """coef / 2 if kl < target / 1.5, 2 coef if kl > 1.5 target, else coef.               [arXiv:1707.06347 sec. 4]

    The weight of `ppo_penalty`, which brings its own controller: nothing chooses it by name.
    kl: KL(old policy || policy) after the update on a rollout, nats per token, like the target.
    """
    if kl < target / TOLERANCE:
        return coef / 2
    return 2 * coef if kl > TOLERANCE * target else coef
