"""Feeding the loop from the policy itself: sample answers, score them, turn them into an experience (PPO, GRPO).

The steps follow the life of a batch: prompts -> rollout -> scores -> log-probs and values -> rewards -> advantages ->
minibatches. Rollouts are made by every rank for its own prompts; the results are then shared, so that group statistics,
whitening and minibatches are the same whatever the number of ranks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rlhf.algo.controllers import KL_CONTROLLERS, ppo_penalty_beta
from rlhf.algo.rewards import preference_scores
from rlhf.batch import Experience, Rollout
from rlhf.data import order
from rlhf.data.examples import PromptExample
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import UserError
from rlhf.recipe.policy_options import PpoPenaltyLoss
from rlhf.recipe.schema import SamplingBlock
from rlhf.recipe.stages import OnlineRecipe
from rlhf.rewards.scorer import Scorer
from rlhf.train import memory
from rlhf.train.alarms import stop_error
from rlhf.train.describe import describe
from rlhf.train.experience import Answers, Seen, is_flat, to_experience
from rlhf.train.guards import (
    check_finite,
    check_ids,
    check_no_dropout,
    check_same_weights,
    check_sampler,
    check_scored,
)
from rlhf.train.loop import Collected
from rlhf.train.objectives import PretrainingObjective, bind, padding_columns
from rlhf.train.opponent import Opponent
from rlhf.train.overoptimisation import Scale
from rlhf.train.pool import Budget, Pool, at_places, sampled_pool
from rlhf.train.roles import Reference
from rlhf.train.rollout import Sampler, generate
from rlhf.train.seeding import derive, permutation
from rlhf.train.signals import StopRequest
from rlhf.train.standing import leave_together
from rlhf.train.state import OnlineState
from rlhf.train.supervised import Dataset

logger = logging.getLogger("rlhf.train")
Whose = Literal["policy", "greedy", "opponent"]  # answers: the policy's, its likeliest, or those of its opponent


@dataclass(frozen=True)
class OnlineCollector:
    """Rollouts of the current policy."""

    recipe: OnlineRecipe
    prompts: list[PromptExample]
    sampler: Sampler
    actor: Engine
    reference: Reference
    scorer: Scorer
    test_scorer: Scorer | None
    critic: Engine | None
    pretraining: Dataset | None
    state: OnlineState
    starts_at_reference: bool
    budget: Budget
    opponent: Opponent | None = None
    stop: StopRequest = field(default_factory=StopRequest)

    def collect(self, step: int) -> Collected:
        """Sample, score, and cut into minibatches."""
        started = time.monotonic()
        with memory.phase("sampling and scoring", "train.rollout_batch, or train.micro_tokens"):
            answers, refills = self.answers(step)
            greedy = self.draw(step, 0, "greedy") if self.recipe.advantage.needs_greedy else None
        sampled = time.monotonic() - started
        check_scored(int((~answers.scores.isnan()).sum()), len(answers), step)
        with memory.phase("log-probs and values of the rollout", "train.micro_tokens"), torch.no_grad():
            seen = self.look_back(answers)
        with self.state.undone_on_error():
            experience = to_experience(answers, seen, self.recipe, self.state, greedy)
            metrics = describe(answers, seen, experience, self.recipe, self.part_names()) | refills
            self.check(step, answers, experience, metrics)
        metrics |= self.gap(metrics)
        metrics["speed/rollout_seconds"] = sampled
        metrics["speed/rollout_tokens_per_second"] = float(answers.response_mask.sum()) / sampled
        if greedy is not None:
            metrics["rollout/greedy_score"] = float(greedy.scores.nanmean())
        minibatches = self.minibatches(step, experience, answers.numbers())
        planned = self.recipe.train.inner_epochs * self.recipe.train.minibatches
        metrics["rollout/empty_minibatches"] = float(planned - len(minibatches))
        numbers = {name: value for name, value in metrics.items() if math.isfinite(value)}
        return Collected(minibatches, numbers, int(answers.attention.sum()))

    def check(self, step: int, answers: Answers, experience: Experience, metrics: dict[str, float]) -> None:
        """What a fresh rollout must be before anything is learned from it."""
        check_ids(answers.ids, self.actor.module.core.config.get_text_config().vocab_size, step)
        check_finite(experience, step, answers.numbers())
        if experience.old_logprobs is not None:
            self.check_distances(step, metrics)
        for engine in (self.actor, *([] if self.critic is None else [self.critic])):
            check_no_dropout(engine.module, "policy" if engine is self.actor else "critic")

    def check_distances(self, step: int, metrics: dict[str, float]) -> None:
        """The policy is the one that sampled, and at the start its reference."""
        dtype = self.recipe.model.dtype
        narrowest = "bf16" if "bf16" in (dtype, self.recipe.sampling.decode_dtype) else "fp32"
        check_sampler(metrics["rollout/sampler_gap"], narrowest, step)
        if step == 0 and self.starts_at_reference:
            check_same_weights(metrics["rollout/ref_gap"], dtype, "policy and reference at the start")

    def gap(self, metrics: dict[str, float]) -> dict[str, float]:
        """How much more the train score has gained than the test score, where there is one."""
        names = [f"{group}/score_{what}" for group in ("reward", "test") for what in ("mean", "std")]
        if self.test_scorer is None:
            return {}
        numbers = [metrics[name] for name in names]
        return self.state.gap.look(Scale(*numbers[:2]), Scale(*numbers[2:]))

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        """Before the first update on fresh samples the probability ratio is 1. Its pass may be the first on them."""
        if "rollout/sampler_gap" in metrics:
            self.check_distances(step, metrics)
        check_same_weights(metrics["logprob_change"], self.recipe.model.dtype, f"fresh samples of step {step + 1}")

    def learned(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
        """Controllers move their coefficients; alarms look at the step."""
        recipe, state = self.recipe, self.state
        further = {"kl/coef": state.kl_coef}
        if "policy/kl_moved" not in metrics:  # the critic learned alone: the policy stands where it stood
            return further, self.watch(step, metrics, further)
        episodes = recipe.train.prompts * recipe.train.answers
        control = bind(KL_CONTROLLERS, recipe.kl.controller)
        state.kl_coef = control(state.kl_coef, metrics["rollout/kl_ref"], episodes)
        loss = recipe.policy_loss
        if isinstance(loss, PpoPenaltyLoss) and state.penalty_beta is not None:
            further["policy/penalty_beta"] = state.penalty_beta
            moved = metrics["policy/kl_moved"]
            state.penalty_beta = ppo_penalty_beta(state.penalty_beta, moved, episodes, target=loss.target)
        return further, self.watch(step, metrics, further)

    def watch(self, step: int, metrics: dict[str, float], further: dict[str, float]) -> UserError | None:
        """Let the alarms look at a step; they are said here, marked in `further`, and may end the run."""
        alarms = self.state.alarms
        raised = alarms.look(metrics)
        further |= alarms.marks()
        for alarm in raised if dist.is_main() else ():
            logger.warning("%s", alarm.text)
        return stop_error(raised, step + 1) if any(alarm.stops for alarm in raised) else None

    # --- sampling ---

    def answers(self, step: int) -> tuple[Answers, dict[str, float]]:
        """The rollout of a step, over all ranks. With refills, groups of equal scores give way to others.

        [dynamic sampling, arXiv:2503.14476 sec. 3.2] Where the rounds run out, equal groups fill the batch.
        """
        train = self.recipe.train
        drawn = self.draw(step, 0)
        if not train.max_refills:
            return drawn, {}
        flat = is_flat(drawn.scores.view(-1, train.answers))
        share, rounds = float(flat.double().mean()), 0
        while int((~flat).sum()) < train.prompts and rounds < train.max_refills:
            rounds += 1
            drawn = join(drawn, self.draw(step, rounds), self.sampler.pad_id)
            flat = is_flat(drawn.scores.view(-1, train.answers))
        groups = torch.argsort(flat.int(), stable=True)[: train.prompts]  # in the order of their drawing
        rows = (groups[:, None] * train.answers + torch.arange(train.answers)).flatten().tolist()
        kept = float((~flat)[groups].sum())
        metrics = {"rollout/flat_drawn": share, "rollout/refills": float(rounds), "rollout/groups_kept": kept}
        return drawn.select(rows), metrics

    def draw(self, step: int, refill: int, whose: Whose = "policy") -> Answers:
        """One round of prompts with their scored answers, on every rank."""
        rollout = dist.agreed(lambda: self.sample(step, refill, whose))
        found = self.scorer(rollout)
        scores, steps, parts = found.total, found.steps, list(found.parts.values())
        if self.opponent is not None:
            against = self.scorer(dist.agreed(lambda: self.sample(step, refill, "opponent"))).total
            scores, steps = preference_scores(scores, against), None
            parts.append(against)
        if self.test_scorer is not None and whose == "policy":
            tested = self.test_scorer(rollout)
            parts += [tested.total, *tested.parts.values()]
        mine = Answers(
            rollout.ids,
            rollout.attention,
            rollout.response_mask,
            rollout.sample_logprobs,
            rollout.finished,
            scores,
            torch.stack(parts, 1),
            steps,
            torch.tensor([row["row"] for row in rollout.rows]),
        )
        return gathered(mine, self.sampler.pad_id)

    def part_names(self) -> list[str]:
        """Metric names of the columns of `Answers.parts`."""
        names = [f"reward/{name}" for name in self.scorer.names()]
        if self.opponent is not None:
            names.append("rollout/opponent_score")
        if self.test_scorer is not None:
            names += ["test/score_mean", *(f"test/{name}" for name in self.test_scorer.names())]
        return names

    def sample(self, step: int, refill: int, whose: Whose) -> Rollout:
        """This rank's answers. Seeds depend on the prompt's place in the global batch, not on the rank."""
        train, sampling = self.recipe.train, self.recipe.sampling
        if refill:
            number = step * train.max_refills + refill - 1
            rows = order.rows(len(self.prompts), train.prompts, number, derive(train.seed, "refill"))
        else:
            rows = order.rows(len(self.prompts), train.prompts, step, train.seed)
        if whose == "greedy":
            sampling = greedy_sampling(sampling)
        count = 1 if whose == "greedy" else train.answers
        places = order.share(list(range(train.prompts)), dist.rank(), dist.world_size())
        purpose = "opponent" if whose == "opponent" else "sample"
        source = self.opponent if whose == "opponent" else self.actor
        assert source is not None
        prompts = [self.prompts[rows[place]] for place in places]
        seeds = [
            derive(train.seed, purpose, step, place + refill * train.prompts, g)
            for place in places
            for g in range(count)
        ]
        with source.gathered() as policy:
            return generate(policy, prompts, seeds, sampling, self.sampler, train.rollout_batch)

    # --- looking back ---

    def look_back(self, answers: Answers) -> Seen:
        """Log-probs of the trained policy and the reference, and the critic's values, of a whole rollout.

        The policy's are left to the update where it is the only one on the rollout and nothing needs them before.
        """
        pool = sampled_pool(answers, list(range(len(answers))), self.recipe.train.answers)
        micros = list(pool.cut(self.budget))
        seen = []
        for micro in micros:
            leave_together(self.stop)
            seen.append(self.look_at(micro.rows))

        def whole(name: str) -> Tensor:
            return at_places(zip(micros, [getattr(part, name) for part in seen], strict=True), len(answers))

        return Seen(
            None if self.is_first_seen_in_update() else whole("old_logprobs"),
            whole("ref_logprobs"),
            whole("old_values") if self.critic is not None else None,
        )

    def is_first_seen_in_update(self) -> bool:
        """Whether the update's own pass says what the old log-probs are.

        It is the only update, its loss is over all scored tokens, and no reward needs a KL.
        """
        train = self.recipe.train
        is_only = train.inner_epochs == train.minibatches == 1 and self.critic is None
        return is_only and self.recipe.kl.placement == "loss" and not self.recipe.scores.drop_unfinished

    def look_at(self, micro: Answers) -> Seen:
        """What the models say of a micro-batch, as wide as the rollout."""
        responses = micro.response_mask.shape[1]
        left, right = padding_columns(micro.attention, responses)
        device = self.actor.device
        ids, attention = (value[:, left : value.shape[1] - right].to(device) for value in (micro.ids, micro.attention))
        mask = micro.response_mask[:, : responses - right].to(device)

        def widen(value: Tensor) -> Tensor:
            return torch.nn.functional.pad(value.cpu(), (0, right))

        with self.actor.evaluating():
            sampling = self.recipe.sampling
            ref = widen(self.reference(ids, attention, mask, sampling=sampling))
            is_later = self.is_first_seen_in_update()
            old = None if is_later else widen(self.actor(ids, attention, mask, sampling=sampling))
        if self.critic is None:
            return Seen(old, ref)
        with self.critic.evaluating():
            return Seen(old, ref, widen(self.critic(ids, attention, mask)))

    # --- minibatches ---

    def minibatches(self, step: int, experience: Experience, records: Sequence[int] = ()) -> list[Pool]:
        """Seeded permutations cut into equal minibatches, with their supervised rows where there are any.

        One without an answer to learn from (all unscored, or cut off and dropped) is left out on every rank.
        records: numbers of the prompts' records, where they are known.
        """
        train = self.recipe.train
        size = len(experience) // train.minibatches
        counts = experience.response_mask.any(-1)
        pools: list[Pool] = []
        number = step * train.inner_epochs * train.minibatches
        for epoch in range(train.inner_epochs):
            shuffled = permutation(len(experience), derive(train.seed, "minibatch", step, epoch))
            for start in range(0, len(shuffled), size):
                rows = shuffled[start : start + size]
                if counts[rows].any():
                    pool = sampled_pool(experience, rows, train.answers, records)
                    pools.append(replace(pool, further=self.supervised_rows(number, size)))
                number += 1
        return pools

    def supervised_rows(self, number: int, size: int) -> dict[str, Pool]:
        """As many supervised rows as the minibatch has answers, by the objective that learns from them."""
        if self.pretraining is None:
            return {}
        rows = order.rows(len(self.pretraining), size, number, derive(self.recipe.train.seed, "pretraining"))
        return {PretrainingObjective.group: self.pretraining.pool(rows)}


def gathered(mine: Answers, pad_id: int) -> Answers:
    """Everybody's rows, in the order of the global batch, padded to common widths."""
    responses = mine.response_mask.shape[1]
    prompts = mine.ids.shape[1] - responses
    wide = widened(mine, dist.max_over_ranks(prompts), dist.max_over_ranks(responses), pad_id)
    return wide.map(dist.gather_rows)


