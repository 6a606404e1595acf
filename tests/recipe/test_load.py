"""Loading: the form of every message, all problems at once, dump and load again."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import DataError, RecipeError
from rlhf.recipe.load import LoadedRecipe, dump_recipe, load_pipeline, load_recipe
from rlhf.recipe.problems import Problem
from rlhf.recipe.stages import RECIPES, PipelineStep

BAD = """\
model:
  frm: sft
  dtype: fp64
  init: {hidden: 130, heads: 4}
data:
  path: x
  max_lenght: 3
train:
  lr: abc
  prompts: 5
  epochs: 2
kl_coef: 0.1
rewards:
  - kind: modle
"""


def test_a_minimal_recipe_loads_with_every_default(load: Callable[..., LoadedRecipe]) -> None:
    loaded = load(stage="ppo")
    assert loaded.recipe.model.from_ == "sft"
    assert loaded.recipe.critic.from_ == "rm"
    assert loaded.recipe.rewards[0].from_ == "rm"
    assert (loaded.path, loaded.stage, loaded.overrides, loaded.notices) == ("r.yaml", "ppo", (), ())
    assert loaded.raw_text == Path("r.yaml").read_text()
    assert loaded.place("model.from") == "r.yaml:1:15"
    assert loaded.place("train.lr") == "r.yaml:1:1"


def test_every_problem_is_told_at_once_in_the_order_of_the_file(refuse: Callable[..., list[str]]) -> None:
    assert refuse(BAD, "ppo", "train.minibatches=2", "sampling.top_p=2", world_size=2) == [
        "r.yaml:2:3: model.frm: expected a known key, found 'frm'\n  did you mean model.from?",
        "r.yaml:3:10: model.dtype: expected one of fp32, bf16, found 'fp64'\n"
        "  dtype: compute type; bf16 keeps fp32 master weights (ZeRO >= 1) (default fp32)",
        "r.yaml:4:30: model.init.heads: expected a divisor of hidden = 130, found 4\n"
        "  one of 1, 2, 5, 10, 13, 26, 65, 130",
        "r.yaml:7:3: data.max_lenght: expected a known key, found 'max_lenght'\n"
        "  did you mean data.max_length or data.max_prompt_length?",
        "r.yaml:9:7: train.lr: expected a number > 0, found 'abc'\n"
        "  lr: peak learning rate of the policy (default 1e-06)",
        "r.yaml:10:12: train.prompts: expected a multiple of the 2 devices, found 5\n  for example 4",
        "r.yaml:11:3: train.epochs: expected a known key, found 'epochs'\n"
        "  did you mean train.inner_epochs or train.eps?",
        "r.yaml:12:1: kl_coef: expected a known key, found 'kl_coef'\n  did you mean kl.coef?",
        "r.yaml:14:11: rewards.0.kind: expected one of model, exact, numeric, format, length, function,"
        " process, http, demo_gold, found 'modle'\n"
        "  did you mean model?",
        "--set train.minibatches=2: train.minibatches: expected a divisor of prompts x answers = 5 x 1 = 5, found 2\n"
        "  one of 1, 5",
        "--set sampling.top_p=2: sampling.top_p: expected a number > 0 and <= 1, found 2\n"
        "  top_p: sample from the smallest set of tokens with this probability; 1: off (default 1.0)",
    ]


@pytest.mark.parametrize(
    ("stage", "line", "expected"),
    [
        ("sft", "train: 3", "r.yaml:3:8: train: expected a block of options, found 3"),
        ("sft", "train: [1]", "r.yaml:3:1: train: expected a block of options, found [1]"),
        ("sft", "train: {betas: [0.9]}", "r.yaml:3:9: train.betas: expected a list of 2 numbers >= 0 and < 1, found"),
        ("sft", "train: {betas: [1, 2, 3]}", "r.yaml:3:9: train.betas: expected a list of 2 numbers"),
        ("sft", "train: {betas: [0.9, x]}", "r.yaml:3:22: train.betas.1: expected a number >= 0 and < 1, found 'x'"),
        ("sft", "train: {lr: .inf}", "r.yaml:3:13: train.lr: expected a number > 0, found .inf"),
        ("sft", "train: {lr: true}", "r.yaml:3:13: train.lr: expected a number > 0, found true"),
        ("sft", "train: {lr: '1e-5'}", "found '1e-5'\n  write the number without quotes"),
        ("sft", "train: {lr: }", "train.lr: expected a number > 0, found nothing"),
        ("sft", "train: {steps: 1.5}", "train.steps: expected a whole number >= 1, found 1.5"),
        ("sft", "train: {seed: -0x1}", "train.seed: expected a whole number >= 0 and <= 4294967295, found '-0x1'"),
        ("sft", "train: {schedule: cosin}", "one of cosine, linear, constant, found 'cosin'\n  did you mean cosine?"),
        ("sft", "zero: {stage: '3'}", "zero.stage: expected one of 0, 1, 2, 3, found '3'\n  did you mean 3?"),
        ("sft", "log: {tensorboard: yes}", "expected true or false, found 'yes'\n  write true"),
        ("sft", "log: {wandb: 1e5}", "log.wandb: expected text, found 1e5\n  put it in quotes to make it text"),
        ("sft", "sampling: {stop: x}", "sampling.stop: expected a list of text, found 'x'"),
        ("sft", "sampling: {stop: [a, 3]}", "r.yaml:3:22: sampling.stop.1: expected text, found 3"),
        ("sft", "Train: {}", "r.yaml:3:1: Train: expected a known key, found 'Train'\n  did you mean train?"),
        ("sft", "train: {batch-size: 3}", "did you mean train.batch_size?"),
        ("sft", "train: {learning_rat: 3}", "train.learning_rat: expected a known key"),
        ("sft", "learning_rate: 3", "did you mean train.lr"),
        ("sft", "lr: 3", "r.yaml:3:1: lr: expected a known key, found 'lr'\n  did you mean train.lr?"),
        (
            "sft",
            "train.lr: 3",
            "train.lr: expected a known key, found 'train.lr'\n  dots are for --set: write train: {lr: ...}",
        ),
        ("sft", "zzzzz: 3", "keys of this recipe: model, data, zero,"),
        ("sft", "from_: x", "from_: expected a known key"),
        (
            "dpo",
            "loss: cdpo",
            "r.yaml:3:7: loss: expected a block of options, found 'cdpo'\n  write loss: {name: cdpo}",
        ),
        ("dpo", "loss: {name: [1]}", "rrhf, pro, found [1]"),
        ("dpo", "loss: {label_smoothing: 0.1}", "found 'label_smoothing'\n  it is a key of loss.name: cdpo"),
        ("dpo", "loss: {name: sigmoid}", "rrhf, pro, found 'sigmoid'\n  did you mean simpo?"),
        ("ppo", "advantage: {name: grpo}", "advantage.name: expected gae, found grpo"),
        ("ppo", "rewards: []", "rewards: expected a list of blocks of options, at least 1, found []"),
        ("ppo", "rewards: [{weight: 2}]", "r.yaml:3:11: rewards.0.kind: expected one of model, exact,"),
        ("ppo", "rewards: [{kind: function}]", "r.yaml:3:11: rewards.0.function: expected text, found nothing"),
        ("ppo", "rewards: {kind: exact}", "rewards: expected a list of blocks of options, at least 1, found"),
        ("ppo", "rewards: [{kind: model, from: rm, zero: {stge: 0}}]", "did you mean rewards.0.zero.stage?"),
        ("grpo", "train: {answers: 1}", "r.yaml:3:18: train.answers: expected at least 2 for advantage grpo, found 1"),
    ],
)
def test_message(stage: str, line: str, expected: str, refuse: Callable[..., list[str]]) -> None:
    [problem] = refuse(f"model: {{from: sft}}\ndata: {{path: x}}\n{line}\n", stage)
    assert expected in problem
    assert problem.startswith("r.yaml:3:")
    assert "pydantic" not in problem and "errors." not in problem


def test_lora_targets_are_one_problem(refuse: Callable[..., list[str]]) -> None:
    [problem] = refuse("model:\n  from: x\n  lora: {target: [1, 2]}\ndata: {path: x}")
    assert problem.startswith("r.yaml:3:10: model.lora.target: expected text or a list of text, found [1, 2]")


def test_missing_blocks_point_at_the_parent(refuse: Callable[..., list[str]]) -> None:
    assert refuse("train: {lr: 1e-5}\n") == [
        "r.yaml:1:1: model: expected a block of options, found nothing\n  model: the model to train",
        "r.yaml:1:1: data: expected a block of options, found nothing\n"
        "  data: what to learn from, or the prompts to answer",
    ]


def test_other_problems_are_still_told_when_a_required_block_is_wrong(refuse: Callable[..., list[str]]) -> None:
    problems = refuse("model: 3\ntrain: {prompts: 5, minibatches: 2}\n", "ppo")
    assert [p.partition(": expected")[0] for p in problems] == [
        "r.yaml:1:1: data",
        "r.yaml:1:8: model",
        "r.yaml:2:34: train.minibatches",
    ]


@pytest.mark.parametrize(
    ("block", "place", "found"),
    [
        ("model: {from: a, path: b}\ndata: {path: x}", "r.yaml:1:1: model", "from and path"),
        ("model: {dtype: fp32}\ndata: {path: x}", "r.yaml:1:1: model", "none of them"),
        ("model: {from: a}\ndata:\n  path: x\n  sources: [{path: y}]", "r.yaml:2:1: data", "path and sources"),
        ("model: {from: a}\ndata: {path: x, from: label}", "r.yaml:2:1: data", "from and path"),
        ("model: {from: a}\ndata: {limit: 3}", "r.yaml:2:1: data", "none of them"),
    ],
)
def test_exclusive_keys_are_told_at_their_block(
    block: str, place: str, found: str, refuse: Callable[..., list[str]]
) -> None:
    [problem] = refuse(block)
    assert problem.startswith(f"{place}: expected exactly one of ")
    assert problem.endswith(f", found {found}")


def test_what_only_follows_from_a_problem_is_not_told(refuse: Callable[..., list[str]]) -> None:
    assert len(refuse("model: {from: 3}\ndata: {paht: x}")) == 2
    assert len(refuse("model: {from: a}\ndata: {path: x}\ntrain: {prompts: x, minibatches: 7}", "ppo")) == 1


def test_yaml_problems_and_schema_problems_come_together(refuse: Callable[..., list[str]]) -> None:
    problems = refuse("model: {from: a}\ndata: {path: !!python/name:x , limit: 0}\ntrain: {lr: 1, lr: 2, stepz: 3}")
    assert [p.partition(": expected")[0] for p in problems] == [
        "r.yaml:2:14: data.path",
        "r.yaml:2:39: data.limit",
        "r.yaml:3:16: train.lr",
        "r.yaml:3:23: train.stepz",
    ]


def test_keys_cannot_drive_the_terminal(refuse: Callable[..., list[str]]) -> None:
    assert "\x1b" not in "".join(refuse('model: {from: a}\ndata: {path: x}\n"\\e[31m": "\\e[0m"'))


@pytest.mark.parametrize("stage", RECIPES)
def test_dumped_recipes_load_equal(stage: str, load: Callable[..., LoadedRecipe]) -> None:
    changes = ['data.templates={prompt: "a: {b} # c"}', "log.wandb=1e5"]
    changes += ["rewards=[{kind: length}]"] if stage == "label" else ["train.lr=3e-7", "train.betas=[0.8, 0.99]"]
    text = "model: {path: '007', revision: '1e5'}\ndata: {path: 'no'}\n"
    if stage == "merge":
        text = "base: {path: '007', revision: '1e5'}\nmodels: [{path: 'no', weight: 1}]\n"
        changes = ["method={name: ties, density: 3e-7}", "models.0.weight=1e5"]
    first = load(text, stage, *changes)
    text = dump_recipe(first.recipe)
    again = load(text, stage)
    assert again.recipe == first.recipe
    assert dump_recipe(again.recipe) == text
    assert "from_" not in text and "from: null" in text


def test_later_problems_get_places_too(load: Callable[..., LoadedRecipe]) -> None:
    loaded = load("model: {from: sft}\ndata: {path: x}\ntrain: {batch_size: 6}")
    with pytest.raises(RecipeError, match=r"^r.yaml:3:21: train.batch_size: expected a multiple of the 4 devices"):
        loaded.check_devices(4)
    loaded.check_devices(3)
    assert str(loaded.error([Problem("model.from", "expected a policy, found a value")])) == (
        "r.yaml:1:15: model.from: expected a policy, found a value"
    )


def test_files_are_looked_for_from_the_current_directory(load: Callable[..., LoadedRecipe]) -> None:
    Path("rewards.py").write_text("")
    Path("rows.jsonl").write_text("")
    rewards = "rewards: [{kind: function, function: 'rewards.py:score'}]"
    load(f"model: {{from: sft, chat_template: chatml}}\ndata: {{path: rows.jsonl}}\n{rewards}", "grpo").check_files()
    load("model: {from: sft}\ndata: {path: Anthropic/hh-rlhf}").check_files()
    with pytest.raises(RecipeError) as caught:
        text = "model: {from: sft, chat_template: a.jinja}\ndata: {path: no.csv}\nrewards: "
        load(text + "[{kind: function, function: 'reward.py:score'}]", "grpo").check_files()
    assert str(caught.value).splitlines()[0].startswith("r.yaml:1:35: model.chat_template: expected a file, found noth")
    assert str(caught.value).splitlines()[2:] == [
        "r.yaml:3:38: rewards.0.function: expected a file, found nothing at reward.py",
        "  did you mean rewards.py?",
    ]
    with pytest.raises(DataError, match=r"r.yaml:2:14: data.path: .*at row.jsonl\n  did you mean rows.jsonl\?"):
        load("model: {from: sft}\ndata: {path: row.jsonl}").check_files()


PIPELINE = """\
stages:
- {stage: sft, recipe: sft.yaml, expect: {metric: train/loss, direction: falls, by: 0.1}}
- stage: ppo
  recipe: more/ppo.yaml
  name: ppo-kl0.02
  set: {kl.coef: 0.02, train.betas: [0.9, 0.99], log.wandb: "two words: #1", data.path: null}
