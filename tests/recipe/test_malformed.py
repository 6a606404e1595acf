"""Generated mistakes: every key of every stage misspelt and given a wrong type, and recipes broken at random."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.document import to_yaml
from rlhf.recipe.fields import Option, shape_at, walk
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.stages import RECIPES

# What a key needs beside it for its block to be the one that is meant.
NEEDS = {
    "model.init": {"model": {}},
    "data.sources": {"data": {}},
    "data.eval": {"data": {"path": "x", "eval": {"path": "y"}}},
    "pretraining": {"pretraining": {"data": {"path": "x"}}},
    "pretraining.data.sources": {"pretraining": {"data": {}}},
    "pretraining.data.eval": {"pretraining": {"data": {"path": "x", "eval": {"path": "y"}}}},
}


def minimal(stage: str) -> dict[str, Any]:
    """What must be written for a block of the stage to be looked at."""
    if stage == "merge":
        return {"base": {"from": "sft"}, "models": [{"from": "dpo", "weight": 1}]}
    return {"model": {"from": "sft"}, "data": {"path": "x"}}


def keys(stage: str) -> Iterator[tuple[str, Option, dict[str, Any]]]:
    """(dotted key, option, a recipe in which the key's block exists) of every key of a stage."""
    for key, tag, option in walk(RECIPES[stage]):
        values = minimal(stage)
        for prefix, needed in NEEDS.items():
            if key.startswith(f"{prefix}."):
                values |= copy.deepcopy(needed)
        if tag:
            name, _, value = tag.partition("=")
            put(values, name, value)
        yield key, option, values


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, blocks and lists created on the way."""
    parts = key.split(".")
    node: Any = values
    for part, following in zip(parts, parts[1:] + [""], strict=True):
        new = value if not following else [] if following.isdigit() else {}
        if isinstance(node, list):
            if int(part) == len(node):
                node.append(new)
            elif not following:
                node[int(part)] = value
            node = node[int(part)]
        else:
            if not following or not isinstance(node.get(part), (dict, list)):
                node[part] = new
            node = node[part]


def misspellings(name: str) -> set[str]:
    """A letter doubled and a capital, two letters swapped, one lost."""
    middle = len(name) // 2
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    lost = name[:middle] + name[middle + 1 :] if len(name) > 3 else name
    return {(name + name[-1]).capitalize(), swapped, lost} - {name}


@pytest.mark.parametrize("stage", RECIPES)
def test_every_misspelt_key_is_named_with_the_right_one(stage: str, load: Callable[..., LoadedRecipe]) -> None:
    count = 0
    every = {key for key, _, _ in walk(RECIPES[stage])}
    for key, _, values in keys(stage):
        block, _, name = key.rpartition(".")
        siblings = {k.rpartition(".")[2] for k in every if k.rpartition(".")[0] == block}
        if name in ("kind", "name") and shape_at(RECIPES[stage], block.split("."), values).tag:
            continue  # without its tag a block is not known: tested as a missing tag
        for wrong in misspellings(name) - siblings:
            broken = copy.deepcopy(values)
            wrong_key = f"{block}.{wrong}" if block else wrong
            put(broken, wrong_key, 1)
            text = to_yaml(broken)
            line = next(i for i, row in enumerate(text.splitlines(), 1) if row.lstrip(" -").startswith(f"{wrong}: 1"))
            with pytest.raises(RecipeError) as caught:
                load(text, stage)
            lines = str(caught.value).splitlines()
            at = next(
                i for i, row in enumerate(lines) if f": {wrong_key}: expected a known key, found {wrong!r}" in row
            )
            assert lines[at].startswith(f"r.yaml:{line}:")
            assert key in lines[at + 1].replace("?", "").replace(",", "").split(), (key, lines)
            count += 1
    assert count > (30 if stage == "merge" else 150)


@pytest.mark.parametrize("stage", RECIPES)
def test_every_wrong_type_is_told_at_its_line(stage: str, load: Callable[..., LoadedRecipe]) -> None:
    count = 0
    for key, option, values in keys(stage):
        if option.shape.words == "names with text":
            wrong_values: tuple[Any, ...] = (3, [3])
        elif option.shape.is_list:
            wrong_values = ("abc", {"x": 1})
        elif option.shape.blocks:
            wrong_values = ("abc", [3])
        elif option.shape.is_text or option.shape.is_either:
            wrong_values = (True, {"x": 1})
        else:
            wrong_values = ("abc", [[1]])
        for wrong in wrong_values:
            broken = copy.deepcopy(values)
            put(broken, key, wrong)
            with pytest.raises(RecipeError) as caught:
                load(to_yaml(broken), stage)
            text = str(caught.value)
            assert f": {key}: expected " in text, (key, wrong, text)
            place = next(row for row in text.splitlines() if f": {key}: expected " in row).split(":")
            row = to_yaml(broken).splitlines()[int(place[1]) - 1]
            assert f"{key.rpartition('.')[2]}:" in row, (key, wrong, text)
            assert "pydantic" not in text
            count += 1
    assert count > (30 if stage == "merge" else 150)


@pytest.mark.parametrize("stage", RECIPES)
def test_the_order_of_keys_and_the_default_of_every_key_are_accepted(
    stage: str, load: Callable[..., LoadedRecipe]
) -> None:
    for key, option, values in keys(stage):
        if not option.is_required and not option.shape.blocks and not option.shape.is_list:
            given = copy.deepcopy(values)
            put(given, key, option.default)
            if key in (
                "model.from",
                "model.path",
                "critic.from",
                "advantage.name",
                "further_losses.0.name",
            ) or key.endswith(("data.path", "data.sources.0.path", "data.eval.path")):
                continue  # an alternative whose default means absence, or ruled out by the stage
            try:
                load(to_yaml(given), stage)
            except RecipeError as error:
                rows = [row for row in str(error).splitlines() if f": {key}: " in row]
                assert not rows, rows


def test_recipes_broken_at_random_are_refused_or_loaded_but_never_crash(load: Callable[..., LoadedRecipe]) -> None:
    rng = random.Random(0)
    scraps: list[Any] = [None, True, 0, -1, 1e-5, 10**30, "x", "", [], {}, [None], {"kind": "model"}, {"name": []},
                         [[[]]], {"": 1}, "a.b", {"from": "sft", "path": "x"}, [{"kind": {}}]]  # fmt: skip
    known = {stage: list(keys(stage)) for stage in RECIPES}
    for round_ in range(300):
        stage = rng.choice(list(RECIPES))
        every = known[stage]
        values: Any = minimal(stage)
        for _ in range(rng.randrange(1, 6)):
            key, _, needed = rng.choice(every)
            values = {**values, **needed}
            try:
                put(values, key, copy.deepcopy(rng.choice(scraps)))
            except (ValueError, IndexError):
                continue
        key, _, _ = rng.choice(every)
        overrides = [f"{key}={to_yaml(rng.choice(scraps), one_line=True)}"] if round_ % 2 else []
        try:
            load(to_yaml(values), stage, *overrides, world_size=rng.choice([None, 1, 3]))
        except RecipeError as error:
            assert all(row.startswith(("r.yaml:", "--set ", "  ")) for row in str(error).splitlines())
