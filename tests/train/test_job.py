"""Sources that a stage has made: found wherever a recipe can name one, and given their path."""

from __future__ import annotations

from pathlib import Path

from rlhf.recipe.stages import PPORecipe, RewardRecipe
from rlhf.run.lineage import Parent
from rlhf.train.job import data_refs, with_paths


def parent(name: str) -> Parent:
    return Parent(Path("run") / name, {"kind": "data", "files": {}}, "-")


def test_every_source_of_a_recipe_gets_its_path():
    sources = [{"from": "a"}, {"path": "x.jsonl"}, {"from": "b", "weight": 0.1}]
    recipe = RewardRecipe.model_validate(
        {"model": {"from": "sft"}, "data": {"sources": sources, "eval": {"from": "c"}}}
    )
    found = dict(data_refs(recipe))
    assert {key: source.from_ for key, source in found.items()} == {
        "data.sources.0": "a",
        "data.sources.2": "b",
        "data.eval": "c",
    }
    data = with_paths(recipe, {key: parent(source.from_) for key, source in found.items()}).data
    assert [source.path for source in data.sources] == ["run/a/pairs.jsonl", "x.jsonl", "run/b/pairs.jsonl"]
    assert data.eval.path == "run/c/pairs.jsonl" and data.sources[2].weight == 0.1
    assert recipe.data.sources[0].path is None, "the recipe itself stays as it was written"


def test_an_inline_source_and_one_of_pretraining():
    blocks = {"model": {"from": "sft"}, "data": {"from": "a"}, "pretraining": {"data": {"from": "b", "limit": 3}}}
    recipe = PPORecipe.model_validate(blocks)
    parents = {key: parent(source.from_) for key, source in data_refs(recipe)}
    assert list(parents) == ["data", "pretraining.data"]
    filled = with_paths(recipe, parents)
    assert [source.path for source in filled.data.all_sources()] == ["run/a/pairs.jsonl"]
    assert (filled.pretraining.data.path, filled.pretraining.data.limit) == ("run/b/pairs.jsonl", 3)


def test_a_recipe_without_any_is_unchanged():
    recipe = RewardRecipe.model_validate({"model": {"from": "sft"}, "data": {"path": "x.jsonl"}})
    assert list(data_refs(recipe)) == [] and with_paths(recipe, {}) == recipe
