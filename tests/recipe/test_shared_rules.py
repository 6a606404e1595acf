"""What `share_base` asks of the rest of the recipe: each rule broken once, and recipes that break none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf.recipe.load import LoadedRecipe

SHARED = "model: {from: sft, lora: {}}\ndata: {path: x}\nshare_base: true\n"
BF16 = "model: {from: sft, lora: {}, dtype: bf16}\ndata: {path: x}\nshare_base: true\nzero: {stage: 2}\n"

# (stages, recipe, overrides, key that is blamed, what the message holds, remedy)
BROKEN = [
    (
        "ppo grpo",
        "model: {from: sft}\ndata: {path: x}\nshare_base: true\n",
        (),
        "share_base",
        "expected model.lora beside it, found none",
        "add model.lora",
    ),
    (
        "ppo grpo",
        "model: {init: {}, lora: {}}\ndata: {path: x}\nshare_base: true\n",
        (),
        "model.init",
        "found one from scratch",
        "{from: sft}",
    ),
    ("ppo", SHARED, ("critic.zero.stage=2",), "critic.zero.stage", "expected 0 as zero.stage has it, found 2", "both"),
    ("ppo", SHARED, ("zero.stage=1",), "critic.zero.stage", "expected 1 as zero.stage has it, found 0", "both"),
    (
        "ppo",
        SHARED + "zero: {stage: 3}\n",
        ("critic.zero={stage: 3, persistence_threshold: 0}",),
        "critic.zero.persistence_threshold",
        "expected 100000 as zero.persistence_threshold has it, found 0",
        "both",
    ),
    ("ppo grpo", SHARED, ("reference.from=dpo",), "reference", "expected the policy's start, found dpo", "remove it"),
    ("ppo grpo", SHARED, ("reference.zero.stage=3",), "reference.zero", "a block of its own", "as `zero` says"),
    ("ppo grpo", SHARED, ("rewards.0.zero.stage=3",), "rewards.0.zero", "a block of its own", "as `zero` says"),
    ("ppo grpo", SHARED, ("rewards.0.dtype=bf16",), "rewards.0.dtype", "expected fp32 as model.dtype", "one type"),
    ("grpo", BF16, (), "rewards.0.dtype", "expected bf16 as model.dtype has it, found fp32", "one type"),
]


@pytest.mark.parametrize(("stages", "text", "changes", "key", "what", "fix"), BROKEN)
def test_a_broken_rule_is_told(
    stages: str, text: str, changes: tuple[str, ...], key: str, what: str, fix: str, refuse: Callable[..., list[str]]
) -> None:
    for stage in stages.split():
        [problem] = refuse(text, stage, *changes)
        head, _, hint = problem.partition("\n  ")
        assert f": {key}: expected " in head and what in head and fix in hint, problem


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_what_is_allowed(stage: str, load: Callable[..., LoadedRecipe]) -> None:
    load(SHARED, stage, "reference.from=sft", "model.gradient_checkpointing=true")
    critic = ["critic.zero={stage: 2, offload_optimizer: true}"] if stage == "ppo" else []
    load(BF16, stage, "rewards.0.dtype=bf16", *critic)
    load(SHARED, stage, "rewards=[{kind: exact}]")
    load(SHARED.replace("true", "false"), stage, "reference.from=dpo", "rewards.0.zero.stage=3")