"""


def test_a_pipeline_lists_its_commands(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "sft.yaml").write_text("model: {from: sft}\ndata: {path: x}\n")
    (tmp_path / "more/ppo.yaml").write_text("model: {from: sft}\ndata: {path: x}\n")
    first, second = load_pipeline(tmp_path / "p.yaml")
    assert first[:4] == ("sft", tmp_path / "sft.yaml", "sft", ())
    assert first.expect is not None and first.expect.direction == "falls" and second.expect is None
    assert second[:3] == ("ppo", tmp_path / "more/ppo.yaml", "ppo-kl0.02")
    overrides = second.overrides[:3]
    recipe = load_recipe(second.recipe, second.stage, overrides).recipe
    assert (recipe.kl.coef, recipe.train.betas, recipe.log.wandb) == (0.02, (0.9, 0.99), "two words: #1")
    assert second.overrides[3] == "data.path=null"


def test_pipeline_problems_have_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sft.yaml").write_text("")
    Path("p.yaml").write_text("stages:\n- {stage: sft, recipe: stf.yaml}\n- {stage: sft, recipe: sft.yaml}\n")
    with pytest.raises(RecipeError) as caught:
        load_pipeline("p.yaml")
    assert "p.yaml:1:1: stages: expected a different name for every stage, found sft more than" in str(caught.value)
    Path("p.yaml").write_text("stages:\n- {stage: stf, recipe: a.yaml}\n- {stage: rm, recipes: b.yaml}\nname: x\n")
    with pytest.raises(RecipeError) as caught:
        load_pipeline("p.yaml")
    assert [line.partition(": expected")[0] for line in str(caught.value).splitlines() if line[0] != " "] == [
        "p.yaml:2:11: stages.0.stage",
        "p.yaml:3:3: stages.1.recipe",
        "p.yaml:3:15: stages.1.recipes",
        "p.yaml:4:1: name",
    ]
    Path("p.yaml").write_text("stages: [{stage: sft, recipe: stf.yaml}]\n")
    with pytest.raises(
        RecipeError, match=r"p.yaml:1:31: stages.0.recipe: .*found nothing at stf.yaml\n.*mean sft.yaml"
    ):
        load_pipeline("p.yaml")


def test_pipelines_know_every_stage() -> None:
    assert set(PipelineStep.model_json_schema()["properties"]["stage"]["enum"]) == set(RECIPES)


def test_a_refusal_loads_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(BAD)
    code = f"""
import sys
from rlhf.errors import RecipeError
from rlhf.recipe.load import load_recipe
try:
    load_recipe({str(tmp_path / "r.yaml")!r}, "ppo")
except RecipeError as error:
    assert "model.frm" in str(error)
heavy = {{"torch", "transformers", "datasets", "deepspeed", "numpy", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
