"""All roles of PPO or GRPO on one frozen base: one module, an engine for the actor and one for the critic."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf.engine.engine import Engine
from rlhf.engine.zero import held_bytes, sharded_loading
from rlhf.models.build import Setup
from rlhf.models.forward import RoleModule
from rlhf.models.shared import CRITIC, POLICY, REFERENCE, SharedModule, alone, build_shared
from rlhf.recipe.stages import OnlineRecipe, PPORecipe
from rlhf.train.guards import check_padding
from rlhf.train.job import Job
from rlhf.train.layout import plan, role_name
from rlhf.train.reference import Reference
from rlhf.train.roles import refuse_not_finite

logger = logging.getLogger("rlhf.roles")

Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SharedRoles:
    """What `roles` builds one by one otherwise. scores: the recipe key of a reward -> its scores (b,) of tokens."""

    actor: Engine
    critic: Engine | None
    reference: Reference
    scores: dict[str, Score]


def shared_roles(job: Job, tokenizer: PreTrainedTokenizerFast) -> SharedRoles:
    """The models of a recipe with `share_base`. Reference and rewards are called through the actor's engine."""
    recipe = job.recipe
    assert isinstance(recipe, OnlineRecipe)
    layout = plan(job)
    bf16 = recipe.model.dtype == "bf16"
    setup = Setup.to_train(recipe.model, recipe.train.seed)
    with sharded_loading(recipe.zero, bf16=bf16):
        module = build_shared(layout.source, tokenizer, setup, layout.roles, revision=layout.revision)
    own = {role: list(module.own(role).values()) for role in (POLICY, CRITIC)}
    actor = Engine(module, recipe.zero, bf16=bf16, optim=recipe.train, role=POLICY, trained=own[POLICY])
    critic = None
    if isinstance(recipe, PPORecipe):
        critic = Engine(
            module, recipe.critic.zero, bf16=bf16, optim=recipe.critic, role=CRITIC, trained=own[CRITIC], beside=actor
        )
        alone(module, CRITIC, None)  # what cannot be published is told before it is trained
    refuse_not_finite(actor, "all roles")
    keys = [f"rewards.{i}" for i in range(len(recipe.rewards))]
    scores = {key: scores_of(actor, role_name(key)) for key in keys if role_name(key) in layout.roles}
    logger.info("all roles: %s", module.prove(actor))
    check_padding(module.padding_gap(actor), recipe.model.dtype, "all roles")
    describe(module, [engine for engine in (actor, critic) if engine is not None], len(scores))
    return SharedRoles(actor, critic, Reference(actor, role=REFERENCE), scores)


def scores_of(engine: Engine, role: str) -> Score:
    """A frozen role's scores, without gradients."""

    def score(ids: Tensor, attention: Tensor) -> Tensor:
        with engine.evaluating():
            found: Tensor = engine(ids, attention, role=role)
        return found

    return score


def published(engine: Engine, state: dict[str, Tensor]) -> tuple[RoleModule, dict[str, Tensor]]:
    """The module that an engine's weights are published as, and the weights by its names."""
    module = engine.module
    if engine.role is None:
        return module, state  # type: ignore[return-value]
    assert isinstance(module, SharedModule)
    return alone(module, engine.role, state)


def describe(module: SharedModule, engines: list[Engine], rewards: int) -> None:
    """Log what is shared, and what it saves on this rank against a copy for each role that would need one."""
    core = type(module.core).__name__
    for engine in engines:
        trained, total = engine.num_elements()
        what = f"{total:,} parameters of all roles ({trained:,} trained as {engine.role})"
        logger.info("%s: %s, %s, ZeRO-%d", engine.role, core, what, engine.zero.stage)
    copies = len(engines) + rewards  # the reference would be the policy with its adapter off
    elements, held = held_bytes(module.backbone())
    roles = ["policy", "reference", *(["critic"] if len(engines) > 1 else []), *(["rewards"] if rewards else [])]
    times = "once" if copies == 1 else f"once instead of {copies} times"
    saved = f"{(copies - 1) * held / 1e6:,.1f} MB"
    logger.info(
        "shared base: %s parameters held %s (%s); saves %s here", f"{elements:,}", times, ", ".join(roles), saved
    )
