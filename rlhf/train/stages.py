"""The table of stages: for each, how a batch is collected, which objectives are minimised, and what is published."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerFast

from rlhf.data import chat, collate
from rlhf.data.examples import Loaded
from rlhf.data.origin import origins
from rlhf.engine.ema import Ema
from rlhf.engine.engine import Engine
from rlhf.recipe.stages import GRPORecipe, LearningRecipe, OnlineRecipe, PPORecipe, RewardRecipe, SFTRecipe
from rlhf.train import judged, roles, scorers
from rlhf.train.checkpoints import Checkpoints
from rlhf.train.job import Job, data_kind
from rlhf.train.loop import Stage
from rlhf.train.objectives import (
    Objective,
    PolicyObjective,
    PretrainingObjective,
    RewardObjective,
    SFTObjective,
    ValueObjective,
)
from rlhf.train.online import OnlineCollector
from rlhf.train.opponent import Opponent
from rlhf.train.parts import Parts, dataset, generation_config, sampler, steps
from rlhf.train.pool import Budget
from rlhf.train.progress import Progress
from rlhf.train.ranking import ListRewardObjective
from rlhf.train.samples import SampleWriter, shown_prompts
from rlhf.train.shared import SharedRoles, shared_roles
from rlhf.train.skips import Skips
from rlhf.train.state import OnlineState
from rlhf.train.statistics import score_statistics
from rlhf.train.supervised import SupervisedCollector, evaluate


def assemble(job: Job, tokenizer: PreTrainedTokenizerFast, data: Loaded) -> Parts:
    """Build the stage's models and everything that is fed to them."""
    parts = ASSEMBLE[job.stage](job, tokenizer, data)
    parts.standing.watched = job.recipe.checkpoint.keep_best
    parts.skips = skips(job)
    parts.stop_ids = chat.stop_token_ids(tokenizer, generation_config(next(iter(parts.engines.values()))))
    return parts


def skips(job: Job) -> Skips:
    """Counts the updates that are left out; their rows are looked up in the data when there are any."""
    recipe = job.recipe
    assert isinstance(recipe, LearningRecipe)

    def locate(group: str, numbers: set[int]) -> dict[int, str]:
        if group == PretrainingObjective.group:
            assert isinstance(recipe, OnlineRecipe) and recipe.pretraining is not None
            return origins(recipe.pretraining.data, "tokens", numbers)
        return origins(recipe.data, data_kind(recipe), numbers)

    return Skips(recipe.train.max_skipped, job.folder.skipped, locate)


def sft(job: Job, tokenizer: PreTrainedTokenizerFast, data: Loaded) -> Parts:
    """Completion-only fine-tuning."""
    recipe = job.recipe
    assert isinstance(recipe, SFTRecipe)
    budget = Budget.of(recipe)
    engine = roles.policy_engine(job, tokenizer)
    if recipe.train.l1:
        engine.pull_to_start(recipe.train.l1)
    train, held_out = (dataset(rows, collate.tokens, tokenizer.pad_token_id) for rows in (data.train, data.eval))
    return Parts(
        engines={"policy": engine},
        objectives=[SFTObjective(engine, recipe.train)],
        collector=SupervisedCollector(train, recipe.train.batch_size, recipe.train.seed, lambda step, metrics: None),
        steps=steps(recipe, train),
        budget=budget,
        key_metric="eval/loss" if len(held_out) else "train/loss",
        published={"model": (engine, "policy")},
        held_out=held_out,
        prompts=shown_prompts(recipe.log, data, tokenizer),
        sampling=recipe.sampling,
    )


def rm(job: Job, tokenizer: PreTrainedTokenizerFast, data: Loaded) -> Parts:
    """Reward model on pairs or lists."""
    recipe = job.recipe
    assert isinstance(recipe, RewardRecipe)
    budget = Budget.of(recipe)
    engine = roles.reward_engine(job, tokenizer)
    is_list = recipe.loss.rows == "lists"
    join, objective = (collate.lists, ListRewardObjective) if is_list else (collate.pairs, RewardObjective)
    train, held_out = (dataset(rows, join, tokenizer.pad_token_id) for rows in (data.train, data.eval))
    return Parts(
        engines={"reward": engine},
        objectives=[objective.from_block(engine, recipe.train, recipe.loss)],
        collector=SupervisedCollector(train, recipe.train.batch_size, recipe.train.seed, lambda step, metrics: None),
        steps=steps(recipe, train),
        budget=budget,
        key_metric="eval/accuracy" if len(held_out) else "train/accuracy",
        published={"model": (engine, "reward")},
        held_out=held_out,
        statistics=lambda: score_statistics(engine, train, held_out, budget, recipe.train.seed),
    )


def ppo(job: Job, tokenizer: PreTrainedTokenizerFast, data: Loaded) -> Parts:
    """Actor and critic."""
    recipe = job.recipe
    assert isinstance(recipe, PPORecipe)
    shared = shared_roles(job, tokenizer) if recipe.share_base else None
    actor = shared.actor if shared else roles.policy_engine(job, tokenizer)
    critic = shared.critic if shared else roles.critic_engine(job, tokenizer)
    assert critic is not None
    parts = _online(job, tokenizer, data, actor, critic, shared)
    parts.objectives.append(ValueObjective.from_block(critic, recipe.critic, recipe.value_loss))
    parts.published["critic"] = (critic, "value")
    parts.policy_starts = recipe.critic.warmup_rollouts
    return parts


