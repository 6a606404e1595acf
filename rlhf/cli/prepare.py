"""From a command line to a `Job`: every check that needs no model, in the order in which a user can mend things."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from rlhf.errors import CheckpointError, UnsafeError
from rlhf.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from rlhf.recipe.options import FunctionReward, ModelReward
from rlhf.recipe.schema import ModelRef
from rlhf.recipe.stages import OnlineRecipe, PPORecipe, PreferenceRecipe, Recipe
from rlhf.run.lineage import Parent, hash_file
from rlhf.run.rundir import RunDir, resolve_parent
from rlhf.train.job import Job

POLICY, SCORER = ("policy",), ("reward", "value")


def model_refs(stage: str, recipe: Recipe) -> Iterator[tuple[str, ModelRef, tuple[str, ...]]]:
    """(recipe key, what it names, kinds of stage it accepts) for every model of a recipe."""
    yield "model", recipe.model, (*POLICY, "reward") if stage == "rm" else POLICY
    if isinstance(recipe, (PreferenceRecipe, OnlineRecipe)):
        yield "reference", recipe.reference, POLICY
    if isinstance(recipe, PPORecipe):
        yield "critic", recipe.critic, (*SCORER, *POLICY)
    if isinstance(recipe, OnlineRecipe):
        for i, reward in enumerate(recipe.rewards):
            if isinstance(reward, ModelReward):
                yield f"rewards.{i}", reward, ("reward",)


def prepare(
    stage: str,
    path: Path,
    run: RunDir,
    *,
    name: str | None = None,
    overrides: list[str],
    world_size: int | None = None,
    restart: bool = False,
    allowed_code: list[Path],
) -> tuple[Job, LoadedRecipe]:
    """Check the recipe, the files and the parents. Nothing is written."""
    loaded = load_recipe(path, stage, overrides, world_size=world_size)
    loaded.check_files()
    recipe = loaded.recipe
    code = check_code(loaded, allowed_code)
    parents: dict[str, Parent] = {}
    for key, ref, kinds in model_refs(stage, recipe):
        if ref.from_:
            parents[key] = resolve_parent(ref.from_, run, kinds, f"{key}.from", loaded.place(f"{key}.from"))
    check_tokenizers(loaded, parents)
    resolved = dump_recipe(recipe)
    inputs = {
        "stage": stage,
        "recipe": recipe.model_dump(mode="json", by_alias=True),
        "parents": {key: parent.content_hash for key, parent in parents.items()},
        "data": check_data(recipe, stage),
        "code": {str(file): hash_file(file) for file in sorted(code)},
    }
    folder = run.stage(name or stage)
    job = Job(stage, folder, recipe, loaded.raw_text, resolved, parents, inputs, restart, None, code)
    return job, loaded


DATA_KIND = {"sft": "tokens", "rm": "pairs", "dpo": "pairs", "ppo": "prompts", "grpo": "prompts"}


def check_code(loaded: LoadedRecipe, allowed: list[Path]) -> frozenset[Path]:
    """The reward files that the recipe names; each must have been named on the command line too."""
    recipe = loaded.recipe
    rewards = recipe.rewards if isinstance(recipe, OnlineRecipe) else []
    named = set()
    for i, reward in enumerate(rewards):
        if isinstance(reward, FunctionReward):
            file = Path(reward.function.rpartition(":")[0]).resolve()
            if file not in {path.resolve() for path in allowed}:
                raise UnsafeError(
                    f"expected {file.name} to be allowed on the command line, since its code will run",
                    where=loaded.place(f"rewards.{i}.function"),
                    fix=f"If you trust it, add: --allow-code {os.path.relpath(file)}",
                )
            named.add(file)
    return frozenset(named)


def check_tokenizers(loaded: LoadedRecipe, parents: dict[str, Parent]) -> None:
    """All models of a stage must read the same tokens: rollouts are scored as sampled, not re-rendered."""
    policy = parents.get("model")
    if policy is None:
        return
    for key, parent in parents.items():
        for fact, what in (("tokenizer_hash", "tokenizer"), ("template_hash", "chat template")):
            if parent.manifest["facts"][fact] != policy.manifest["facts"][fact]:
                raise CheckpointError(
                    f"expected the {what} of {policy.path}, found another one in {parent.path}",
                    where=loaded.place(f"{key}.from"),
                    fix="Train both from the same SFT stage: model: {from: sft} in the recipe of each.",
                )


def check_data(recipe: Recipe, stage: str) -> dict[str, str]:
    """Look at the first row of every local source; returns the identity of each source's content, by recipe key."""
    from rlhf.data.sources import check_sources, fingerprint, named_sources  # imports datasets only where it must

    sources = dict(named_sources(recipe.data)) | ({"data.eval": recipe.data.eval} if recipe.data.eval else {})
    facts = check_sources(recipe.data, DATA_KIND[stage])
    return {fact.key: fingerprint(sources[fact.key], fact.located) for fact in facts}
