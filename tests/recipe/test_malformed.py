"""Every key of every stage misspelt and given a wrong type; and every key with its default, which is accepted."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.document import to_yaml
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.stages import RECIPES
from scripts.reliability.broken_recipes import keys, loaded_or_told, misspelt_keys, put, wrong_types


@pytest.mark.parametrize("stage", RECIPES)
@pytest.mark.parametrize("kind", [misspelt_keys, wrong_types])
def test_every_mistake_is_told_at_its_line(
    stage: str, kind: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    every = list(kind(stage, random.Random(0)))  # type: ignore[call-overload]
    for broken in every:
        Path("r.yaml").write_bytes(broken.content)
        loaded_or_told(broken)
    assert len(every) > (10 if stage == "merge" else 100)


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