def grpo(job: Job, tokenizer: PreTrainedTokenizerFast, data: Loaded) -> Parts:
    """No critic: answers are compared with each other or with a baseline."""
    assert isinstance(job.recipe, OnlineRecipe)
    shared = shared_roles(job, tokenizer) if job.recipe.share_base else None
    actor = shared.actor if shared else roles.policy_engine(job, tokenizer)
    return _online(job, tokenizer, data, actor, None, shared)


ASSEMBLE: dict[str, Callable[[Job, PreTrainedTokenizerFast, Loaded], Parts]] = {
    "sft": sft,
    "rm": rm,
    "ppo": ppo,
    "grpo": grpo,
    "dpo": judged.dpo,
}


def _online(
    job: Job,
    tokenizer: PreTrainedTokenizerFast,
    data: Loaded,
    actor: Engine,
    critic: Engine | None,
    shared: SharedRoles | None,
) -> Parts:
    recipe = job.recipe
    assert isinstance(recipe, OnlineRecipe)
    budget = Budget.of(recipe)
    scorer = scorers.scorer(job, tokenizer, recipe.rewards, key="rewards", shared=shared, budget=budget)
    tests = recipe.test_rewards
    state = OnlineState.at_start(recipe)
    reference = shared.reference if shared else roles.reference(job, tokenizer, actor)
    against = recipe.opponent if isinstance(recipe, GRPORecipe) else None
    kept = None if data.pretraining is None else data.pretraining.train
    mixed = None if kept is None else dataset(kept, collate.tokens, tokenizer.pad_token_id)
    collector = OnlineCollector(
        recipe,
        data.train,
        sampler(actor, tokenizer, recipe.sampling, job.stop.check),
        actor,
        reference,
        scorer,
        scorers.scorer(job, tokenizer, tests, key="test_rewards", shared=None, budget=budget) if tests else None,
        critic,
        mixed,
        state,
        roles.is_same_start(job),
        budget,
        None if against is None else Opponent(actor, reference, against.mixture),
        job.stop,
    )
    objectives: list[Objective] = [PolicyObjective.from_recipe(actor, recipe, state)]
    if recipe.pretraining is not None:
        objectives.append(PretrainingObjective(actor, recipe.train, recipe.pretraining.coef))
    averages = {} if recipe.ema is None else {"ema": Ema(actor, recipe.ema.decay)}
    return Parts(
        engines={"policy": actor, **({"critic": critic} if critic else {})},
        objectives=objectives,
        collector=collector,
        steps=recipe.train.rollouts,
        budget=budget,
        updates_per_step=recipe.train.inner_epochs * recipe.train.minibatches,
        key_metric="reward/score_mean",
        published={"model": (actor, "policy"), **{name: (actor, "policy") for name in averages}},
        prompts=shown_prompts(recipe.log, data, tokenizer),
        sampling=recipe.sampling,
        scorer=scorer,
        state=state,
        averages=averages,
        target_kl=recipe.train.target_kl,
        measures_move=state.penalty_beta is not None,
    )


def to_stage(
    job: Job,
    parts: Parts,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
    checkpoints: Checkpoints,
    report: Callable[[int, str, float | None], None],
) -> Stage:
    """The stage as the loop sees it."""
    recipe = job.recipe
    every = 0 if isinstance(recipe, OnlineRecipe) else recipe.eval.every  # type: ignore[attr-defined]
    held_out = parts.held_out

    def is_eval_step(done: int) -> bool:
        due = done == parts.steps or bool(every and done % every == 0)
        return due and held_out is not None and len(held_out) > 0

    def evaluate_now(done: int) -> dict[str, float]:
        assert held_out is not None
        found = evaluate(parts.objectives[0], held_out, parts.budget, job.stop)
        return found | (parts.completed(found) if parts.completed is not None else {})

    def is_sample_step(done: int) -> bool:
        return done == parts.steps or bool(recipe.log.samples_every and done % recipe.log.samples_every == 0)

    return Stage(
        steps=parts.steps,
        updates_per_step=parts.updates_per_step,
        budget=parts.budget,
        collector=parts.collector,
        objectives=parts.objectives,
        seed=job.seed,
        key_metric=parts.key_metric,
        log_every=recipe.log.every,
        checkpoint_every=recipe.checkpoint.every,
        evaluate=evaluate_now,
        is_eval_step=is_eval_step,
        sample=_sample_writer(job, parts, tokenizer, progress),
        is_sample_step=is_sample_step,
        checkpoint=checkpoints.save,
        settle=checkpoints.settle,
        report=report,
        skips=parts.skips,
        policy_starts=parts.policy_starts,
        target_kl=parts.target_kl,
        measures_move=parts.measures_move,
        averages=list(parts.averages.values()),
        checkpoint_minutes=recipe.checkpoint.minutes,
        standing=parts.standing,
    )


def _sample_writer(
    job: Job, parts: Parts, tokenizer: PreTrainedTokenizerFast, progress: Progress
) -> Callable[[int], None]:
    if parts.sampling is None or not parts.prompts:
        return lambda step: None
    engine = parts.engines["policy"]
    return SampleWriter(
        engine,
        parts.prompts,
        parts.sampling,
        sampler(engine, tokenizer, parts.sampling, job.stop.check),
        parts.scorer,
        job.recipe.train.seed,
        job.recipe.log,
        job.folder,
        progress,
    )
