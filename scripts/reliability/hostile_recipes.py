"""Recipes that are no recipes, contradict themselves, or list what cannot be run; pipelines with mistakes."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from typing import Any

import yaml

from rlhf.recipe.document import to_yaml
from rlhf.recipe.fields import options
from rlhf.recipe.stages import RECIPES, PipelineStep
from scripts.reliability.broken_recipes import Broken, Values, minimal, misspelt


def hostile(stage: str, draw: random.Random) -> Iterator[Broken]:
    """Texts that are no recipes, or more than one should read."""
    good = to_yaml(minimal(stage))
    end = len(good.splitlines()) + 1

    def text(kind: str, added: str, says: str, *, line: int | None = end) -> Broken:
        place = rf"^r\.yaml:{line}:\d+: .*" if line else r"^r\.yaml: .*"
        return Broken(kind, stage, (good + added).encode("utf-8", "surrogatepass"), says=(place + says,))

    bomb = "".join(f"{c}: &{c} [{', '.join(['*' + b] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True))
    pad = draw.randrange(1, 5)
    yield text("tabs", "log:\n\tsamples: 1\n", "valid YAML", line=end + 1)
    yield text("anchors bomb", f"a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n{bomb}", "more than 5,000 values")
    yield text("alias bound", "x: &x [*x]\n", "nested too deeply")
    yield text("unknown alias", f"x: {'[' * pad}*nobody\n", "undefined alias")
    for tag in (
        "!!python/object:os.system {}",
        "!!python/object/apply:os.system [id]",
        "!!python/name:os.system ''",
        "!!binary aGk=",
        "!!set {a}",
        "!mine 3",
        "!!timestamp 2001-01-01",
    ):
        yield text("tag", f"x: {tag}\n", "found the tag")
    yield text("deep", "x: " + "[" * 10_000, "nested too deeply")
    yield text("deep", "x: " + "{a: " * 10_000, "nested too deeply")
    yield text("deep block", "".join(f"{' ' * i}a:\n" for i in range(600)), "nested too deeply", line=end + 30)
    yield text("many values", f"x: [{'1, ' * 60_000}1]\n", "more than 5,000 values")
    yield text("many lines", "x:\n" + "- 1\n" * 40_000, "more than 5,000 values", line=end + 4_999 - values_in(good))
    yield text("control character", f"x: a{chr(draw.choice((0, 7, 11, 27, 127)))}\n", "control character")
    yield text("surrogate", 'x: "\\ud800"\n', "expected !!str")
    yield text("huge escape", 'x: "\\UFFFFFFFF"\n', "valid YAML")
    yield text("huge number", f"x: {'9' * draw.choice((20, 400, 5000))}\n", "64 bits")
    yield text("huge number", f"x: 0x{'f' * draw.choice((17, 400, 5000))}\n", "64 bits")
    yield text("cut", 'x: "abc\n', "valid YAML", line=end + 1)
    yield text("cut", "x: {a: [1, 2\n", "valid YAML", line=end + 1)
    yield text("directive", "%YAML 9.9\n---\nx: 1\n", "valid YAML")
    yield text("two documents", "---\nx: 1\n", "valid YAML")
    yield text("no text as key", "? [a, b]\n: 1\n", "text as a key")
    yield text("no text as key", "3: 1\n", "text as a key")
    yield text("no text as key", "~: 1\n", "text as a key")
    yield text("long key", f"? {'k' * 100_000}\n: 1\n", "expected a known key")
    yield text("dots in a key", "log.every: 1\n", "expected a known key")
    whole = [
        ("empty", b"", "an empty file"),
        ("empty", b"# only a comment\n\n", "an empty file"),
        ("empty", b"\xef\xbb\xbf", "an empty file"),
        ("10 MB", good.encode() + b"# more\n" * 1_500_000, "more than 256 KiB"),
    ]
    for kind, content, says in whole:
        yield Broken(kind, stage, content, says=(rf"^r\.yaml: expected .*{says}",))
    first = [
        ("list root", b"- a\n- b\n", "found a list"),
        ("scalar root", b"just text\n", "found a single value"),
        ("scalar root", b"3\n", "found a single value"),
        ("UTF-16", good.encode("utf-16"), "found UTF-16"),
        ("UTF-16", good.encode("utf-16-le"), "control character"),
        ("UTF-32", good.encode("utf-32-be"), "control character"),
        ("binary", bytes(range(128, 256)) * 8, "not UTF-8"),
        ("zip", b"PK\x03\x04\x14\0\0\0", "control character"),
        ("null root", b"null\n", "an empty file"),
    ]
    for kind, content, says in first:
        yield Broken(kind, stage, content, says=(rf"^r\.yaml(:1:\d+)?: .*{says}",))
    latin = good.encode() + b"log: {wandb: caf\xe9}\n"
    yield Broken("Latin-1", stage, latin, says=(rf"^r\.yaml:{end}:17: .*0xe9",))
    yield Broken("BOM", stage, b"\xef\xbb\xbf" + good.encode())
    yield Broken("CRLF", stage, good.replace("\n", "\r\n").encode())
    many = good + "".join(f"zz{i}: 1\n" for i in range(2000))
    yield Broken(
        "2,000 mistakes", stage, many.encode(), says=(rf"^r\.yaml:{end}:1: zz0: ", r"^\.\.\. and [\d,]+ more problems$")
    )


def values_in(text: str) -> int:
    """How many values a YAML text holds, keys and blocks counted too."""
    starts = (yaml.ScalarEvent, yaml.MappingStartEvent, yaml.SequenceStartEvent)
    return sum(isinstance(event, starts) for event in yaml.parse(text))


# Rules between keys: (stages, what is added to the minimal recipe, the key that is named, devices).
CONFLICTS: tuple[tuple[str, Values, str, int | None], ...] = (
    ("sft rm dpo ppo grpo label", {"model": {"from": "sft", "lora": {"target": []}}}, "model.lora.target", None),
    ("sft rm dpo ppo grpo label", {"model": {"from": "sft", "path": "x"}}, "model", None),
    ("sft rm dpo ppo grpo label", {"model": {}}, "model", None),
    ("sft rm", {"model": {"init": {"hidden": 30, "heads": 4}}}, "model.init.heads", None),
    ("sft rm", {"model": {"init": {"hidden": 12, "heads": 4}}}, "model.init.heads", None),
    ("sft rm", {"model": {"init": {"heads": 4, "kv_heads": 3}}}, "model.init.kv_heads", None),
    ("sft rm", {"model": {"init": {"context": 64}}}, "data.max_length|model.init.context", None),
    ("sft rm dpo ppo grpo", {"model": {"from": "sft", "dtype": "bf16"}}, "zero.stage|model.dtype", None),
    ("sft rm dpo ppo grpo", {"model": {"from": "sft", "attention": "flash_attention_2"}}, "model.attention", None),
    ("sft rm dpo ppo grpo label", {"model": {"from": "sft", "chat_template": "chatlm"}}, "model.chat_template", None),
    ("sft rm dpo ppo grpo label", {"model": {"from": "sft", "revision": "main"}}, "model.revision|model.from", None),
    ("sft rm dpo ppo grpo", {"zero": {"offload_optimizer": True}}, "zero.offload_optimizer", None),
    ("sft rm dpo ppo grpo", {"zero": {"stage": 2, "offload_params": True}}, "zero.offload_params", None),
    ("rm dpo ppo grpo", {"model": {"from": "sft", "dropout": True}}, "model.dropout", None),
    ("rm dpo ppo grpo", {"model": {"from": "sft", "lora": {"dropout": 0.1}}}, "model.lora.dropout", None),
    ("dpo", {"model": {"init": {}}}, "model.init", None),
    ("sft rm dpo ppo grpo label", {"data": {"path": "x", "from": "label"}}, "data", None),
    ("sft rm dpo ppo grpo label", {"data": {}}, "data", None),
    ("sft rm dpo ppo grpo", {"data": {"path": "x", "eval": {"path": "y"}, "eval_rows": 3}}, "data", None),
    ("sft rm dpo", {"eval": {"every": 5}}, "eval.every", None),
    ("sft rm dpo ppo grpo label", {"data": {"path": "x", "part": "3/2"}}, "data.part", None),
    ("sft rm dpo ppo grpo label", {"data": {"path": "x", "part": "1/" + "9" * 5000}}, "data.part", None),
    ("sft rm dpo ppo grpo label", {"data": {"path": "x", "templates": {"prompt": "{"}}}, "data.templates.prompt", None),
    ("sft rm dpo ppo grpo label", {"data": {"path": "x", "max_prompt_length": 4000}}, "data.max_prompt_length", None),
    ("sft ppo grpo label", {"data": {"path": "x", "filter": {"drop_equal": True}}}, "data.filter.drop_equal", None),
    ("rm dpo", {"data": {"path": "x", "filter": {"min_margin": 2, "max_margin": 1}}}, "data.filter.max_margin", None),
    ("sft rm dpo", {"train": {"batch_size": 7}}, "train.batch_size", 2),
    ("ppo grpo", {"train": {"prompts": 7}}, "train.prompts|train.minibatches", 2),
    ("ppo grpo", {"train": {"prompts": 8, "answers": 2, "minibatches": 5}}, "train.minibatches", None),
    ("grpo", {"train": {"answers": 1}}, "train.answers", None),
    ("ppo grpo label", {"sampling": {"max_new_tokens": 4000}}, "sampling.max_new_tokens", None),
    ("ppo grpo label", {"sampling": {"stop": ["a", ""]}}, "sampling.stop.1", None),
    ("ppo grpo", {"rewards": []}, "rewards", None),
    ("ppo grpo label", {"rewards": [{"kind": "length"}, {"kind": "length"}]}, "rewards.1", None),
    ("ppo grpo label", {"rewards": [{"kind": "format", "pattern": "("}]}, "rewards.0.pattern", None),
    ("ppo grpo label", {"rewards": [{"kind": "format", "pattern": "(" * 5000}]}, "rewards.0.pattern", None),
    ("ppo grpo label", {"rewards": [{"kind": "function", "function": "x"}]}, "rewards.0.function", None),
    ("ppo grpo label", {"rewards": [{"kind": "http", "url": "file:///etc/passwd"}]}, "rewards.0.url", None),
    ("ppo grpo label", {"rewards": [{"kind": "http", "url": "http://u:p@h/"}]}, "rewards.0.url", None),
    ("ppo grpo label", {"rewards": [{"kind": "http", "url": "http://[::1/"}]}, "rewards.0.url", None),
    ("ppo grpo label", {"rewards": [{"kind": "model", "from": "rm", "path": "x"}]}, "rewards.0", None),
    ("ppo grpo label", {"rewards": [{"kind": "model"}]}, "rewards.0", None),
    ("ppo grpo", {"test_rewards": [{"kind": "model", "from": "rm"}]}, "test_rewards.0|rewards.0", None),
    ("ppo", {"critic": {"from": "rm", "path": "x"}}, "critic", None),
    ("ppo grpo", {"share_base": True}, "share_base", None),
    ("ppo grpo", {"reference": {"zero": {"stage": 1}}}, "reference.zero.stage", None),
    ("ppo grpo", {"kl": {"placement": "loss", "estimator": "k1", "coef": 0.1}}, "kl.estimator", None),
    ("ppo grpo", {"kl": {"controller": {"name": "adaptive", "horizon": 1}}}, "kl.controller.horizon", None),
    ("label", {"judge": {"kind": "http"}}, "judge.*|rewards", None),
    ("label", {"rewards": []}, "rewards", None),
    ("merge", {"models": []}, "models", None),
    ("merge", {"base": {}}, "base", None),
    ("merge", {"models": [{"from": "dpo", "weight": 0}]}, "models.*", None),
)


def conflicts(stage: str, draw: random.Random) -> Iterator[Broken]:
    """Values that are fine alone and not together."""
    for stages, added, key, devices in CONFLICTS:
        if stage in stages.split():
            values = copy.deepcopy(minimal(stage)) | copy.deepcopy(added)
            named = "|".join(re.escape(part).replace(r"\*", ".*") for part in key.split("|"))
            place = rf"^r\.yaml:\d+:\d+: ({named}): expected "
            yield Broken("conflict", stage, to_yaml(values).encode(), says=(place,), devices=devices)


def pipelines(draw: random.Random) -> Iterator[Broken]:
    """Pipeline files with every mistake of their own."""
    step: Values = {"stage": "sft", "recipe": "good.yaml"}
    cases: list[tuple[Any, str]] = [
        ({}, "stages"),
        ({"stages": []}, "stages"),
        ({"stages": "x"}, "stages"),
        ({"stages": [3]}, "stages.0"),
        ({"stages": [step, step]}, "stages"),
        ({"stages": [{**step, "recipe": "a\0b"}]}, "stages.0.recipe"),
        ({"stages": [{**step, "recipe": "x" * 300}]}, "stages.0.recipe"),
        ({"stages": [{**step, "recipe": ""}]}, "stages.0.recipe"),
        ({"stages": [{**step, "recipe": "god.yaml"}]}, "stages.0.recipe"),
        ({"stages": [{**step, "set": 3}]}, "stages.0.set"),
        ({"stages": [{**step, "expect": {"metric": "x", "direction": "up", "by": 1}}]}, "stages.0.expect.direction"),
        ({"stages": [{**step, "expect": {"metric": "x", "direction": "falls", "by": -1}}]}, "stages.0.expect.by"),
        ({"stages": [{"rounds": 0, "stages": [step]}]}, "stages.0.rounds"),
        ({"stages": [{"rounds": True, "stages": [step]}]}, "stages.0.rounds"),
        ({"stages": [{"rounds": 10**9, "stages": [step]}]}, "stages.0.rounds"),
        ({"stages": [{"rounds": 2, "stages": [step]}]}, "stages.0.stages.0.name"),
        ({"stages": [{"rounds": 2, "stages": []}]}, "stages.0.stages"),
        ({"stages": [{"rounds": 2, "stages": [{"rounds": 2, "stages": [step]}]}]}, "stages.0.stages.0"),
        ({"stages": [{"rounds": 2, "stage": "sft", "stages": [{**step, "name": "a{round}"}]}]}, "stages.0"),
        (
            {"stages": [{"rounds": 1000, "stages": [{**step, "name": f"a{i}-{{round}}"} for i in range(300)]}]},
            "stages.0.rounds",
        ),
    ]
    for name in options(PipelineStep):
        cases.append(({"stages": [{**step, misspelt(name, draw): 1}]}, "stages.0.*"))
    for stage in RECIPES:
        cases.append(({"stages": [{**step, "stage": stage + "x"}]}, "stages.0.stage"))
    for values, key in cases:
        named = re.escape(key).replace(r"\*", ".*")
        yield Broken("pipeline", "run", to_yaml(values).encode(), says=(rf"^r\.yaml:\d+:\d+: {named}: expected ",))
