"""A recipe file and its `--set` overrides -> a valid recipe, or one error that tells every problem with its place."""

from __future__ import annotations

import copy
import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from rlhf.errors import DataError, RecipeError
from rlhf.recipe.check import check_recipe, missing_data, missing_files
from rlhf.recipe.document import Document, Mark, read_document, to_yaml
from rlhf.recipe.overrides import apply_overrides
from rlhf.recipe.problems import Problem, closest, dotted
from rlhf.recipe.rounds import expand_rounds
from rlhf.recipe.schema import Block
from rlhf.recipe.secrets import secrets
from rlhf.recipe.stages import RECIPES, AnyRecipe, Expectation, Pipeline
from rlhf.recipe.translate import translate

AnyBlock = TypeVar("AnyBlock", bound=Block)

# Take the place of a required block that is wrong, so that the rest of the recipe can still be checked.
STAND_INS = {"model": {"path": "-"}, "data": {"path": "-"}, "base": {"path": "-"}}
ROUNDS = 5
MOST = 50  # mistakes that are looked at; a file with more of them is no recipe


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and what is known about its text."""

    stage: str
    recipe: AnyRecipe
    document: Document
    overrides: tuple[str, ...]
    notices: tuple[str, ...]  # what `--set` replaced, for the log

    @property
    def path(self) -> str:
        """The file, as it was named."""
        return self.document.file

    @property
    def raw_text(self) -> str:
        """The file's text, byte for byte but for its encoding mark."""
        return self.document.text

    @property
    def marks(self) -> dict[str, Mark]:
        """Where every written key stands, by dotted key."""
        return self.document.marks

    def place(self, key: str) -> str:
        """`file:line:column` of a dotted key (of its block where it is not written), or the `--set` that gave it."""
        return self.document.place(key)

    def error(self, problems: Sequence[Problem]) -> RecipeError:
        """The error for problems that were found later, with their places."""
        return self.document.error(problems)

    def check_devices(self, world_size: int) -> None:
        """Refuse batches that `world_size` devices cannot share equally."""
        problems = check_recipe(self.stage, self.recipe, world_size)
        if problems:
            raise self.error(problems)

    def check_files(self) -> None:
        """Refuse files that are named but not there: templates and functions (exit 2), then data (exit 3)."""
        problems = missing_files(self.recipe)
        if problems:
            raise self.error(problems)
        problems = missing_data(self.recipe)
        if problems:
            raise DataError(str(self.error(problems)))


class PipelineCommand(NamedTuple):
    """One stage of a pipeline: `rlhf STAGE RECIPE --name NAME --set ...`."""

    stage: str
    recipe: Path
    name: str
    overrides: tuple[str, ...]
    expect: Expectation | None


def load_recipe(
    path: str | Path, stage: str, overrides: Sequence[str] = (), *, world_size: int | None = None
) -> LoadedRecipe:
    """Read, override, validate and check a recipe. Raises one RecipeError with all problems, ordered by place.

    world_size: number of devices; None leaves out the rules about devices (`LoadedRecipe.check_devices` runs them).
    """
    document = read_document(path)
    notices = apply_overrides(document, RECIPES[stage], overrides)
    refuse_secrets(document)
    recipe, problems, touched = _validate(RECIPES[stage], document)
    if recipe is not None:
        broken = check_recipe(stage, recipe, world_size)
        problems += [problem for problem in broken if not _follows(problem, touched)]
    if problems or recipe is None:
        raise document.error(problems)
    return LoadedRecipe(stage, recipe, document, tuple(overrides), tuple(notices))


def refuse_secrets(document: Document) -> None:
    """Before anything else is said of the recipe: other messages repeat what they find."""
    if leaks := secrets(document):
        raise document.error(leaks)


def _validate(model: type[AnyBlock], document: Document) -> tuple[AnyBlock | None, list[Problem], set[str]]:
    """(what can be made of the values, the problems, the keys they are about).

    Pydantic does not look at a block as a whole while one of its keys is wrong. So what is wrong is taken out and the
    rest validated again, until nothing new is found; a problem that only follows from an earlier one is not told.
    """
    values = copy.deepcopy(document.values)
    problems = list(document.problems)
    touched = {problem.key for problem in problems}
    for _ in range(ROUNDS):
        try:
            return model.model_validate(values, by_alias=True, by_name=False), problems, touched
        except ValidationError as error:
            errors = error.errors(include_url=False)
            found = [translate(document, model, values, e) for e in errors[:MOST]]
            document.untold = len(errors[MOST:])
        problems += [problem for problem, _ in found if not _follows(problem, touched)]
        for problem, path in found:
            touched |= {problem.key, *problem.also, *problem.near, _take_out(values, path)}
        if document.untold:
            break
    return None, problems, touched


def _follows(problem: Problem, touched: set[str]) -> bool:
    """Whether a problem is about a key that is already known to be wrong, or lies in a block that is."""
    keys = (problem.key, *problem.also)
    return any(key == t or key.startswith(f"{t}.") for key in keys for t in touched)


def _take_out(values: dict[str, Any], path: tuple[str, ...]) -> str:
    """Remove the value at `path`, of a list item the whole list, of a missing key its block; returns what is gone."""
    index = next((i for i, part in enumerate(path) if part.isdigit()), len(path))
    path = path[:index]
    parents: list[Any] = [values]
    for part in path[:-1]:
        inner = parents[-1].get(part)
        if not isinstance(inner, dict):
            break
        parents.append(inner)
    path = path[: len(parents)]
    if path[-1] not in parents[-1] and len(path) > 1:
        return _take_out(values, path[:-1])
    parents[-1].pop(path[-1], None)
    if len(path) == 1 and path[0] in STAND_INS:
        values[path[0]] = STAND_INS[path[0]]
    return dotted(path)


def load_pipeline(path: str | Path) -> list[PipelineCommand]:
    """The commands of a pipeline file, rounds written out, recipes relative to it. Recipes must exist; none is read."""
    document = read_document(path)
    refuse_secrets(document)
    expanded, as_written = expand_rounds(document)
    pipeline, problems, _ = _validate(Pipeline, expanded)
    document.untold = expanded.untold
    folder = Path(path).parent
    commands = []
    for i, step in enumerate(pipeline.stages if pipeline is not None else []):
        recipe = folder / step.recipe
        if not os.path.isfile(recipe):
            near = closest(recipe.name, glob.glob("*.y*ml", root_dir=recipe.parent)) if recipe.name else []
            fix = f"did you mean {near[0]}?" if near else "paths are relative to the pipeline file"
            problems.append(Problem(f"stages.{i}.recipe", f"expected a recipe, found nothing at {recipe}", fix))
        overrides = tuple(f"{key}={to_yaml(value, one_line=True)}" for key, value in step.set.items())
        commands.append(PipelineCommand(step.stage, recipe, step.name or step.stage, overrides, step.expect))
    if document.problems:  # rounds that are wrong were left out: what is said of the list follows from that
        problems = [problem for problem in problems if problem.key != "stages"]
    problems = [*document.problems, *map(as_written, problems)]
    if problems:
        raise document.error(problems)
    return commands


def dump_recipe(recipe: AnyRecipe) -> str:
    """YAML with every default written out, in the order of the schema; loading it gives an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json", by_alias=True))
