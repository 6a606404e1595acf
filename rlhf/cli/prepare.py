"""From a command line to a `Job`: every check that needs no model, in the order in which a user can mend things."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError, RecipeError, UnsafeError
from rlhf.models.folder import check_code as check_model_code
from rlhf.models.folder import check_model_folder
from rlhf.models.trust import trust_only, trusted_revision
from rlhf.recipe.load import LoadedRecipe, dump_recipe, load_recipe
from rlhf.recipe.problems import Problem
from rlhf.recipe.reward_options import FunctionReward, ProcessReward
from rlhf.recipe.reward_rules import named_rewards
from rlhf.recipe.stages import RECIPES, AnyRecipe, LearningRecipe, Recipe, data_blocks
from rlhf.run.content import hash_file
from rlhf.run.lineage import Parent
from rlhf.run.rundir import RunDir, resolve_parent
from rlhf.train.job import (
    LABELLED,
    Job,
    data_kinds,
    data_refs,
    local_path,
    model_refs,
    same_tokens_fix,
    with_paths,
)


def data_stage(recipe: Path, stage: str | None) -> str:
    """The stage whose data a command looks at: the one that was named, else the one that the recipe is named after."""
    reading = [name for name, each in RECIPES.items() if issubclass(each, Recipe)]
    if (stage or recipe.stem) in reading:
        return stage or recipe.stem
    raise RecipeError(
        f"expected a recipe named after a stage that reads data, found {stage or recipe.name}",
        where=str(recipe),
        fix=f"Say which it is: --stage {' | '.join(reading)}",
    )


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
    trusted_code: Sequence[str] = (),
) -> tuple[Job, LoadedRecipe]:
    """Check the recipe, the files, the parents and the model folders. Nothing is written."""
    folder = run.stage(stage if name is None else name)
    loaded = load_recipe(path, stage, overrides, world_size=world_size)
    loaded.check_files()
    check_extras(loaded)
    recipe = loaded.recipe
    code = check_code(loaded, allowed_code)
    trust_only(trusted_code)
    parents: dict[str, Parent] = {}
    for key, ref, kinds in model_refs(stage, recipe):
        if ref.from_:
            parents[key] = resolve_parent(ref.from_, run, kinds, f"{key}.from", loaded.place(f"{key}.from"))
            check_model_code(str(parents[key].model))
        elif ref.path:
            check_model_folder(local_path(ref.path))
    check_tokenizers(loaded, parents)
    for key, source in data_refs(recipe):
        assert source.from_ is not None
        parents[key] = resolve_parent(source.from_, run, LABELLED, f"{key}.from", loaded.place(f"{key}.from"))
    recipe = with_paths(recipe, parents)
    resolved = dump_recipe(loaded.recipe)
    with placed(loaded):
        contents = check_data(recipe, stage)
    inputs: dict[str, Any] = {
        "stage": stage,
        "recipe": loaded.recipe.model_dump(mode="json", by_alias=True, exclude=set(loaded.recipe.of_the_process)),
        "parents": {key: parent.content_hash for key, parent in parents.items()},
        "data": contents,
        "code": {str(file): hash_file(file) for file in sorted(code)} | trusted_models(stage, recipe, parents),
    }
    best = recipe.checkpoint.keep_best if isinstance(recipe, LearningRecipe) else None
    if best is not None and best.publish:  # the one option there that changes what comes of the stage
        inputs["publishes"] = best.model_dump()
    job = Job(stage, folder, recipe, loaded.raw_text, resolved, parents, inputs, restart, None, code)
    return job, loaded


def check_extras(loaded: LoadedRecipe) -> None:
    """What a recipe asks for beyond the package's own requirements must be installed."""
    recipe = loaded.recipe
    if isinstance(recipe, Recipe) and recipe.log.wandb and importlib.util.find_spec("wandb") is None:
        raise RecipeError(
            "expected the package wandb, found it not installed",
            where=f"{loaded.place('log.wandb')}: log.wandb",
            fix="Install it with: pip install 'rlhf[wandb]', or remove the key; metrics.jsonl has everything.",
        )


def check_code(loaded: LoadedRecipe, allowed: list[Path]) -> frozenset[Path]:
    """The reward files that the recipe names; each must have been named on the command line too."""
    named = set()
    for key, reward in named_rewards(loaded.recipe):
        if isinstance(reward, (FunctionReward, ProcessReward)):
            file = Path(reward.function.rpartition(":")[0]).resolve()
            if file not in {path.resolve() for path in allowed}:
                raise UnsafeError(
                    f"expected {file.name} to be allowed on the command line, since its code will run",
                    where=loaded.place(f"{key}.function"),
                    fix=f"If you trust it, add: --allow-code {os.path.relpath(file)}",
                )
            named.add(file)
    return frozenset(named)


def trusted_models(stage: str, recipe: AnyRecipe, parents: dict[str, Parent]) -> dict[str, str]:
    """Model -> revision, of those models of the recipe whose own code the command line trusts."""
    sources = [
        str(parents[key].model) if key in parents else local_path(ref.path)
        for key, ref, _ in model_refs(stage, recipe)
        if key in parents or ref.path
    ]
    return {source: revision for source in sources if (revision := trusted_revision(source)) is not None}


def check_tokenizers(loaded: LoadedRecipe, parents: dict[str, Parent]) -> None:
    """Critic and reference must read the policy's tokens, each of which they say something about.

    A reward model says one thing about an answer, which is rendered again where it reads otherwise.
    """
    policy = parents.get("model")
    if policy is None:
        return
    for key in [key for key in ("reference", "critic") if key in parents]:
        parent = parents[key]
        for fact, what in (("tokenizer_hash", "tokenizer"), ("template_hash", "chat template")):
            if parent.manifest["facts"][fact] != policy.manifest["facts"][fact]:
                raise CheckpointError(
                    f"expected the {what} of {policy.path}, found another one in {parent.path}",
                    where=loaded.place(f"{key}.from"),
                    fix=same_tokens_fix(key, loaded.recipe.model),
                )


@contextmanager
def placed(loaded: LoadedRecipe) -> Iterator[None]:
    """Gives what is said of an option of the data its place in the file."""
    keys = tuple(data.key for data in data_blocks(loaded.recipe))
    try:
        yield
    except RecipeError as error:
        if error.where is None or not error.where.startswith(keys):
            raise
        key = error.where.replace("[", ".").replace("]", "")
        raise loaded.error([Problem(key, error.what, error.fix)]) from error


def check_data(recipe: AnyRecipe, stage: str) -> dict[str, str]:
    """Look at the first row of every local source; returns the identity of each source's content, by recipe key."""
    from rlhf.data.sources import all_sources, check_sources, fingerprint  # imports datasets only where it must

    found = {}
    for data, kind in data_kinds(recipe):
        sources = dict(all_sources(data))
        found |= {fact.key: fingerprint(sources[fact.key], fact.located) for fact in check_sources(data, kind)}
    return found


def check_rows(job: Job) -> None:
    """Read every local row once: a bad one is told here, not after models were loaded or ranks started."""
    from rlhf.data.records import check_records

    for data, kind in data_kinds(job.recipe):
        check_records(data, kind)
