"""From scored answers to an experience: scores -> rewards -> advantages, each by the function that the recipe names.

Everything here sees the whole rollout, all ranks' rows, so whitening and groups are global by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.algo import rewards as reward_math
from rlhf.algo.advantages import ADVANTAGES
from rlhf.algo.kl import KL_ESTIMATORS
from rlhf.algo.masked import Moments, moments, row_sums, select, whiten, whiten_keeping_mean
from rlhf.batch import Experience, Rows
from rlhf.recipe.policy_options import Estimator
from rlhf.recipe.stages import OnlineRecipe
from rlhf.train.objectives import bind
from rlhf.train.state import OnlineState


@dataclass(frozen=True)
class Answers(Rows):
    """Sampled and scored answers. Unscored ones have a NaN score."""

    ids: Tensor  # (B, T)
    attention: Tensor  # (B, T)
    response_mask: Tensor  # (B, R)
    sample_logprobs: Tensor  # (B, R)
    finished: Tensor  # (B,)
    scores: Tensor  # (B,)
    parts: Tensor  # (B, K) scores of single rewards, in the order of their names
    steps: Tensor | None = None  # (B, R) scores of steps at the tokens that end them, NaN elsewhere
    records: Tensor | None = None  # (B,) numbers of the prompts' records in the data

    def lengths(self) -> Tensor:
        """Answer tokens, (B,)."""
        return self.response_mask.sum(-1)

    def numbers(self) -> list[int]:
        """Numbers of the prompts' records, where they are known."""
        return [] if self.records is None else self.records.tolist()


@dataclass(frozen=True)
class Seen(Rows):
    """What the models say of the answers' tokens: the trained policy, the reference, and the critic if there is one."""

    old_logprobs: Tensor | None  # (B, R), None where the update finds them itself
    ref_logprobs: Tensor  # (B, R)
    old_values: Tensor | None = None  # (B, R)


def to_experience(
    answers: Answers, seen: Seen, recipe: OnlineRecipe, state: OnlineState, greedy: Answers | None = None
) -> Experience:
    """Rewards and advantages of a whole rollout. `state` gives the KL coefficient; its running statistics move.

    greedy: one answer per prompt, without chance, for the estimators that compare with it.
    """
    mask = answers.response_mask & ~answers.scores.isnan()[:, None]  # an unscored answer is left out, never scored 0
    if recipe.scores.normalise == "running":
        running = state.add_scores(moments(answers.scores, ~answers.scores.isnan()))
        answers, greedy = (a and normalised(a, running) for a in (answers, greedy))
    scores = process_scores(answers, recipe)
    coef = state.kl_coef if recipe.kl.placement == "reward" else 0.0
    kl = torch.zeros_like(seen.ref_logprobs)
    if seen.old_logprobs is not None:
        kl = KL_ESTIMATORS[recipe.kl.estimator].function(seen.old_logprobs, seen.ref_logprobs)
    rewards = reward_math.shape_rewards(scores, kl, mask, kl_coef=coef)
    if recipe.whiten_rewards:
        rewards = whiten_keeping_mean(rewards, mask, moments(rewards, mask), unbiased=True)
    penalties = -coef * select(kl, mask)
    groups = (-1, recipe.train.answers)  # the answers of a prompt are neighbours
    signals = {
        "rewards": rewards,
        "mask": mask,
        "scores": scores,
        "penalties": penalties,
        "group_returns": (scores + row_sums(penalties, mask)).view(groups),
        "baseline": torch.tensor(state.baseline, dtype=torch.float64),
    }
    if seen.old_values is not None:
        signals["values"] = seen.old_values
    if greedy is not None:
        signals["greedy_scores"] = process_scores(greedy, recipe).repeat_interleave(recipe.train.answers)
    if answers.steps is not None:
        signals["step_scores"] = answers.steps.view(*groups, answers.steps.shape[-1])
    advantages, returns = estimate(recipe.advantage, signals, state)
    advantages = select(advantages.to(seen.ref_logprobs.dtype), mask)
    learned = mask & answers.finished[:, None] if recipe.scores.drop_unfinished else mask
    if recipe.whiten_advantages:
        advantages = whiten(advantages, learned, moments(advantages, learned), unbiased=True)
    return Experience(
        answers.ids,
        answers.attention,
        learned,
        seen.old_logprobs,
        seen.ref_logprobs,
        advantages,
        scores,
        sample_logprobs=answers.sample_logprobs if seen.old_logprobs is None else None,
        rewards=rewards,
        old_values=seen.old_values,
        returns=returns,
    )


def is_flat(scores: Tensor) -> Tensor:
    """(N, G) -> (N,): groups whose scored answers all score the same; there is nothing to learn from them."""
    low = scores.nan_to_num(torch.inf).amin(-1)
    high = scores.nan_to_num(-torch.inf).amax(-1)
    return ~(high > low)


def estimate(block: Estimator, signals: dict[str, Tensor], state: OnlineState) -> tuple[Tensor, Tensor | None]:
    """Advantages that can be broadcast to (B, R), and the critic's targets where the estimator has any."""
    inputs = ADVANTAGES[block.name].inputs  # type: ignore[attr-defined]
    result = bind(ADVANTAGES, block)(*(signals[name] for name in inputs))
    if "values" in inputs:
        return result
    if "baseline" in inputs:
        result, baseline = result
        state.baseline = float(baseline)
    return result.reshape(len(signals["mask"]), -1), None


def normalised(answers: Answers, running: Moments) -> Answers:
    """The answers with scores less the running mean, over the running deviation."""
    values = {name: getattr(answers, name) for name in Answers.__dataclass_fields__}
    return Answers(**{**values, "scores": reward_math.normalise_running(answers.scores, running)})


def process_scores(answers: Answers, recipe: OnlineRecipe) -> Tensor:
    """Scores after everything that `scores` of the recipe does to them, (B,); NaN stays NaN."""
    options = recipe.scores.model_dump(exclude={"normalise", "drop_unfinished"})
    return reward_math.process_scores(
        answers.scores, answers.finished, answers.lengths(), recipe.sampling.max_new_tokens, **options
    )
