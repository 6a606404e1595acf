"""The rules of `rlhf label` alone; `check.py` runs them among the others."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.recipe.problems import Problem
from rlhf.recipe.stages import LabelRecipe, RsoBlock


def only_asked(recipe: LabelRecipe) -> Iterator[Problem]:
    """The policy of `label` is trained already, and stays as it is."""
    model = recipe.model
    if model.init is not None:
        yield Problem("model.init", "expected a trained policy, found one from scratch", "write model: {from: sft}")
    for key in ("lora", "gradient_checkpointing", "dropout"):
        if getattr(model, key):
            what = "expected nothing that is for training, found it set"
            yield Problem(f"model.{key}", what, "label changes no weights: remove the key")


def rejection_sampling(recipe: LabelRecipe) -> Iterator[Problem]:
    """Accepting what there is selects nothing, and options of a selection that is not made say nothing."""
    label = recipe.label
    if label.pairs != "rso" and label.rso != RsoBlock():
        yield Problem("label.rso", f"expected label.pairs rso beside it, found {label.pairs}", "remove one of them")
    if label.rso.accept % 2:
        yield Problem("label.rso.accept", f"expected an even number, found {label.rso.accept}", "they meet two by two")
    if label.pairs == "rso" and label.rso.accept >= label.answers:
        what = f"expected more than label.rso.accept = {label.rso.accept} to select from, found {label.answers}"
        yield Problem("label.answers", what, "8 of 64 is usual", ("label.rso.accept",))


def devices_share_answers(recipe: LabelRecipe, world_size: int) -> Iterator[Problem]:
    """Every device samples the same number of batches in every step."""
    label = recipe.label
    together = label.prompts_together()
    if -(-label.batch // together) % world_size:
        what = f"expected a multiple of {world_size} devices x {together} prompts sampled together, found {label.batch}"
        near = together * world_size * max(1, label.batch // (together * world_size))
        yield Problem("label.batch", what, f"for example {near}", ("label.rollout_batch", "label.answers"))
