"""The models of a stage, each under its own engine: actor, critic, reference, reward."""

from __future__ import annotations

import logging
from dataclasses import replace

from transformers import PreTrainedTokenizerFast

from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.engine.zero import held_elements, sharded_loading
from rlhf.models.build import Setup, build_policy, build_scorer, has_score_head
from rlhf.models.forward import PolicyModule, RoleModule, ScorerModule
from rlhf.recipe.reward_options import ModelReward
from rlhf.recipe.schema import InitBlock, ModelRef, OptimBlock, ZeroBlock
from rlhf.recipe.stages import OnlineRecipe, PPORecipe, PreferenceRecipe
from rlhf.train.guards import check_padding, check_weights
from rlhf.train.job import Job
from rlhf.train.reference import Reference

logger = logging.getLogger("rlhf.roles")


def policy_engine(job: Job, tokenizer: PreTrainedTokenizerFast) -> Engine:
    """The policy that the stage trains."""
    block = job.recipe.model
    setup = Setup.to_train(block, job.recipe.train.seed)
    with sharded_loading(job.recipe.zero, bf16=block.dtype == "bf16"):
        model = build_policy(_source(job), tokenizer, setup, revision=block.revision)
    return _engine("policy", PolicyModule(model), job.recipe.zero, block.dtype, job.recipe.train)


def frozen_policy(job: Job, tokenizer: PreTrainedTokenizerFast) -> Engine:
    """The recipe's policy, only asked."""
    block = job.recipe.model
    with sharded_loading(job.recipe.zero, bf16=block.dtype == "bf16"):
        model = build_policy(
            _source(job), tokenizer, Setup.frozen(block.dtype, block.attention), revision=block.revision
        )
    return _engine("policy", PolicyModule(model), job.recipe.zero, block.dtype)


def reward_engine(job: Job, tokenizer: PreTrainedTokenizerFast) -> Engine:
    """The reward model that `rlhf rm` trains; the head of an existing reward model is kept."""
    block, source = job.recipe.model, _source(job)
    setup = Setup.to_train(block, job.recipe.train.seed)
    keep = isinstance(source, str) and has_score_head(source, block.revision)
    with sharded_loading(job.recipe.zero, bf16=block.dtype == "bf16"):
        model = build_scorer(source, tokenizer, setup, head="keep" if keep else "new", revision=block.revision)
    return _engine("reward", ScorerModule(model), job.recipe.zero, block.dtype, job.recipe.train)


def critic_engine(job: Job, tokenizer: PreTrainedTokenizerFast) -> Engine:
    """PPO's value model: a reward model with its head, or a policy with a new one; LoRA where the policy has it."""
    recipe = job.recipe
    assert isinstance(recipe, PPORecipe)
    setup = Setup.to_train(recipe.model, recipe.train.seed)
    source = job.source("critic", recipe.critic)
    keep = has_score_head(source, recipe.critic.revision)
    revision = recipe.critic.revision
    with sharded_loading(recipe.critic.zero, bf16=recipe.model.dtype == "bf16"):
        model = build_scorer(source, tokenizer, setup, head="keep" if keep else "new", revision=revision)
    return _engine("critic", ScorerModule(model), recipe.critic.zero, recipe.model.dtype, recipe.critic)


def prompt_critic(job: Job, tokenizer: PreTrainedTokenizerFast) -> Engine:
    """DRO's value model: of a source of its own, else of the policy's; the head of a reward model is kept."""
    recipe = job.recipe
    assert isinstance(recipe, PreferenceRecipe)
    setup = Setup.to_train(recipe.model, recipe.train.seed)
    ref: ModelRef = recipe.critic if recipe.critic.from_ or recipe.critic.path else recipe.model
    source = _source(job) if ref is recipe.model else job.source("critic", ref)
    keep = isinstance(source, str) and has_score_head(source, ref.revision)
    with sharded_loading(recipe.critic.zero, bf16=recipe.model.dtype == "bf16"):
        model = build_scorer(source, tokenizer, setup, head="keep" if keep else "new", revision=ref.revision)
    return _engine("critic", ScorerModule(model), recipe.critic.zero, recipe.model.dtype, recipe.critic)


def reference(job: Job, tokenizer: PreTrainedTokenizerFast, actor: Engine) -> Reference:
    """The frozen policy. With LoRA, and where both start from the same weights, it is the actor without its adapter."""
    recipe = job.recipe
    assert isinstance(recipe, (PreferenceRecipe, OnlineRecipe))
    if recipe.model.lora is not None and is_same_start(job):
        logger.info("reference: the policy's base, with the adapter switched off")
        return Reference(actor, is_base=True)
    ref: ModelRef = recipe.reference if recipe.reference.from_ or recipe.reference.path else recipe.model
    source = _source(job) if ref is recipe.model else job.source("reference", ref)
    # The seed matters where the policy is made from scratch: so is its reference then, with the same weights.
    setup = replace(Setup.frozen(recipe.model.dtype, recipe.model.attention), seed=recipe.train.seed)
    with sharded_loading(recipe.reference.zero, bf16=recipe.model.dtype == "bf16"):
        model = build_policy(source, tokenizer, setup, revision=ref.revision)
    return Reference(_engine("reference", PolicyModule(model), recipe.reference.zero, recipe.model.dtype))


def is_same_start(job: Job) -> bool:
    """Whether the reference is the very model that the policy starts from."""
    recipe = job.recipe
    assert isinstance(recipe, (PreferenceRecipe, OnlineRecipe))
    if not (recipe.reference.from_ or recipe.reference.path):
        return True
    if "reference" in job.parents and "model" in job.parents:
        return job.parents["reference"].content_hash == job.parents["model"].content_hash
    return (recipe.reference.path, recipe.reference.revision) == (recipe.model.path, recipe.model.revision)


def score_engine(job: Job, source: str, tokenizer: PreTrainedTokenizerFast, spec: ModelReward, name: str) -> Engine:
    """A frozen reward model. tokenizer: the one whose tokens it will be given."""
    setup = Setup.frozen(spec.dtype, job.recipe.model.attention)
    with sharded_loading(spec.zero, bf16=spec.dtype == "bf16"):
        model = build_scorer(source, tokenizer, setup, head="keep", revision=spec.revision)
    return _engine(f"reward {name}", ScorerModule(model), spec.zero, spec.dtype)


def refuse_not_finite(engine: Engine, role: str) -> None:
    """Before anything is learned: weights as they were loaded are finite, on every rank."""
    source = engine.module.core.config.name_or_path
    fix = "The files of the model hold it: take another checkpoint of it, or load it in fp32."
    dist.agreed(lambda: check_weights(engine.bad_weights(), f"{role} {source}".strip(), fix))


def _source(job: Job) -> str | InitBlock:
    block = job.recipe.model
    return block.init if block.init is not None else job.source("model", block)


def _engine(role: str, module: RoleModule, zero: ZeroBlock, dtype: str, optim: OptimBlock | None = None) -> Engine:
    engine = Engine(module, zero, bf16=dtype == "bf16", optim=optim)
    refuse_not_finite(engine, role)
    layout = module.prove(engine)
    check_padding(module.padding_gap(engine), dtype, role)
    trained, total = engine.num_elements()
    text = "frozen" if optim is None else f"{trained:,} trained"
    kind = type(module.core).__name__
    sharding = f"ZeRO-{zero.stage}" + (f", {held_elements(module)[0]:,} held here" if zero.stage == 3 else "")
    logger.info("%s: %s, %s parameters (%s), %s, %s, %s", role, kind, f"{total:,}", text, dtype, sharding, layout)
    return engine
