"""Metrics that a recipe may name: those of docs/metrics.md, stage by stage, and none of another stage."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.check import check_recipe
from rlhf.recipe.load import load_recipe
from rlhf.recipe.metric_names import metric_names
from rlhf.recipe.stages import RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
SECTIONS = {"sft": "sft", "rm": "rm", "dpo": "dpo", "ppo": "ppo and grpo", "grpo": "ppo and grpo"}


def documented(title: str) -> set[str]:
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([a-z_/0-9*]+)`", cell)}


@pytest.mark.parametrize("stage", SECTIONS)
def test_they_are_those_of_the_page(stage):
    wanted = documented("Every stage") | documented(SECTIONS[stage])
    of_ppo = {name for name in wanted if name.startswith("value/")} if stage == "grpo" else set()
    assert metric_names(stage) == wanted - of_ppo - {"step", "time"}


def problems(stage: str, metric: str, **blocks) -> list[tuple[str, str]]:
    best = {"metric": metric, "larger_is_better": False}
    base = {"model": {"from": "sft"}, "data": {"path": "x", "eval_rows": 8}, "checkpoint": {"keep_best": best}}
    recipe = RECIPES[stage].model_validate({**base, **blocks})
    found = [problem for problem in check_recipe(stage, recipe) if problem.key != "data.eval_rows"]
    return [(problem.key, f"{problem.what}; {problem.fix}") for problem in found]


EVERY = {"eval": {"every": 5}}


@pytest.mark.parametrize(
    ("stage", "metric"),
    [("sft", "eval/loss"), ("dpo", "eval/loss_sft"), ("rm", "eval/accuracy"), ("dpo", "coupling/z0")],
)
def test_metrics_of_the_stage_are_taken(stage, metric):
    assert not problems(stage, metric, **EVERY)


@pytest.mark.parametrize("metric", ["reward/score_mean", "reward/model_2", "test/http_11", "policy/entropy"])
def test_metrics_of_rollouts_are_taken(metric):
    data = {"path": "x"}
    assert not problems("grpo", metric, data=data)


@pytest.mark.parametrize(
    ("stage", "metric", "blocks", "key", "words"),
    [
        ("sft", "eval/los", EVERY, "checkpoint.keep_best.metric", "a metric of sft, found 'eval/los'; did you mean"),
        ("grpo", "value/loss", {}, "checkpoint.keep_best.metric", "a metric of grpo, found 'value/loss'"),
        ("ppo", "reward/model_1", {}, "checkpoint.keep_best.metric", "found 'reward/model_1'"),
        ("rm", "eval/loss", {"data": {"path": "x"}}, "checkpoint.keep_best.metric", "without held-out rows"),
        ("rm", "eval/loss", {}, "eval.every", "at least 1 for the best of several steps, found 0"),
    ],
)
def test_what_no_row_will_have_is_refused(stage, metric, blocks, key, words):
    blocks = {"data": {"path": "x"}, **blocks} if stage in ("ppo", "grpo") else blocks
    [(where, said)] = problems(stage, metric, **blocks)
    assert where == key and words in said


def test_it_is_said_of_the_place_in_the_file(tmp_path):
    text = "model: {from: sft}\ndata: {path: x}\ncheckpoint: {keep_best: {metric: los, larger_is_better: false}}\n"
    (tmp_path / "sft.yaml").write_text(text)
    with pytest.raises(RecipeError, match="sft.yaml:3:.*keep_best.metric"):
        load_recipe(tmp_path / "sft.yaml", "sft", [])
