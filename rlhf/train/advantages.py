"""From scored answers to an experience: the part of a rollout in which PPO and GRPO differ.

Everything here sees the whole rollout, all ranks' rows, so whitening and groups are global by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algo import rewards as reward_math
from rlhf.algo.advantages import ADVANTAGES
from rlhf.algo.kl import KL_ESTIMATORS
from rlhf.algo.masked import moments, whiten
from rlhf.batch import Experience, Rows
from rlhf.recipe.stages import GRPORecipe, PPORecipe
from rlhf.train.objectives import bind


@dataclass(frozen=True)
class Scored(Rows):
    """A whole rollout after all models have seen it. Unscored answers have a NaN score and an empty response mask."""

    ids: Tensor  # (B, T)
    attention: Tensor  # (B, T)
    response_mask: Tensor  # (B, R)
    sample_logprobs: Tensor  # (B, R)
    old_logprobs: Tensor  # (B, R)
    ref_logprobs: Tensor  # (B, R)
    finished: Tensor  # (B,)
    scores: Tensor  # (B,)
    old_values: Tensor | None = None  # (B, R)


def ppo_experience(scored: Scored, recipe: PPORecipe) -> Experience:
    """KL-shaped token rewards, GAE against the critic, advantages whitened over the rollout. [arXiv:1909.08593]"""
    assert scored.old_values is not None, "PPO needs a critic"
    mask = scored.response_mask
    scores = process_scores(scored, recipe)
    kl = KL_ESTIMATORS[recipe.kl.estimator].function(scored.old_logprobs, scored.ref_logprobs)
    rewards = reward_math.shape_rewards(scores, kl, mask, kl_coef=recipe.kl.coef)
    advantages, returns = bind(ADVANTAGES, recipe.advantage)(rewards, scored.old_values, mask)
    if recipe.whiten_advantages:
        advantages = whiten(advantages, mask, moments(advantages, mask), unbiased=True)
    return Experience(
        scored.ids,
        scored.attention,
        mask,
        scored.old_logprobs,
        scored.ref_logprobs,
        advantages,
        scores,
        rewards=rewards,
        old_values=scored.old_values,
        returns=returns,
    )


def grpo_experience(scored: Scored, recipe: GRPORecipe) -> Experience:
    """One advantage per answer, normalised in its group, on every token of the answer. [arXiv:2402.03300]"""
    scores = process_scores(scored, recipe)
    groups = scores.view(-1, recipe.train.answers)  # (N, G): the answers of a prompt are neighbours
    advantages = bind(ADVANTAGES, recipe.advantage)(groups).reshape(-1, 1)  # (B, 1)
    per_token = torch.where(scored.response_mask, advantages, 0.0).to(scored.old_logprobs.dtype)
    return Experience(
        scored.ids,
        scored.attention,
        scored.response_mask,
        scored.old_logprobs,
        scored.ref_logprobs,
        per_token,
        scores,
    )


def process_scores(scored: Scored, recipe: PPORecipe | GRPORecipe) -> Tensor:
    """Clipped scores with the missing-EOS penalty, (B,); NaN stays NaN."""
    return reward_math.process_scores(
        scored.scores,
        scored.finished,
        clip=recipe.scores.clip,
        missing_eos_penalty=recipe.scores.missing_eos_penalty,
    )
