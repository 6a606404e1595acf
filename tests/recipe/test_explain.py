"""`rlhf explain`, the JSON Schema and the batch arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.explain import describe_batch, explain, json_schema, offline_steps
from rlhf.recipe.fields import options, walk
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.schema import Block, TrainBlock
from rlhf.recipe.stages import RECIPES

BASE = "model: {from: sft}\ndata: {path: x}\n"


def test_the_end_of_a_key_finds_it_everywhere() -> None:
    assert explain("lr") == (
        "train.lr  (rlhf sft, rm)\n  peak learning rate\n  a number > 0, default 1e-05\n\n"
        "train.lr  (rlhf ppo, grpo)\n  peak learning rate of the policy\n  a number > 0, default 1e-06\n\n"
        "critic.lr  (rlhf ppo)\n  peak learning rate of the critic\n  a number > 0, default 1e-05\n\n"
        "train.lr  (rlhf dpo)\n  peak learning rate\n  a number > 0, default 1e-06\n\n"
        "critic.lr  (rlhf dpo)\n  peak learning rate of the value model\n  a number > 0, default 1e-05"
    )
    assert explain("lr", "sft") == "train.lr  (rlhf sft)\n  peak learning rate\n  a number > 0, default 1e-05"
    assert "critic.lr" not in explain("train.lr")


def test_choices_and_where_a_key_belongs() -> None:
    assert "one of cosine, linear, constant, default cosine" in explain("schedule", "sft")
    assert explain("label_smoothing", "dpo").startswith(
        "loss.label_smoothing with loss.name=cdpo or robust_dpo  (rlhf dpo)\n"
    )
    assert explain("rewards.3.function", "ppo").endswith("\n  text, required")


def test_a_block_lists_its_keys() -> None:
    text = explain("kl", "grpo")
    assert text.splitlines()[0] == "kl  (rlhf grpo)"
    assert (
        "coef        weight of the per-token KL penalty; where a controller starts; a number >= 0, default 0.04" in text
    )
    choice = explain("loss", "dpo")
    assert "loss.name is one of:" in choice and "keys with name: cdpo" in choice
    assert "rewards.0.kind is one of:" in explain("rewards", "ppo")


@pytest.mark.parametrize("stage", RECIPES)
def test_every_key_is_explained_and_described(stage: str) -> None:
    for key, _, option in walk(RECIPES[stage]):
        assert explain(key, stage).startswith(key)
        assert option.description or key.rpartition(".")[2] in ("name", "kind"), key
        assert not option.description.endswith("."), key


@pytest.mark.parametrize(
    ("key", "stage", "expected"),
    [
        ("trian.lr", None, "found 'trian.lr'\n  did you mean train.lr or train.l1?"),
        ("lrr", None, "did you mean train.lr?"),
        ("learning_rate", "ppo", "did you mean train.lr, "),
        ("critic.lr", "sft", "did you mean train.lr?"),
        ("qqqq", None, "`rlhf explain train` lists a block"),
        ("lr", "stf", "stage: expected one of sft, rm, ppo, grpo, dpo, label, merge, found 'stf'"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest(key: str, stage: str | None, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        explain(key, stage)
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2


def blocks(node: Any) -> Iterator[dict[str, Any]]:
    """Every object of a JSON Schema that has properties."""
    if isinstance(node, dict):
        if "properties" in node:
            yield node
        for inner in node.values():
            yield from blocks(inner)
    elif isinstance(node, list):
        for inner in node:
            yield from blocks(inner)


@pytest.mark.parametrize("stage", RECIPES)
def test_json_schema_is_closed_and_speaks_yaml_names(stage: str) -> None:
    schema = json_schema(stage)
    text = json.dumps(schema)
    assert "from_" not in text and "oneOf" not in text and "discriminator" not in text
    assert schema["required"] == (["base", "models"] if stage == "merge" else ["model", "data"])
    assert set(schema["properties"]) == set(options(RECIPES[stage]))
    for block in blocks(schema):
        assert block["additionalProperties"] is False
        for name, field in block["properties"].items():
            assert "description" in field or "$ref" in field or name in ("name", "kind"), name


def test_every_block_has_a_docstring_of_its_own() -> None:
    def below(block: type[Block]) -> Iterator[type[Block]]:
        for child in block.__subclasses__():
            yield child
            yield from below(child)

    for block in below(Block):
        assert block.__dict__.get("__doc__"), block.__name__


def test_online_batches(load: Callable[..., LoadedRecipe]) -> None:
    train = "train: {prompts: 64, answers: 4, minibatches: 2, inner_epochs: 2, micro_batch: 8, rollouts: 100}"
    assert describe_batch(load(BASE + train, "ppo").recipe, 2) == [
        "64 prompts x 4 answers = 256 rows per rollout -> 2 minibatches of 128"
        " -> at least 8 micro-batches of up to 8 rows and 8,192 tokens on each of 2 devices",
        "2 minibatches x 2 inner epochs = 4 optimizer steps per rollout, 100 rollouts = 400 steps",
    ]
    train = "train: {prompts: 1, answers: 10, rollouts: 1}"
    assert describe_batch(load(BASE + train, "grpo").recipe, 1) == [
        "1 prompt x 10 answers = 10 rows per rollout -> 1 minibatch of 10"
        " -> micro-batches of up to 8,192 tokens on 1 device",
        "1 minibatch = 1 optimizer step per rollout, 1 rollout = 1 step",
    ]


def test_offline_batches(load: Callable[..., LoadedRecipe]) -> None:
    recipe = load(BASE + "train: {batch_size: 64, epochs: 2}").recipe
    first = "64 rows per optimizer step -> micro-batches of up to 8,192 tokens on each of 2 devices"
    assert describe_batch(recipe, 2) == [first, "2 epochs over the data"]
    assert describe_batch(recipe, 2, 1000) == [first, "1,000 rows x 2 epochs / 64 -> 32 optimizer steps"]
    recipe = load(BASE + "train: {batch_size: 4, steps: 20, micro_batch: 8, micro_tokens: 1000}", "dpo").recipe
    first = "4 rows per optimizer step -> at least 1 micro-batch of up to 4 rows and 1,000 tokens on 1 device"
    assert describe_batch(recipe, 1) == [first, "20 steps x 4 rows"]
    assert describe_batch(recipe, 1, 160) == [first, "20 steps x 4 rows = 0.5 epochs of 160 rows"]
    recipe = load(BASE + "train: {batch_size: 4, steps: 20, micro_batch: auto}", "dpo").recipe
    assert "as many tokens as fit into memory, measured in the first step, on 1 device" in describe_batch(recipe, 1)[0]


def test_offline_steps_cover_the_epochs() -> None:
    def steps(rows: int, epochs: float, batch_size: int) -> int:
        return offline_steps(TrainBlock(epochs=epochs, batch_size=batch_size), rows)

    assert [steps(64, 1, 64), steps(65, 1, 64), steps(3, 1, 64), steps(100, 0.1, 10)] == [1, 2, 1, 1]
    assert steps(10, 0.3, 3) == 1
    assert steps(1000, 1.1, 100) == 11
    assert offline_steps(TrainBlock(steps=7), 10**6) == 7
