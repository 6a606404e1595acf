"""Feeding the loop from the policy itself: sample answers, score them, turn them into an experience (PPO, GRPO).

The steps follow the life of a batch: prompts -> rollout -> scores -> log-probs and values -> rewards -> advantages ->
minibatches. Rollouts are made by every rank for its own prompts; the results are then shared, so that group statistics,
whitening and minibatches are the same whatever the number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.kl import k1
from rlhf.algo.masked import masked_sum
from rlhf.algo.value import explained_variance, value_moments
from rlhf.batch import Experience, Rollout
from rlhf.data import collate, order
from rlhf.data.examples import PromptExample
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.models import sample
from rlhf.recipe.stages import OnlineRecipe
from rlhf.rewards.scorer import Scorer
from rlhf.train.advantages import Scored
from rlhf.train.guards import check_same_weights, check_scored
from rlhf.train.loop import Collected
from rlhf.train.roles import Reference
from rlhf.train.seeding import derive, permutation


@dataclass(frozen=True)
class Sampler:
    """How this stage turns prompts into answers; shared with the sample generations of every stage."""

    stop_ids: list[int]
    pad_id: int
    decode: Callable[[list[int]], str]


@dataclass(frozen=True)
class OnlineCollector:
    """Rollouts of the current policy. `to_experience` is where algorithms differ."""

    recipe: OnlineRecipe
    prompts: list[PromptExample]
    sampler: Sampler
    actor: Engine
    reference: Reference
    scorer: Scorer
    critic: Engine | None
    to_experience: Callable[[Scored, Any], Experience]
    starts_at_reference: bool

    def collect(self, step: int) -> Collected:
        """Sample, score, and cut into minibatches; this rank's share of each."""
        started = time.monotonic()
        rollout = self.sample(step)
        sampled = time.monotonic() - started
        with torch.no_grad():
            scores = self.scorer(rollout)
            scored = self.gather(self.look_back(rollout, scores.total))
            check_scored(int(scored.response_mask.any(-1).sum()), len(scored), step)
            experience = self.to_experience(scored, self.recipe)
        metrics = self.describe(scored, experience, scores.parts)
        tokens = int(scored.attention.sum())
        metrics["speed/rollout_seconds"] = sampled
        metrics["speed/rollout_tokens_per_second"] = float(scored.response_mask.sum()) / sampled
        if step == 0 and self.starts_at_reference:
            check_same_weights(metrics["rollout/ref_gap"], self.recipe.model.dtype, "policy and reference at the start")
        return Collected(self.minibatches(step, experience), metrics, tokens)

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        """Before the first update on fresh samples the probability ratio is 1."""
        check_same_weights(metrics["logprob_change"], self.recipe.model.dtype, f"fresh samples of step {step + 1}")

    def sample(self, step: int) -> Rollout:
        """This rank's answers. Seeds depend on the prompt's place in the global batch, not on the rank."""
        train = self.recipe.train
        rows = order.rows(len(self.prompts), train.prompts, step, train.seed)
        places = order.share(list(range(train.prompts)), dist.rank(), dist.world_size())
        chunk = max(1, train.rollout_batch // train.answers)
        parts = []
        with self.actor.gathered() as policy:
            for i in range(0, len(places), chunk):
                part = places[i : i + chunk]
                seeds = [derive(train.seed, "sample", step, place, g) for place in part for g in range(train.answers)]
                parts.append(
                    generate(policy, [self.prompts[rows[p]] for p in part], seeds, self.recipe.sampling, self.sampler)
                )
        return join_rollouts(parts, self.sampler.pad_id)

    def look_back(self, rollout: Rollout, scores: Tensor) -> Scored:
        """Log-probs of the trained policy and the reference, and the critic's values, on this rank's rollout."""
        responses = rollout.response_mask.shape[1]
        start = rollout.ids.shape[1] - responses
        old, ref, values = [], [], []
        micro_batches = list(rollout.split(self.recipe.train.micro_batch))
        with self.actor.evaluating():
            for micro in micro_batches:
                inputs = micro.to(self.actor.device)
                options = {"start": start, "sampling": self.recipe.sampling}
                old.append(self.actor(inputs.ids, inputs.attention, **options).cpu())
                ref.append(self.reference(inputs.ids, inputs.attention, **options).cpu())
        if self.critic is not None:
            with self.critic.evaluating():
                for micro in micro_batches:
                    inputs = micro.to(self.critic.device)
                    values.append(self.critic(inputs.ids, inputs.attention, start=start).cpu())
        is_scored = ~scores.isnan()
        return Scored(
            rollout.ids,
            rollout.attention,
            rollout.response_mask & is_scored[:, None],  # an unscored answer is left out, never scored 0
            rollout.sample_logprobs,
            torch.cat(old),
            torch.cat(ref),
            rollout.finished,
            scores,
            torch.cat(values) if values else None,
        )

    def gather(self, mine: Scored) -> Scored:
        """Everybody's rows, in the order of the global batch, padded to common widths."""
        responses = mine.response_mask.shape[1]
        prompts = mine.ids.shape[1] - responses
        wide_p, wide_r = dist.max_over_ranks(prompts), dist.max_over_ranks(responses)

        def widen(value: Tensor) -> Tensor:
            if value.dim() == 2:
                left = wide_p - prompts if value.shape[1] > responses else 0
                fill = self.sampler.pad_id if value is mine.ids else 0
                value = torch.nn.functional.pad(value, (left, wide_r - responses), value=fill)
            return dist.gather_rows(value)

        return mine.map(widen)

    def minibatches(self, step: int, experience: Experience) -> list[Experience]:
        """Seeded permutations cut into equal minibatches; of each, the rows dealt to this rank."""
        train = self.recipe.train
        size = len(experience) // train.minibatches
        lengths = experience.attention.sum(-1).tolist()
        shares = []
        for epoch in range(train.inner_epochs):
            shuffled = permutation(len(experience), derive(train.seed, "minibatch", step, epoch))
            for start in range(0, len(shuffled), size):
                rows = sorted(shuffled[start : start + size], key=lambda row: -lengths[row])
                shares.append(experience.select(rows[dist.rank() :: dist.world_size()]))
        return shares

    def describe(self, scored: Scored, experience: Experience, parts: dict[str, Tensor]) -> dict[str, float]:
        """What the rollout looked like, over all ranks."""
        mask = scored.response_mask
        tokens = mask.sum()
        num_scored = mask.any(-1).sum().clamp(min=1)
        scores = scored.scores[~scored.scores.isnan()]
        kl = k1(scored.old_logprobs, scored.ref_logprobs)
        metrics = {
            "reward/score_mean": scores.mean(),
            "reward/score_std": scores.std(),
            "reward/unscored": scored.scores.isnan().sum(),
            "rollout/length_mean": tokens / num_scored,
            "rollout/finished": scored.finished.double().mean(),
            "rollout/kl_ref": masked_sum(kl, mask) / num_scored,
            "rollout/ref_gap": masked_sum(kl.abs(), mask) / tokens,
            "rollout/sampler_gap": masked_sum((scored.old_logprobs - scored.sample_logprobs).abs(), mask) / tokens,
            "rollout/advantage_abs": masked_sum(experience.advantages.abs(), mask) / tokens,
        }
        if experience.old_values is not None and experience.returns is not None:
            metrics["value/explained_variance"] = explained_variance(
                *value_moments(experience.old_values, experience.returns, mask)
            )
            metrics["value/mean"] = masked_sum(experience.old_values, mask) / tokens
            metrics["value/return_mean"] = masked_sum(experience.returns, mask) / tokens
        if self.recipe.train.answers > 1:
            spread = scored.scores.view(-1, self.recipe.train.answers).std(-1)
            metrics["reward/flat_groups"] = (spread == 0).double().mean()
        for name, values in parts.items():
            values = dist.gather_rows(values)
            metrics[f"reward/{name}"] = values[~values.isnan()].mean()
        return {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}


def generate(policy: Any, prompts: list[PromptExample], seeds: list[int], sampling: Any, sampler: Sampler) -> Rollout:
    """Answers to prompts, len(seeds) / len(prompts) each."""
    batch = collate.prompts(prompts, sampler.pad_id)
    return sample.generate(
        policy,
        batch,
        answers=len(seeds) // len(prompts),
        sampling=sampling,
        stop_ids=sampler.stop_ids,
        pad_id=sampler.pad_id,
        seeds=seeds,
        decode=sampler.decode,
    )


def join_rollouts(parts: list[Rollout], pad_id: int) -> Rollout:
    """Rollouts of several chunks as one, padded to common prompt and response widths."""
    wide_r = max(part.response_mask.shape[1] for part in parts)
    wide_p = max(part.ids.shape[1] - part.response_mask.shape[1] for part in parts)
    widened = []
    for part in parts:
        responses = part.response_mask.shape[1]
        left, right = wide_p - (part.ids.shape[1] - responses), wide_r - responses
        pad = torch.nn.functional.pad
        widened.append(
            Rollout(
                pad(part.ids, (left, right), value=pad_id),
                pad(part.attention, (left, right)),
                pad(part.response_mask, (0, right)),
                pad(part.sample_logprobs, (0, right)),
                part.finished,
                part.texts,
                part.rows,
            )
        )
    tensors = [
        torch.cat([getattr(part, name) for part in widened])
        for name in ("ids", "attention", "response_mask", "sample_logprobs", "finished")
    ]
    return Rollout(*tensors, [t for part in widened for t in part.texts], [r for part in widened for r in part.rows])
