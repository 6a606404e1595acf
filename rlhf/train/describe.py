"""What a rollout looked like, in numbers. Every name is explained in docs/metrics.md."""

from __future__ import annotations

import math

from torch import Tensor

from rlhf.algo.masked import masked_sum
from rlhf.algo.value import explained_variance, value_moments
from rlhf.batch import Experience
from rlhf.recipe.stages import OnlineRecipe
from rlhf.train.alarms import repeated_share
from rlhf.train.experience import Answers, Seen, is_flat
from rlhf.train.objectives import distances


def describe(
    answers: Answers, seen: Seen, experience: Experience, recipe: OnlineRecipe, part_names: list[str]
) -> dict[str, float]:
    """Metrics of a whole rollout, the same on every rank; some may be undefined (NaN)."""
    metrics = {**of_answers(answers, recipe), **of_tokens(answers, seen, experience)}
    metrics["reward/processed_mean"] = experience.scores[~answers.scores.isnan()].double().mean()
    if experience.old_values is not None and experience.returns is not None:
        metrics |= of_critic(experience)
    for name, values in zip(part_names, answers.parts.unbind(1), strict=True):
        metrics[name] = values[~values.isnan()].mean()
        if name == "test/score_mean":
            metrics["test/score_std"] = deviation(values[~values.isnan()])
    return {name: float(value) for name, value in metrics.items()}


def of_answers(answers: Answers, recipe: OnlineRecipe) -> dict[str, Tensor | float]:
    """Scores, lengths and endings of answers."""
    scored = ~answers.scores.isnan()
    scores, lengths = answers.scores[scored].double(), answers.lengths()
    metrics = {
        "reward/score_mean": scores.mean(),
        "reward/score_std": deviation(scores),
        "reward/unscored": (~scored).sum(),
        "rollout/length_mean": lengths.double().mean(),
        "rollout/finished": answers.finished.double().mean(),
        "rollout/repeated": repeated_share(answers.ids[:, -answers.response_mask.shape[1] :], answers.response_mask),
    }
    if recipe.train.answers > 1:
        metrics["reward/flat_groups"] = is_flat(answers.scores.view(-1, recipe.train.answers)).double().mean()
    return metrics


def deviation(values: Tensor) -> Tensor | float:
    """With Bessel's correction; NaN of fewer than two."""
    return values.std() if len(values) > 1 else math.nan


def of_tokens(answers: Answers, seen: Seen, experience: Experience) -> dict[str, Tensor]:
    """Distances between the policy that sampled, the trained one and the reference."""
    mask = answers.response_mask & ~answers.scores.isnan()[:, None]
    counts = {"tokens": mask.sum().clamp(min=1), "sequences": mask.any(-1).sum().clamp(min=1)}
    learned = experience.response_mask
    size = masked_sum(experience.advantages.abs(), learned) / learned.sum().clamp(min=1)
    metrics = {"rollout/advantage_abs": size}
    if seen.old_logprobs is not None:  # else the update finds them
        sums = distances(seen.old_logprobs, seen.ref_logprobs, answers.sample_logprobs, mask)
        metrics |= {name: total / counts[unit] for name, (total, unit) in sums.items()}
    return metrics


def of_critic(experience: Experience) -> dict[str, Tensor]:
    """What the critic expected, and how well."""
    assert experience.old_values is not None and experience.returns is not None
    mask = experience.response_mask
    tokens = mask.sum().clamp(min=1)
    return {
        "value/explained_variance": explained_variance(*value_moments(experience.old_values, experience.returns, mask)),
        "value/mean": masked_sum(experience.old_values, mask) / tokens,
        "value/return_mean": masked_sum(experience.returns, mask) / tokens,
    }
