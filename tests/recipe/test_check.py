"""Rules across fields: each one broken once, with its place and its remedy, and a recipe that breaks none."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from rlhf.recipe import check
from rlhf.recipe.check import DEVICE_RULES, RULES, check_recipe, looks_local
from rlhf.recipe.judge_rules import JUDGE_RULES
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.policy_rules import POLICY_RULES
from rlhf.recipe.preference_rules import PREFERENCE_RULES
from rlhf.recipe.stages import RECIPES

BASE = "model: {from: sft}\ndata: {path: x}\n"
MERGE = "base: {from: a}\nmodels: [{from: b, weight: 1}, {from: c, weight: 1}]\n"
INIT = "model: {init: {hidden: 96, heads: 4}}\ndata: {path: x}\n"

# (stages, recipe, overrides, key that is blamed, what the message holds, remedy)
BROKEN = [
    ("sft rm ppo grpo", INIT, "model.init.heads=5", "model.init.heads", "divisor of hidden = 96", "1, 2, 3, 4"),
    ("sft", INIT, "model.init.heads=32", "model.init.heads", "even size per head, found 96 / 32 = 3", "change"),
    ("sft", INIT, "model.init.kv_heads=3", "model.init.kv_heads", "a divisor of heads = 4, found 3", "one of 1, 2, 4"),
    ("sft", INIT, "model.init.context=64", "data.max_length", "at most model.init.context = 64, found 1024", "raise"),
    ("dpo", INIT, "", "model.init", "the reference would be random", "{from: sft}"),
    ("sft dpo", BASE, "model.revision=v1", "model.revision", "expected path beside it", "hub ids"),
    ("ppo", BASE, "critic.from=null", "critic", "expected one of from and path, found neither", "from: STAGE"),
    ("ppo grpo", BASE + "rewards: [{kind: model}]", "", "rewards.0", "found neither", "path: HUB_ID"),
    ("ppo grpo", BASE + "rewards: [{kind: model, from: a, path: b}]", "", "rewards.0", "found both", "remove one"),
    ("dpo ppo grpo", BASE + "reference: {from: a, path: b}", "", "reference", "found both", "remove one"),
    ("ppo", BASE + "critic: {from: a, path: b}", "", "critic", "found both", "remove one"),
    ("sft", BASE, "model.chat_template=chatlm", "model.chat_template", "found 'chatlm'", "did you mean chatml?"),
    ("sft", BASE, "model.chat_template=my.txt", "model.chat_template", "found 'my.txt'", "must end in .jinja"),
    ("sft", BASE, "model.attention=flash_attention_2", "model.attention", "with dtype fp32", "model.dtype to bf16"),
    ("sft", BASE, "model.lora.target=[]", "model.lora.target", "found nothing", "remove the key"),
    ("rm dpo ppo grpo", BASE, "model.dropout=true", "model.dropout", "expected false, found true", "only sft"),
    ("rm dpo ppo grpo", BASE, "model.lora.dropout=0.1", "model.lora.dropout", "expected 0, found 0.1", "only sft"),
    ("sft rm ppo grpo dpo", BASE + "critic: {zero: {stage: 1}}\n", "model.dtype=bf16", "zero.stage", "found 0", "to 1"),
    ("ppo", BASE + "zero: {stage: 1}\n", "model.dtype=bf16", "critic.zero.stage", "expected 1, 2 or 3 with", "to 1"),
    ("sft", BASE, "zero.offload_optimizer=true", "zero.offload_optimizer", "false at stage 0", "raise zero.stage"),
    ("sft", BASE + "zero: {stage: 2}", "zero.offload_params=true", "zero.offload_params", "false at stage 2", "to 3"),
    ("ppo", BASE, "critic.zero.offload_params=true", "critic.zero.offload_params", "false at stage 0", "to 3"),
    ("dpo ppo grpo", BASE, "reference.zero.stage=2", "reference.zero.stage", "0 or 3 for a frozen model, found 2", ""),
    ("ppo grpo", BASE, "rewards.0.zero.stage=1", "rewards.0.zero.stage", "0 or 3 for a frozen model, found 1", "shard"),
    ("dpo", BASE + "reference: {zero: {stage: 3}}", "reference.zero.offload_optimizer=true",
     "reference.zero.offload_optimizer", "false for a frozen model", "remove it"),
    ("grpo", BASE, "rewards.0.zero.offload_params=true", "rewards.0.zero.offload_params", "false at stage 0", "to 3"),
    ("sft", "model: {from: a}\ndata: {sources: [{path: x}], limit: 5}", "", "data.limit", "each of data.sources", ""),
    ("sft", "model: {from: a}\ndata: {sources: [{path: x}, {weight: 2}]}", "", "data.sources.1.path", "nothing", ""),
    ("sft dpo", BASE, "data.part=3/2", "data.part", "at most 2/2, found 3/2", "count from 1"),
    ("sft", BASE, "data.eval.split=test", "data.eval.path", "expected text, found nothing", "write path"),
    ("sft", BASE + "#", "data.templates.prompt='Review: {title'", "data.templates.prompt", "expected '}'", "{{"),
    ("sft", BASE + "#", "data.templates.prompt='Review: {}'", "data.templates.prompt", "{} without a column", "{{"),
    ("sft dpo", BASE, "data.max_prompt_length=1024", "data.max_prompt_length", "than data.max_length = 1024", ""),
    ("ppo grpo", BASE, "sampling.max_new_tokens=1024", "sampling.max_new_tokens", "max_length = 1024", "raise data."),
    ("sft rm dpo", BASE, "eval.every=5", "eval.every", "0 without held-out rows, found 5", "data.eval_rows"),
    ("sft ppo grpo", BASE, "data.filter.min_margin=1", "data.filter.min_margin", "no pairs are learned", "remove"),
    ("sft grpo", BASE, "data.filter={drop_conflicts: true}", "data.filter.drop_conflicts", "found it set", "remove"),
    ("sft ppo", BASE, "data.reweight={}", "data.reweight", "where no pairs are learned from", "remove the key"),
    ("ppo", BASE, "pretraining={data: {path: x, filter: {drop_equal: true}}}", "pretraining.data.filter.drop_equal",
     "where no pairs are learned from", "remove the key"),
    ("rm dpo", BASE, "data.filter={min_margin: 2, max_margin: 1}", "data.filter.max_margin", "min_margin = 2", ""),
    ("sft rm", BASE, "data.filter.drop_eval_overlap=rows", "data.filter.drop_eval_overlap", "none without held-out",
     "data.eval_rows"),
    ("sft dpo ppo grpo", BASE, 'sampling.stop=["a", ""]', "sampling.stop.1", "found empty text", "remove it"),
    ("grpo", BASE, "rewards=[{kind: format, pattern: '('}]", "rewards.0.pattern", "'(' (missing )", "quotes"),
    ("grpo", BASE, "rewards=[{kind: function, function: a.py}]", "rewards.0.function", "file.py:name", "my_rewards.py"),
    ("grpo", BASE, "rewards=[{kind: function, function: 'a.txt:f'}]", "rewards.0.function", "'a.txt:f'", "example"),
    ("sft", INIT, "train.l1=0.1", "train.l1", "for a model from scratch, found 0.1", "remove it"),
    ("sft", BASE + "train: {l1: 0.1}", "model.lora.rank=4", "train.l1", "expected 0 with adapters, found 0.1", "ties"),
    ("merge", MERGE.replace("{from: a", "{from: a, path: x"), "", "base", "of from and path, found both", "remove one"),
    ("merge", MERGE, "models.1.revision=v1", "models.1.revision", "expected path beside it", "hub ids"),
    ("merge", MERGE, "models.1.from=a", "models.1.from", "models, found a as base.from too", "remove one"),
    ("merge", MERGE, "models.1.from=b", "models.1.from", "models, found b as models.0.from too", "remove one"),
    ("merge", MERGE.replace("1", "0"), "", "models.0.weight", "a weight above 0, found none", "0.5 each"),
    ("merge", MERGE[:-2] + ", {from: d, weight: 1}]", "method.name=slerp", "models", "2 models for slerp, found 3", ""),
    ("ppo grpo", BASE, "train.minibatches=7", "train.minibatches", "a divisor of prompts x answers =", "one of 1, 2"),
]  # fmt: skip

DEVICES = [
    ("sft rm dpo", "train.batch_size=7", "train.batch_size", "a multiple of the 2 devices, found 7", "for example 6"),
    ("sft", "train.batch_size=1", "train.batch_size", "a multiple of the 2 devices, found 1", "for example 2"),
    ("ppo grpo", "train.prompts=30", "train.prompts", "a multiple of the 4 devices, found 30", "for example 28"),
    (
        "ppo",
        "train.minibatches=32",
        "train.minibatches",
        "of a multiple of 4 rows, one share per device, found 2",
        "64 rows",
    ),
]


def rules() -> set[str]:
    """The names of all rules."""
    named = {rule.__name__ for table in (RULES, DEVICE_RULES) for row in table.values() for rule in row}
    assert len(named) >= 15
    return named


@pytest.mark.parametrize(("stages", "text", "change", "key", "what", "fix"), BROKEN)
def test_a_broken_rule_is_told_with_its_place_and_remedy(
    stages: str, text: str, change: str, key: str, what: str, fix: str, refuse: Callable[..., list[str]]
) -> None:
    for stage in stages.split():
        kept = "\n".join(row for row in text.splitlines() if not (row.startswith("critic") and stage != "ppo"))
        [problem] = refuse(kept, stage, *([change] if change else []))
        head, _, hint = problem.partition("\n  ")
        place, _, message = head.partition(f": {key}: ")
        assert place == f"--set {change}" if change else place.startswith("r.yaml:"), problem
        assert message.startswith("expected ") and what in message and ", found " in message
        assert fix in hint


@pytest.mark.parametrize(("stages", "change", "key", "what", "fix"), DEVICES)
def test_batches_that_devices_cannot_share(
    stages: str,
    change: str,
    key: str,
    what: str,
    fix: str,
    refuse: Callable[..., list[str]],
    load: Callable[..., object],
) -> None:
    devices = 4 if "4" in what else 2
    for stage in stages.split():
        [problem] = refuse(BASE, stage, change, world_size=devices)
        assert problem.startswith(f"--set {change}: {key}: expected ") and what in problem and fix in problem
        load(BASE, stage, change, world_size=1)
        load(BASE, stage, change)


def test_merging_is_one_process(refuse: Callable[..., list[str]], load: Callable[..., object]) -> None:
    [problem] = refuse(MERGE, "merge", world_size=2)
    assert problem.startswith("r.yaml:1:1: expected one process, found 2\n") and "leave out --gpus" in problem
    load(MERGE, "merge", world_size=1)


@pytest.mark.parametrize("stage", RECIPES)
def test_the_defaults_break_no_rule(stage: str, load: Callable[..., LoadedRecipe]) -> None:
    needed = ["rewards=[{kind: length}]"] if stage == "label" else []
    if stage == "merge":
        assert check_recipe(stage, load(MERGE, stage).recipe, 1) == []
        return
    for devices in (None, 1, 2, 4, 8, 16):
        assert check_recipe(stage, load(BASE, stage, *needed).recipe, devices) == []
    if stage not in ("dpo", "label"):
        load("model: {init: {}}\ndata: {path: x}", stage, world_size=8)


def test_what_is_allowed_stays_allowed(load: Callable[..., LoadedRecipe]) -> None:
    load(INIT, "sft", "model.lora={}", "model.dropout=true", "model.lora.dropout=0.1")
    load(INIT, "dpo", "reference.from=sft")
    load(BASE, "ppo", "reference.zero.stage=3", "reference.zero.offload_params=true", "rewards.0.zero.stage=3")
    load(
        BASE,
        "sft",
        "zero.stage=1",
        "model.dtype=bf16",
        "model.attention=flash_attention_2",
        "eval.every=1",
        "data.eval_rows=9",
    )
    load(BASE, "ppo", "train.prompts=6", "train.minibatches=3", world_size=2)
    load("model: {from: a}\ndata: {sources: [{path: x, limit: 3, templates: {prompt: '{a} {{b}}'}}]}")


def test_all_broken_rules_come_together(refuse: Callable[..., list[str]]) -> None:
    text = "model: {from: sft, dropout: true, dtype: bf16}\ndata:\n  path: x\n  max_length: 64\ntrain: {prompts: 3}\n"
    problems = refuse(text, "ppo", world_size=2)
    assert [problem.partition(": expected")[0] for problem in problems] == [
        "r.yaml:1:29: model.dropout",
        "r.yaml:1:42: zero.stage",
        "r.yaml:1:42: critic.zero.stage",
        "r.yaml:4:15: sampling.max_new_tokens",
        "r.yaml:5:18: train.minibatches",
        "r.yaml:5:18: train.prompts",
    ]


def test_every_rule_is_documented_and_in_use() -> None:
    helpers = {"check_recipe", "one_source", "revision", "trained_zero", "frozen_zero", "looks_local"}
    helpers |= {"missing_files", "missing_data", "closest", "named_rewards", "sources", "merged_models"}
    helpers |= {"best_of_a_metric"}  # of any stage that learns, in its own file
    functions = {name for name, f in inspect.getmembers(check, inspect.isfunction) if not name.startswith("_")}
    elsewhere = {rule.__name__ for rule in (*POLICY_RULES, *PREFERENCE_RULES, *JUDGE_RULES)}
    assert functions - helpers - {"dataclass"} == rules() - elsewhere
    assert all(getattr(check, name).__doc__ for name in functions)


def test_local_paths_are_told_from_hub_ids(load: Callable[..., LoadedRecipe]) -> None:
    assert all(map(looks_local, ("./a", "/a/b", "~/a", "a.jsonl", "a/b.json.gz", "../x", "a.parquet")))
    assert not any(map(looks_local, ("Anthropic/hh-rlhf", "openai/gsm8k", "demo")))
