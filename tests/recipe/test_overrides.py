"""`--set`: what it reaches, what it creates, what it replaces."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf.recipe.load import LoadedRecipe

BASE = "model: {from: sft}\ndata: {path: x}\n"


@pytest.mark.parametrize(
    ("stage", "text", "key", "value"),
    [
        ("sft", "train.lr=1e-6", "train.lr", 1e-6),
        ("sft", " train.lr = 3 ", "train.lr", 3.0),
        ("sft", "train.steps=1e3", "train.steps", 1000),
        ("sft", "train.betas=[0.5, 0.6]", "train.betas", (0.5, 0.6)),
        ("sft", "log.tensorboard=true", "log.tensorboard", True),
        ("sft", "log.wandb=2024", "log.wandb", "2024"),
        ("sft", "log.wandb=a=b", "log.wandb", "a=b"),
        ("sft", "log.wandb='no'", "log.wandb", "no"),
        ("sft", "log.wandb=", "log.wandb", None),
        ("sft", "log.wandb=null", "log.wandb", None),
        ("sft", "log.wandb=true", "log.wandb", "true"),
        ("sft", "data.columns.prompt=123", "data.columns", {"prompt": "123"}),
        ("sft", 'sampling.stop=["a", "1"]', "sampling.stop", ["a", "1"]),
        ("sft", "model.lora.rank=4", "model.lora.rank", 4),
        ("sft", "model.lora={}", "model.lora.rank", 16),
        ("dpo", "loss.beta=0.05", "loss.beta", 0.05),
        ("dpo", "loss.name=cdpo", "loss.label_smoothing", 0.1),
        ("ppo", "critic.zero.stage=3", "critic.zero.stage", 3),
        ("ppo", "rewards.0.weight=2", "rewards.0.from", "rm"),
        ("ppo", "rewards=[{kind: format}]", "rewards.0.kind", "format"),
        ("ppo", "rewards.1.kind=format", "rewards.1.weight", 1.0),
        ("grpo", "advantage.eps=0.1", "advantage.name", "grpo"),
    ],
)
def test_set(stage: str, text: str, key: str, value: object, load: Callable[..., LoadedRecipe]) -> None:
    loaded = load(BASE, stage, text)
    found = loaded.recipe.model_dump(by_alias=True)
    for part in key.split("."):
        found = found[int(part) if part.isdigit() else part]
    assert found == value
    assert loaded.notices == ()
    assert loaded.overrides == (text,)


def test_the_last_of_several_wins(load: Callable[..., LoadedRecipe]) -> None:
    assert load(BASE, "sft", "train.lr=1", "train.lr=2").recipe.train.lr == 2
    assert load(BASE, "sft", "train.lr=abc", "train.lr=2").recipe.train.lr == 2
    changed = load(BASE, "dpo", "loss.beta=1", "loss={name: cdpo, beta: 2}", "loss.label_smoothing=0.2").recipe.loss
    assert (changed.name, changed.beta, changed.label_smoothing) == ("cdpo", 2, 0.2)


def test_the_file_is_not_asked_about_what_is_set(load: Callable[..., LoadedRecipe]) -> None:
    assert load(BASE + "train: {lr: abc}", "sft", "train.lr=2").recipe.train.lr == 2


def test_items_of_a_list_are_reached(load: Callable[..., LoadedRecipe]) -> None:
    text = BASE + "rewards: [{kind: exact}, {kind: format, weight: 0.5}]"
    rewards = load(text, "grpo", "rewards.1.weight=3", "rewards.2={kind: length}").recipe.rewards
    assert [(r.kind, r.weight) for r in rewards] == [("exact", 1.0), ("format", 3.0), ("length", 1.0)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=abc", "--set train.lr=abc: train.lr: expected a number > 0, found 'abc'"),
        ("train.lr=", "--set train.lr=: train.lr: expected a number > 0, found nothing"),
        ("train.lr=-0x", "--set train.lr=-0x: train.lr: expected a number > 0, found '-0x'"),
        ("train.lrr=1", "--set train.lrr=1: train.lrr: expected a known key, found 'lrr'\n  did you mean train.lr?"),
        ("trian.lr=1", "--set trian.lr=1: trian: expected a known key, found 'trian'\n  did you mean train?"),
        ("lr=1", "--set lr=1: lr: expected a known key, found 'lr'\n  did you mean train.lr?"),
        ("train.lr.x=1", "--set train.lr.x=1: train.lr: expected a number > 0, found"),
        ("model.from.x=1", "--set model.from.x=1: model.from.x: expected model.from to be a block, found 'sft'"),
        (
            "data.sources.1.path=x",
            "--set data.sources.1.path=x: data.sources.1: expected an index from 0 to 0, found 1",
        ),
        ("data.sources.².path=x", "data.sources.²: expected an index from 0 to 0, found ²"),
        (f"data.sources.{'9' * 5000}.path=x", ": expected an index from 0 to 0, found 999"),
        ("data.sources.x.path=x", "data.sources.x: expected an index from 0 to 0, found x"),
        (
            "train.betas=[1",
            "--set train.betas=[1: train.betas: expected valid YAML, found an error while parsing a flow",
        ),
        ("train={lr: 1, lr: 2}", "--set train={lr: 1, lr: 2}: train.lr: expected every key once"),
        ("train={lr: x}", "--set train={lr: x}: train.lr: expected a number > 0, found 'x'"),
        ("train=!!python/name:x", "train: expected plain YAML, found the tag !!python/name:x"),
        ("train.lr", "--set train.lr: expected KEY=VALUE such as train.lr=1e-6, found 'train.lr'"),
        ("=1", "--set =1: expected KEY=VALUE"),
        ("train..lr=1", "--set train..lr=1: expected KEY=VALUE"),
        ("", "--set : expected KEY=VALUE"),
    ],
)
def test_refused(text: str, expected: str, refuse: Callable[..., list[str]]) -> None:
    [problem] = refuse(BASE, "sft", text)
    assert expected in problem
    assert problem.startswith("--set ")


def test_file_and_command_line_problems_come_together(refuse: Callable[..., list[str]]) -> None:
    problems = refuse(BASE + "train: {eps: 0}", "sft", "train.lr=x", "train.steps=y")
    assert [p.partition(": ")[0] for p in problems] == ["r.yaml:3:14", "--set train.lr=x", "--set train.steps=y"]


@pytest.mark.parametrize(
    ("file", "text", "replaced"),
    [
        (BASE, "model.path=hub/x", "model.from of r.yaml:1:15"),
        (BASE, "model.init={}", "model.from of r.yaml:1:15"),
        (BASE, "model.init.layers=2", "model.from of r.yaml:1:15"),
        ("model:\n  init:\n    layers: 2\ndata: {path: x}", "model.path=a", "model.init of r.yaml:2:3"),
        (BASE, "data.sources=[{path: y}]", "data.path of r.yaml:2:14"),
        ("model: {from: a}\ndata:\n  sources: [{path: y}]", "data.path=z", "data.sources of r.yaml:3:3"),
        ("model: {from: a}\ndata: {path: x, eval_rows: 9}", "data.eval.path=z", "data.eval_rows of r.yaml:2:28"),
    ],
)
def test_an_alternative_replaces_the_one_in_the_file(
    file: str, text: str, replaced: str, load: Callable[..., LoadedRecipe]
) -> None:
    assert load(file, "sft", text).notices == (f"--set {text} replaces {replaced}",)


def test_alternatives_of_other_roles(load: Callable[..., LoadedRecipe]) -> None:
    roles = "critic: {from: rm}\nreference: {from: sft}\nrewards: [{kind: model, from: rm}]\n"
    changes = ("critic.path=a", "reference.path=b", "rewards.0.path=c")
    loaded = load(BASE + roles, "ppo", *changes)
    recipe = loaded.recipe
    assert [role.path for role in (recipe.critic, recipe.reference, recipe.rewards[0])] == ["a", "b", "c"]
    assert [role.from_ for role in (recipe.critic, recipe.reference, recipe.rewards[0])] == [None, None, None]
    assert len(loaded.notices) == 3
    assert load(BASE, "ppo", "critic.path=a").recipe.critic.from_ is None


def test_emptying_an_alternative_replaces_nothing(load: Callable[..., LoadedRecipe]) -> None:
    assert load(BASE, "sft", "model.path=null", "model.init=null", "data.sources=[]", "data.eval_rows=0").notices == ()
    assert load(BASE, "sft", "model.from=null", "model.path=x").recipe.model.path == "x"


def test_two_alternatives_on_the_command_line_contradict(refuse: Callable[..., list[str]]) -> None:
    [problem] = refuse(BASE, "sft", "model.path=x", "model.init={}")
    assert problem.startswith(
        "--set model.path=x: model: expected exactly one of from, path and init, found path and init"
    )


def test_a_revision_belongs_to_a_path(refuse: Callable[..., list[str]]) -> None:
    [problem] = refuse("model: {from: sft, revision: v1}\ndata: {path: x}", "sft")
    assert problem.startswith("r.yaml:1:30: model.revision: expected path beside it, found none")


def test_what_a_file_says_about_a_replaced_value_goes_with_it(load: Callable[..., LoadedRecipe]) -> None:
    hub = "model: {path: hub/x, revision: v1}\ndata: {path: hub/rows, name: main, split: test, columns: {prompt: q}}"
    loaded = load(hub, "sft", "model.from=sft", "data.path=rows.jsonl")
    assert (loaded.recipe.model.path, loaded.recipe.model.revision) == (None, None)
    assert (loaded.recipe.data.name, loaded.recipe.data.split) == (None, "train")
    assert loaded.recipe.data.columns == {"prompt": "q"}
    assert len(loaded.notices) == 4
    kept = load(hub, "sft", "data.path=other/rows", "data.name=small")
    assert (kept.recipe.data.name, kept.recipe.data.split) == ("small", "train")


def test_text_that_reads_like_a_number_too_large_is_text(load: Callable[..., LoadedRecipe]) -> None:
    revision = "1234567890" * 4
    assert load(BASE, "sft", "model.path=x", f"model.revision={revision}").recipe.model.revision == revision
