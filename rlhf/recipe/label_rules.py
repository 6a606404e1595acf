"""The rules of `rlhf label` alone; `check.py` runs them among the others."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.recipe.problems import Problem
from rlhf.recipe.stages import LabelRecipe


def only_asked(recipe: LabelRecipe) -> Iterator[Problem]:
    """The policy of `label` is trained already, and stays as it is."""
    model = recipe.model
    if model.init is not None:
        yield Problem("model.init", "expected a trained policy, found one from scratch", "write model: {from: sft}")
    for key in ("lora", "gradient_checkpointing", "dropout"):
        if getattr(model, key):
            what = "expected nothing that is for training, found it set"
            yield Problem(f"model.{key}", what, "label changes no weights: remove the key")


def devices_share_answers(recipe: LabelRecipe, world_size: int) -> Iterator[Problem]:
    """Every device samples the same number of batches in every step."""
    label = recipe.label
    together = label.prompts_together()
    if -(-label.batch // together) % world_size:
        what = f"expected a multiple of {world_size} devices x {together} prompts sampled together, found {label.batch}"
        near = together * world_size * max(1, label.batch // (together * world_size))
        yield Problem("label.batch", what, f"for example {near}", ("label.rollout_batch", "label.answers"))