def join(first: Answers, second: Answers, pad_id: int) -> Answers:
    """The rows of both, padded to common widths."""
    responses = max(a.response_mask.shape[1] for a in (first, second))
    prompts = max(a.ids.shape[1] - a.response_mask.shape[1] for a in (first, second))
    both = [widened(a, prompts, responses, pad_id) for a in (first, second)]
    values = {name: [getattr(a, name) for a in both] for name in Answers.__dataclass_fields__}
    return Answers(**{name: None if pair[0] is None else torch.cat(pair) for name, pair in values.items()})


def widened(answers: Answers, prompts: int, responses: int, pad_id: int) -> Answers:
    """With more padding on both sides: `prompts` columns of prompt, `responses` of answer."""
    right = responses - answers.response_mask.shape[1]
    left = prompts - (answers.ids.shape[1] - answers.response_mask.shape[1])
    pad = torch.nn.functional.pad
    return replace(
        answers,
        ids=pad(answers.ids, (left, right), value=pad_id),
        attention=pad(answers.attention, (left, right)),
        response_mask=pad(answers.response_mask, (0, right)),
        sample_logprobs=pad(answers.sample_logprobs, (0, right)),
        steps=None if answers.steps is None else pad(answers.steps, (0, right), value=torch.nan),
    )


def greedy_sampling(sampling: SamplingBlock) -> SamplingBlock:
    """The same distribution's most likely tokens."""
    return sampling.model_copy(update={"top_k": 1, "top_p": 1.0})
