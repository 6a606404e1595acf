"""Repeated steps of a pipeline: what they become, and how mistakes in them are told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.load import PipelineCommand, load_pipeline, load_recipe

ITERATIVE = """\
stages:
- {stage: rm, recipe: rm.yaml, name: rm-0}
- rounds: 2
  stages:
  - stage: label
    recipe: label.yaml
    name: label-{round}
    set: {model.from: "grpo-{previous}", label.seed: "{round}"}
  - stage: rm
    recipe: rm.yaml
    name: rm-{round}
    set:
      model.from: rm-{previous}
      data.sources: [{from: "label-{round}"}, {path: old.jsonl, weight: 0.1, templates: {prompt: "{title}: {round}"}}]
    expect: {metric: train/loss, direction: falls, by: 0}
- {stage: dpo, recipe: dpo.yaml}
"""


@pytest.fixture
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[PipelineCommand]]:
    monkeypatch.chdir(tmp_path)
    for stage in ("sft", "rm", "dpo", "label"):
        rewards = "rewards: [{kind: length}]\n" if stage == "label" else ""
        Path(f"{stage}.yaml").write_text(f"model: {{from: sft}}\ndata: {{path: rows.jsonl}}\n{rewards}")

    def load(text: str) -> list[PipelineCommand]:
        Path("p.yaml").write_text(text)
        return load_pipeline("p.yaml")

    return load


def test_rounds_become_plain_steps(pipeline: Callable[[str], list[PipelineCommand]]) -> None:
    steps = pipeline(ITERATIVE)
    assert [step.name for step in steps] == ["rm-0", "label-1", "rm-1", "label-2", "rm-2", "dpo"]
    assert [step.stage for step in steps] == ["rm", "label", "rm", "label", "rm", "dpo"]
    assert [step.expect is not None for step in steps] == [False, False, True, False, True, False]
    for number, (labelled, learned) in enumerate((steps[1:3], steps[3:5]), start=1):
        recipe = load_recipe(labelled.recipe, "label", labelled.overrides).recipe
        assert (recipe.model.from_, recipe.label.seed) == (f"grpo-{number - 1}", number)
        recipe = load_recipe(learned.recipe, "rm", learned.overrides).recipe
        new, old = recipe.data.sources
        assert (recipe.model.from_, new.from_, new.path, recipe.data.path) == (
            f"rm-{number - 1}",
            f"label-{number}",
            None,
            None,
        )
        assert (old.path, old.weight, old.templates) == ("old.jsonl", 0.1, {"prompt": f"{{title}}: {number}"})


def test_a_pipeline_without_rounds_keeps_its_braces(pipeline: Callable[[str], list[PipelineCommand]]) -> None:
    [step] = pipeline('stages: [{stage: sft, recipe: sft.yaml, set: {data.system: "{round} {previous}"}}]')
    assert step.overrides == ("data.system='{round} {previous}'",)


BLOCK = "stages:\n- rounds: {rounds}\n  stages: {stages}\n"
STEP = "{stage: sft, recipe: sft.yaml, name: 'sft-{round}'}"


@pytest.mark.parametrize(
    ("rounds", "stages", "problem"),
    [
        ("0", f"[{STEP}]", "p.yaml:2:11: stages.0.rounds: expected a whole number from 1 to 1000, found 0"),
        ("true", f"[{STEP}]", "p.yaml:2:11: stages.0.rounds: expected a whole number from 1 to 1000, found true"),
        ("'2'", f"[{STEP}]", "p.yaml:2:11: stages.0.rounds: expected a whole number from 1 to 1000, found '2'"),
        ("100000000", f"[{STEP}]", "stages.0.rounds: expected a whole number from 1 to 1000"),
        ("2", "[]", "p.yaml:3:3: stages.0.stages: expected a list of stages, found []"),
        ("2", "[sft]", "stages.0.stages: expected a list of stages"),
        (
            "2",
            "[{stage: sft, recipe: sft.yaml}]",
            "stages.0.stages.0.name: expected a name with {round} in it, found noth",
        ),
        (
            "1",
            "[{stage: sft, recipe: sft.yaml, name: a}]",
            "stages.0.stages.0.name: expected a name with {round} in it",
        ),
        ("2", f"[{{rounds: 2, stages: [{STEP}]}}]", "stages.0.stages.0: expected a stage, found rounds inside rounds"),
        ("2", f"[{STEP}]\n  name: x", "p.yaml:2:3: stages.0: expected rounds and stages, found name too"),
        ("2", f"[{STEP}, {STEP}]", "stages: expected a different name for every stage, found sft-1, sft-2 more than"),
        (
            "2",
            "[{stage: stf, recipe: sft.yaml, name: 'a-{round}'}]",
            "p.yaml:3:20: stages.0.stages.0.stage: expected one of",
        ),
        (
            "2",
            "[{stage: sft, recipe: x.yaml, name: 'a-{round}'}]",
            "p.yaml:3:33: stages.0.stages.0.recipe: expected a recip",
        ),
        (
            "2",
            "[{stage: sft, recipe: sft.yaml, name: 'a-{round}', nam: b}]",
            "stages.0.stages.0.nam: expected a known key",
        ),
    ],
)
def test_mistakes_are_told_once_at_their_place_in_the_file(
    pipeline: Callable[[str], list[PipelineCommand]], rounds: str, stages: str, problem: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        pipeline(BLOCK.replace("{rounds}", rounds).replace("{stages}", stages))
    assert problem in str(caught.value)
    assert str(caught.value).count("p.yaml:") == 1


def test_steps_behind_rounds_have_their_own_places(pipeline: Callable[[str], list[PipelineCommand]]) -> None:
    text = f"stages:\n- rounds: 3\n  stages: [{STEP}]\n- {{stage: rm, recipe: rn.yaml}}\n- {{stage: dpo, recipes: x}}\n"
    with pytest.raises(RecipeError) as caught:
        pipeline(text)
    assert [line.partition(": expected")[0] for line in str(caught.value).splitlines() if line[0] != " "] == [
        "p.yaml:5:3: stages.2.recipe",
        "p.yaml:5:16: stages.2.recipes",
    ]
    with pytest.raises(RecipeError, match=r"p.yaml:4:23: stages.1.recipe: expected a recipe, found nothing at rn.yaml"):
        pipeline(text.replace("recipes: x", "recipe: dpo.yaml"))
