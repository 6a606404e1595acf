"""Rules of `share_base`: one module plays all roles, so what belongs to the module is said once."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.recipe.problems import Problem
from rlhf.recipe.reward_options import ModelReward
from rlhf.recipe.schema import ZeroBlock
from rlhf.recipe.stages import OnlineRecipe, PPORecipe

# Of a `zero` block, what is done to the parameters that all roles share; the rest is each optimizer's own.
_OF_THE_MODULE = ("stage", "offload_params", "persistence_threshold")
_ONE = "with share_base it is the same module"


def share_base(recipe: OnlineRecipe) -> Iterator[Problem]:
    """One base needs adapters, one sharding, one dtype, and a reference that stands on it."""
    if not recipe.share_base:
        return
    if recipe.model.lora is None:
        fix = "roles differ by their adapters: add model.lora, or remove share_base"
        yield Problem("share_base", "expected model.lora beside it, found none", fix, ("model.lora",))
    if recipe.model.init is not None:
        fix = "write model: {from: sft}, or remove share_base"
        yield Problem("model.init", "expected a trained model under share_base, found one from scratch", fix)
    if isinstance(recipe, PPORecipe):
        for key in _OF_THE_MODULE:
            wanted, found = getattr(recipe.zero, key), getattr(recipe.critic.zero, key)
            if wanted != found:
                what = f"expected {wanted} as zero.{key} has it, found {found}"
                fix = f"{_ONE} that the policy has: set both to one value"
                yield Problem(f"critic.zero.{key}", what, fix, (f"zero.{key}",))
    yield from _reference(recipe)
    for i, reward in enumerate(recipe.rewards):
        if isinstance(reward, ModelReward):
            yield from _no_zero(f"rewards.{i}.zero", reward.zero)
            if reward.dtype != recipe.model.dtype:
                what = f"expected {recipe.model.dtype} as model.dtype has it, found {reward.dtype}"
                fix = f"{_ONE} that the policy has: set both to one type"
                yield Problem(f"rewards.{i}.dtype", what, fix, ("model.dtype",))


def _reference(recipe: OnlineRecipe) -> Iterator[Problem]:
    ref, model = recipe.reference, recipe.model
    is_own = bool(ref.from_ or ref.path) and (ref.from_, ref.path, ref.revision) != (
        model.from_,
        model.path,
        model.revision,
    )
    if is_own:
        what = f"expected the policy's start, found {ref.from_ or ref.path}"
        fix = "with share_base the reference is the base without the policy's update: remove it, or remove share_base"
        yield Problem("reference", what, fix, ("model",))
    yield from _no_zero("reference.zero", ref.zero)


def _no_zero(key: str, zero: ZeroBlock) -> Iterator[Problem]:
    if zero != ZeroBlock():
        what = "expected nothing under share_base, found a block of its own"
        yield Problem(key, what, f"{_ONE} that the policy has, sharded as `zero` says: remove it", ("zero",))
