"""Every file under recipes/ is valid, says how it is started, and lists only what differs from the defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic.fields import FieldInfo

from rlhf.data.demo import JUDGE_TEMPLATE
from rlhf.recipe.load import load_pipeline, load_recipe
from rlhf.recipe.schema import Block
from rlhf.recipe.stages import RECIPES
from scripts.algorithms import ALGORITHMS

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").glob("*/*.y*ml"))
PIPELINES = ("pipeline", "tiny", "iterative", "iterative_dpo", "sdpo", "rso", "paft", "rlaif", "self_rewarding")
STAGES = [path for path in FILES if path.stem not in PIPELINES]
CHAINS = [path for path in FILES if path.stem in PIPELINES]


def stage(path: Path) -> str:
    """The subcommand a recipe is for: the one it is named after, or that of the algorithm it is named after."""
    return path.stem if path.stem in RECIPES else ALGORITHMS[path.stem]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def header(path: Path) -> str:
    """The comment lines at the top of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def test_there_is_a_recipe_for_every_stage():
    assert {path.stem for path in STAGES} == {*RECIPES, *ALGORITHMS}
    assert all((path.parent / "README.md").is_file() for path in FILES)


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_a_recipe_loads_as_the_stage_it_is_named_after(path):
    for devices in (1, 8) if stage(path) != "merge" else (1,):
        load_recipe(path, stage(path), world_size=devices)


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_every_step_of_a_pipeline_is_valid(path):
    made: dict[str, str] = {}
    for step in load_pipeline(path):
        for devices in (1,) if step.stage == "merge" else (1, 2) if path.stem == "tiny" else (1, 8):
            loaded = load_recipe(step.recipe, step.stage, step.overrides, world_size=devices)
        assert step.recipe.stem == step.stage, f"{step.recipe} is the recipe of another stage"
        for key, parent in parents(loaded.recipe):
            assert parent in made, f"{step.name}: {key} names {parent}, which no earlier step makes"
        made[step.name] = step.stage


def parents(block: Block, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(key, stage) of every `from:` in a recipe."""
    for attribute in type(block).model_fields:
        value = getattr(block, attribute)
        if attribute == "from_" and value:
            yield f"{prefix}from", value
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, Block):
                yield from parents(inner, f"{prefix}{attribute}.")


def test_the_policy_is_asked_to_judge_as_it_has_learned_to():
    steps = load_pipeline(ROOT / "recipes" / "demo" / "self_rewarding.yaml")
    labels = [load_recipe(step.recipe, step.stage, step.overrides) for step in steps if step.stage == "label"]
    assert len(labels) == 2 and {loaded.recipe.judge.template for loaded in labels} == {JUDGE_TEMPLATE}


# --- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_a_recipe_begins_with_its_purpose_its_hardware_and_its_command(path):
    text = header(path)
    assert "Hardware: " in text
    named = "" if path.stem in RECIPES else f" --name {path.stem}"
    assert f"rlhf {stage(path)} {name(path)} --run runs/{path.parent.name}{named}" in text


@pytest.mark.parametrize("path", CHAINS, ids=name)
def test_a_pipeline_begins_with_its_purpose_and_its_command(path):
    assert "Start: " in header(path)
    assert name(path) in header(path) or f"make {path.parent.name}" in header(path)


# --- defaults ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_a_recipe_lists_only_what_differs_from_the_defaults(path):
    loaded = load_recipe(path, stage(path))
    same = list(defaults(loaded.recipe, loaded.document.values))
    assert not same, f"these keys have their default anyway, leave them out: {', '.join(same)}"


def defaults(block: Block, written: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The written keys that say what would be true without them. The name or kind of a choice may stand."""
    fields = {field.alias or attribute: (attribute, field) for attribute, field in type(block).model_fields.items()}
    for key, given in written.items():
        attribute, field = fields[key]
        value = getattr(block, attribute)
        if isinstance(value, Block) and isinstance(given, dict):
            yield from defaults(value, given, f"{prefix}{key}.")
        elif value == field.default and not is_choice(field):
            yield f"{prefix}{key}"
        elif isinstance(value, list) and value and isinstance(value[0], Block):
            for i, inner in enumerate(value):
                yield from defaults(inner, given[i], f"{prefix}{key}.{i}.")


def is_choice(field: FieldInfo) -> bool:
    """Whether a field can have one value only: the name by which its block was chosen."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def test_a_key_with_its_default_is_found(tmp_path):
    recipe = tmp_path / "ppo.yaml"
    recipe.write_text(
        "model: {from: sft}\n"
        "data: {path: rows.jsonl, max_length: 1024}\n"
        "critic: {from: rm, zero: {stage: 0}}\n"
        "rewards: [{kind: length, weight: 1, target: 9}, {kind: model, from: rm2}]\n"
        "policy_loss: {name: ppo_clip, clip_low: 0.1}\n"
    )
    loaded = load_recipe(recipe, "ppo")
    found = list(defaults(loaded.recipe, loaded.document.values))
    assert found == ["data.max_length", "critic.from", "critic.zero.stage", "rewards.0.weight"]
    recipe.write_text("model: {from: sft}\ndata: {path: rows.jsonl}\nrewards: [{kind: model, from: rm}]\n")
    loaded = load_recipe(recipe, "ppo")
    assert list(defaults(loaded.recipe, loaded.document.values)) == ["rewards"]
