"""Recipes written to a temporary folder and loaded from there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.load import LoadedRecipe, load_recipe

MINIMAL = "model: {from: sft}\ndata: {path: rows.jsonl}\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LoadedRecipe]:
    """load(text, stage, *overrides, world_size=None): the recipe of a text, in a file r.yaml."""
    monkeypatch.chdir(tmp_path)

    def run(text: str = MINIMAL, stage: str = "sft", *overrides: str, world_size: int | None = None) -> LoadedRecipe:
        Path("r.yaml").write_text(text, encoding="utf-8")
        return load_recipe("r.yaml", stage, list(overrides), world_size=world_size)

    return run


@pytest.fixture
def refuse(load: Callable[..., LoadedRecipe]) -> Callable[..., list[str]]:
    """Like `load` for a recipe that is refused: the problems, each one text with its hint behind a newline."""

    def run(*args: str, world_size: int | None = None) -> list[str]:
        with pytest.raises(RecipeError) as caught:
            load(*args, world_size=world_size)
        assert caught.value.exit_code == 2
        return str(caught.value).replace("\n  ", "\0").replace("\n", "\1").replace("\0", "\n  ").split("\1")

    return run
