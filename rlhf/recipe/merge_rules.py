"""The rules of `rlhf merge`; `check.py` runs them among the others."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.recipe.problems import Problem
from rlhf.recipe.schema import ModelRef
from rlhf.recipe.stages import MergeRecipe


def merged_models(recipe: MergeRecipe) -> Iterator[tuple[str, ModelRef]]:
    """(recipe key, block) of the base and of every model."""
    yield "base", recipe.base
    yield from ((f"models.{i}", model) for i, model in enumerate(recipe.models))


def different_models(recipe: MergeRecipe) -> Iterator[Problem]:
    """The base has changed nothing, and a model counts once."""
    seen: dict[tuple[str | None, ...], str] = {}
    for key, ref in merged_models(recipe):
        source, key = (ref.from_, ref.path, ref.revision), f"{key}.{'from' if ref.from_ else 'path'}"
        if source in seen and any(source):
            what = f"expected different models, found {ref.from_ or ref.path} as {seen[source]} too"
            yield Problem(key, what, "remove one of the two", (seen[source],))
        seen.setdefault(source, key)


def some_weight(recipe: MergeRecipe) -> Iterator[Problem]:
    """Weights that are all 0 would publish the base."""
    if not any(model.weight for model in recipe.models):
        keys = tuple(f"models.{i}.weight" for i in range(1, len(recipe.models)))
        yield Problem("models.0.weight", "expected a weight above 0, found none", "write for example 0.5 each", keys)


def two_models(recipe: MergeRecipe) -> Iterator[Problem]:
    """An arc has two ends."""
    if recipe.method.only_two and len(recipe.models) != 2:
        what = f"expected 2 models for {recipe.method.name}, found {len(recipe.models)}"
        yield Problem("models", what, "take linear, ties or dare", ("method.name",))


def one_process(recipe: MergeRecipe, world_size: int) -> Iterator[Problem]:
    """Nothing is computed that would be worth a second device."""
    if world_size > 1:
        what = f"expected one process, found {world_size}"
        yield Problem("", what, "merging needs no device: leave out --gpus, --num-nodes and --hostfile")
