"""Every named choice and every option of the on-policy stages, through the command line, in full and with LoRA.

A case names what differs from the tiny recipe of tests/conftest.py. The last tests fail where a registered name, an
option, or a value of an option that has a few is in no case.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf.algo.advantages import ADVANTAGES
from rlhf.algo.aggregation import AGGREGATIONS
from rlhf.algo.controllers import KL_CONTROLLERS
from rlhf.algo.kl import KL_ESTIMATORS
from rlhf.algo.policy import POLICY_LOSSES
from rlhf.algo.schedules import SCHEDULES
from rlhf.algo.value import VALUE_LOSSES
from rlhf.recipe.fields import options, shape_of, tags, walk
from rlhf.recipe.reward_options import Reward
from rlhf.recipe.stages import RECIPES

pytestmark = pytest.mark.pipeline
STAGES = ("ppo", "grpo")
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """What differs from the tiny recipe (DATA, RUN, CODE and URL stand for places), and what must have come of it."""

    stage: str
    values: dict[str, Any]
    check: Callable[[Rows], bool] = lambda rows: True
    kinds: tuple[str, ...] = ("full", "lora")


def every(name: str) -> Callable[[Rows], bool]:
    return lambda rows: all(name in row for row in rows)


def changes(name: str) -> Callable[[Rows], bool]:
    return lambda rows: rows[0][name] != rows[1][name]


ONE_UPDATE = {"inner_epochs": 1, "minibatches": 1}
KEPT = {"coef": 0.5, "data": {"path": "DATA/sft.jsonl", "max_length": 96}}
SUMS = {"path": "DATA/sums.jsonl", "columns": {"prompt": "question"}, "max_length": 96}
LENGTH = {"kind": "length", "target": 3, "scale": 6}
NO_KL_REWARD = {"kl.placement": "loss", "kl.estimator": "k3"}
SMALL = {"stage": 3, "persistence_threshold": 0, "bucket_size": 1000}

CASES = {
    # --- ppo
    "adaptive kl": Case(
        "ppo",
        {
            "advantage": {"name": "gae", "gamma": 0.99, "lam": 0.9},
            "kl": {
                "placement": "reward",
                "coef": 0.1,
                "estimator": "k1",
                "controller": {"name": "adaptive", "target": 2.0, "horizon": 100},
            },
            "value_loss": {"name": "ppo_value", "clip": 0.3},
            "whiten_rewards": True,
            "whiten_advantages": False,
        },
        changes("kl/coef"),
    ),
    "critic": Case(
        "ppo",
        {
            "critic": {
                "path": "RUN/sft/model",
                "lr": 1e-3,
                "optimizer": "sgd",
                "betas": [0.8, 0.9],
                "eps": 1e-6,
                "weight_decay": 0.1,
                "max_grad_norm": 0.5,
                "schedule": "linear",
                "warmup": 0.1,
                "min_lr_ratio": 0.5,
                "warmup_rollouts": 1,
            },
            "train.target_kl": 1e-9,
            "train.lr": 1e-2,
            "policy_loss": {"name": "ppo_dual_clip", "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0},
        },
        lambda rows: "policy/loss" not in rows[0] and "value/loss" in rows[0] and rows[1]["policy/updates"] == 2,
    ),
    "penalty": Case(
        "ppo",
        {
            "policy_loss": {"name": "ppo_penalty", "beta": 0.5, "target": 1e-9},
            "kl": {"placement": "loss", "estimator": "k2", "coef": 0.1, "controller": {"name": "fixed"}},
            "entropy_coef": 0.01,
            "train.lr": 1e-3,
        },
        lambda rows: rows[0]["policy/penalty_beta"] == 0.5 and rows[1]["policy/penalty_beta"] == 1.0,
    ),
    "pretraining and average": Case(
        "ppo", {"pretraining": KEPT, "ema": {"decay": 0.5}, "aggregation": "token_mean"}, every("ptx/loss")
    ),
    "scores": Case(
        "ppo",
        {
            "scores": {
                "normalise": "running",
                "clip": 2.0,
                "missing_eos_penalty": 0.5,
                "length_penalty": 0.01,
                "overlong_buffer": 4,
                "overlong_penalty": 0.5,
                "drop_unfinished": True,
            },
            "rewards": [{"kind": "model", "from": "rm", "weight": 0.5, "statistics": "normalise"}, LENGTH],
            "test_rewards": [{"kind": "model", "path": "RUN/rm/model", "statistics": "center"}],
            "train.prompts": 16,
            "sampling": {"max_new_tokens": 40, "stop": list("abcdefghijklmnop")},  # some answers end, some do not
        },
        every("test/score_mean"),
    ),
    "alarms": Case(
        "ppo",
        {
            "guards": {
                "kl_spike": {"threshold": 90.0, "on_alarm": "stop"},
                "entropy_collapse": {"threshold": 0.2, "on_alarm": "stop"},
                "eos_rate": {"threshold": 0.01, "on_alarm": "warn"},
                "length_drift": {"threshold": 1.0001, "on_alarm": "warn"},
                "flat_reward": {"rollouts": 1, "on_alarm": "stop"},
                "all_clipped": {"rollouts": 1, "on_alarm": "warn"},
                "explained_variance": {"rollouts": 1, "on_alarm": "warn"},
                "repeated_answers": {"threshold": 0.9, "on_alarm": "stop"},
            },
            "log": {
                "every": 1,
                "samples_every": 1,
                "samples": 2,
                "show_samples": False,
                "tensorboard": True,
            },
            "checkpoint": {"every": 1, "keep": 1},
        },
        lambda rows: any(name.startswith("alarm/") for row in rows for name in row),
    ),
    "sharded": Case(
        "ppo",
        {
            "zero": {"stage": 2, "offload_optimizer": False, "bucket_size": 1000},
            "critic.zero": {"stage": 3, "offload_params": False, "persistence_threshold": 0, "bucket_size": 1000},
            "reference.zero": SMALL,
            "reference.from": "sft",
            "rewards": [{"kind": "model", "from": "rm", "zero": SMALL}],
            "model.gradient_checkpointing": True,
        },
    ),
    "bf16": Case(
        "ppo",
        {
            "model.dtype": "bf16",
            "zero.stage": 1,
            "critic.zero.stage": 1,
            "rewards": [{"kind": "model", "from": "rm", "dtype": "bf16", "statistics": "none"}],
            "model.attention": "eager",
        },
    ),
    "shared base": Case(
        "ppo",
        {"share_base": True, "rewards": [{"kind": "model", "from": "rm-lora"}], "critic.from": "rm-lora"},
        kinds=("lora",),
    ),
    "optimizer": Case(
        "ppo",
        {
            "train.optimizer": "adamw",
            "train.betas": [0.8, 0.9],
            "train.eps": 1e-6,
            "train.weight_decay": 0.1,
            "train.max_grad_norm": 0.5,
            "train.schedule": "constant",
            "train.warmup": 0.2,
            "train.min_lr_ratio": 0.5,
            "train.seed": 7,
            "train.micro_batch": 3,
            "train.rollout_batch": 4,
            "data": {
                "sources": [
                    {"path": "DATA/prompts.jsonl", "weight": 2.0, "part": "1/2", "limit": 15, "system": "Be brief."},
                    {"path": "DATA/sums.jsonl", "templates": {"prompt": "{question}!"}, "format": "prompts"},
                ],
                "max_length": 96,
                "max_prompt_length": 80,
                "on_long": "truncate_prompt",
                "on_empty": "drop",
            },
        },
    ),
    # --- grpo: an estimator each
    "grpo": Case(
        "grpo",
        {
            "advantage": {"name": "grpo", "eps": 1e-3},
            "policy_loss": {"name": "ppo_clip", "clip_low": 0.1, "clip_high": 0.28},
            "kl": {"placement": "loss", "estimator": "k3", "coef": 0.1},
            "aggregation": "token_mean",
            "sampling": {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.95, "top_k": 50, "stop": ["the"]},
        },
    ),
    "grpo over the batch": Case(
        "grpo",
        {
            "advantage": {"name": "grpo_batch", "eps": 1e-3},
            "policy_loss": {"name": "gspo", "clip_low": 1e-3, "clip_high": 2e-3},
            "kl.estimator": "k2",
            "aggregation": "sequence_mean",
        },
    ),
    "refills": Case(
        "grpo",
        {
            "advantage": {"name": "dr_grpo"},
            "aggregation": "constant",
            "kl.estimator": "abs",
            "train.max_refills": 2,
            "train.answers": 2,
            "rewards": [{"kind": "format", "pattern": "[aeiou]", "weight": 2.0}],
        },
        every("rollout/groups_kept"),
    ),
    "steps": Case(
        "grpo",
        {
            "advantage": {"name": "process_grpo", "eps": 1e-3},
            "rewards": [
                {"kind": "process", "function": "CODE:steps", "weight": 0.5, "separator": "e", "timeout": 20.0}
            ],
            "train.rollouts": 2,
            "ema": {"decay": 0.0},
        },
        every("reward/process"),
    ),
    "rloo": Case(
        "grpo",
        {
            "advantage": {"name": "rloo"},
            "policy_loss": {"name": "rloo_clip", "clip_low": 0.1, "clip_high": 0.3},
            "rewards": [{"kind": "http", "url": "URL", "weight": 0.5, "timeout": 20.0, "retries": 1, "batch_size": 5}],
        },
        every("reward/http"),
    ),
    "reinforce": Case(
        "grpo",
        {
            "advantage": {"name": "reinforce", "decay": 0.5},
            "policy_loss": {"name": "reinforce"},
            "aggregation": "sequence_sum",
            "kl": {"placement": "reward", "estimator": "k1"},
            **{f"train.{name}": value for name, value in {**ONE_UPDATE, "answers": 1, "prompts": 16}.items()},
            "train.schedule": "linear",
            "train.optimizer": "sgd",
            "scores.missing_eos_score": -1.0,
            "sampling.max_new_tokens": 24,
        },
    ),
    "reinforce++": Case(
        "grpo",
        {
            "advantage": {"name": "reinforce_pp", "gamma": 0.9},
            "policy_loss": {"name": "cispo", "max_ratio": 2.0},
            "kl": {"placement": "reward", "estimator": "abs"},
            "whiten_rewards": True,
            "train.answers": 1,
            "train.prompts": 16,
            "rewards": [{"kind": "function", "function": "CODE:score", "weight": 0.5, "timeout": 20.0}],
        },
        lambda rows: all(row["reward/unscored"] > 0 for row in rows),
    ),
    "reinforce++ with a baseline": Case(
        "grpo",
        {
            "advantage": {"name": "reinforce_pp_baseline"},
            "policy_loss": {"name": "ppo_clip"},
            "train.schedule": "cosine",
            "data": SUMS,
            "rewards": [
                {"kind": "exact", "answer": "answer", "weight": 0.5},
                {"kind": "numeric", "answer": "answer", "marker": "###", "tolerance": 1e-3, "weight": 0.5},
                {**LENGTH, "weight": 0.5},
            ],
            "pretraining": {
                "coef": 0.1,
                "data": {
                    "sources": [
                        {"path": "DATA/words.jsonl", "format": "text", "prompt_words": 2},
                        {"path": "DATA/labelled.jsonl", "format": "labelled"},
                    ],
                    "max_length": 64,
                    "on_long": "truncate_answer",
                    "train_on": "last_answer",
                },
            },
        },
        every("ptx/loss"),
    ),
    "remax": Case(
        "grpo",
        {
            "advantage": {"name": "remax"},
            "policy_loss": {"name": "mdloo", "gamma": 0.5},
            "train.answers": 2,
            "whiten_advantages": True,
            "model.path": "RUN/sft/model",
            "model.from": None,
            "reference.path": "RUN/sft/model",
        },
        every("rollout/greedy_score"),
    ),
    "from scratch": Case(
        "grpo",
        {
            "model": {
                "init": {
                    "hidden": 32,
                    "layers": 1,
                    "heads": 2,
                    "kv_heads": 1,
                    "ffn": 48,
                    "vocab": 320,
                    "context": 160,
                    "tied": False,
                },
                "chat_template": "chatml",
                "attention": "sdpa",
            },
            "data": {"path": "DATA/prompts.jsonl", "max_length": 150},
            "rewards": [LENGTH, {"kind": "model", "from": "rm"}],  # which reads other tokens in another template
        },
        every("reward/model"),
    ),
}

RATHER = "covered where it belongs: "
NOT_HERE = {  # what has no case, as regular expressions over keys, and why
    r"(model|reference|critic|rewards\.0)\.revision|data\.(name|split|data_dir|revision)": "names of the hub",
    r"data\.pair_labels": "pairs are no prompts and no rows of a language model: tests/data/test_formats.py",
    r"data\.eval(_rows)?": "on-policy stages evaluate on nothing; held-out rows of other stages: tests/test_pipeline.py",
    r"model\.(lora\.|init\.)?dropout": "must stay off outside of sft: tests/recipe/test_check.py",
    r"log\.wandb": "an optional package and an account",
    r"zero\.offload_(optimizer|params)": "on a machine without accelerators there is no other memory",
}
NOT_THESE = {  # values of options with a few, and why
    ("model.attention", "flash_attention_2"): "a package for accelerators",
    ("model.attention", "flex_attention"): "compiles kernels",
    ("data.on_long", "error"): RATHER + "tests/data/test_limits.py",
    ("data.on_empty", "error"): RATHER + "tests/data/test_examples.py",
}


# --- running --------------------------------------------------------------------------------------------------------

CODE = """
def score(rows, answers):
    return [None if i % 3 == 0 else float(len(answer)) for i, answer in enumerate(answers)]


def steps(rows, steps):
    return [[float(len(step)) for step in each] for each in steps]
"""


class Judge(BaseHTTPRequestHandler):
    """A service that scores answers by their length."""

    def do_POST(self) -> None:  # noqa: N802  the library's name
        posted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"scores": [len(answer) for answer in posted["answers"]]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture(scope="module")
def places(cli, tiny, tmp_path_factory) -> Iterator[dict[str, str]]:
    """What the capital words stand for."""
    code = tmp_path_factory.mktemp("code") / "mine.py"
    code.write_text(CODE)
    numbers = [{"question": f"what is {n} + 1", "answer": f"### {n + 1}"} for n in range(20)]
    (tiny.data / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbers))
    words = [{"text": f"the plot was quite good {n} times and so was the music"} for n in range(20)]
    (tiny.data / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in words))
    labelled = [{"prompt": f"number {n}", "completion": f"it is {n}", "label": True} for n in range(20)]
    (tiny.data / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    done = cli(*tiny.command("rm", "--name", "rm-lora", "--set", "model.lora.rank=4"))
    assert done.code == 0, done.err
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/score"
        yield {"DATA": str(tiny.data), "RUN": str(tiny.root), "CODE": str(code), "URL": url}
        server.shutdown()


LORA = {"model.lora": {"rank": 4, "alpha": 8, "target": ["q_proj", "v_proj", "gate_proj"]}}
RUNS = [(name, kind) for name, case in CASES.items() for kind in case.kinds]


@pytest.mark.parametrize(("name", "kind"), RUNS)
def test_it_learns_for_two_rollouts(cli, tiny, places, name, kind):
    case = CASES[name]
    text = json.dumps({**case.values, **(LORA if kind == "lora" else {})})
    for word, place in places.items():
        text = text.replace(word, place)
    words = [w for key, value in json.loads(text).items() for w in ("--set", f"{key}={json.dumps(value)}")]
    code = ["--allow-code", places["CODE"]] if places["CODE"] in text else []
    folder = f"choice-{re.sub('[^a-z0-9]+', '-', name)}-{kind}"
    done = cli(*tiny.command(case.stage, "--name", folder, *words, *code))
    assert done.code == 0, done.err
    rows = tiny.rows(folder)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values()), row
    assert case.check(rows), rows
    published = AutoModelForCausalLM.from_pretrained(tiny.root / folder / "model")
    assert all(parameter.isfinite().all() for parameter in published.parameters())
    if "ema" in case.values:
        check_average(tiny.root / folder, case.values["ema"]["decay"])


def check_average(folder: Path, decay: float) -> None:
    """The average is published beside the policy, which it lags behind (not at all with a decay of 0)."""
    policy, average = (load_file(folder / part / "model.safetensors") for part in ("model", "ema"))
    assert policy.keys() == average.keys()
    gap = max(float((policy[key] - average[key]).abs().max()) for key in policy)
    assert gap < 1e-6 if decay == 0 else gap > 1e-6


# --- completeness -----------------------------------------------------------------------------------------------------


def recipe_of(values: dict[str, Any]) -> dict[str, Any]:
    """Overrides as a nested recipe."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *parents, last = key.split(".")
        place = nested
        for part in parents:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def given(values: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(normalised key, the choice that it belongs to or "", value) of everything written in a recipe."""
    if isinstance(values, dict):
        tag = next((f"{prefix}{name}={values[name]}" for name in ("name", "kind") if name in values), "")
        for name, value in values.items():
            yield normal(f"{prefix}{name}"), normal(tag), value
            yield from given(value, f"{prefix}{name}.")
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        for value in values:
            yield from given(value, f"{prefix}0.")


def normal(key: str) -> str:
    """The same options in another place count as one: sources of data, sharding, rewards that are only watched."""
    key = key.replace("test_rewards.0", "rewards.0")
    key = re.sub(r"^(pretraining\.)?data\.(sources\.0\.|eval\.)?", "data.", key)
    return re.sub(r"^(critic|reference|rewards\.0)\.zero\.", "zero.", key)


def alike(key: str) -> str:
    """Options with the same few values: one of an alarm or optimizer stands for the others."""
    key = re.sub(r"^guards\.\w+\.", "guards.", key)
    return re.sub(r"^critic\.(optimizer|schedule)$", r"train.\1", key)


def exercised() -> set[tuple[str, str, str]]:
    """(key, choice, value) of all cases; tests/conftest.py has what every case has."""
    found = set()
    for case in CASES.values():
        for kind in case.kinds:
            values = recipe_of({**case.values, **(LORA if kind == "lora" else {})})
            found |= {(key, tag, str(value)) for key, tag, value in given(values)}
    base = {"model": {"from": "sft"}, "data": {"path": ""}, "train": dict.fromkeys(("rollouts", "prompts", "lr"), 0)}
    return found | {(key, tag, str(value)) for key, tag, value in given(base)}


def leaves() -> Iterator[tuple[str, str, Any]]:
    """(normalised key, the choice that it belongs to or "", option) of everything that a recipe can say."""
    for stage in STAGES:
        for key, tag, option in walk(RECIPES[stage]):
            blocks = option.shape.blocks or (option.shape.item is not None and option.shape.item.blocks)
            if not blocks:
                yield normal(key), normal(tag), option


def is_left_out(key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in NOT_HERE)


def test_every_option_is_in_a_case():
    said = {(key, tag) for key, tag, _ in exercised()}
    keys = {key for key, _ in said}
    missing = set()
    for key, tag, option in leaves():
        inside = key.rpartition(".")[0] == tag.rpartition(".")[0] and tag  # an option of the choice itself
        covered = (key, tag) in said if inside else key in keys
        if not covered and not is_left_out(key) and option.name not in ("name", "kind"):
            missing.add(f"{key} ({tag})")
    assert not missing


def test_every_value_of_an_option_with_a_few_is_in_a_case():
    covered = {(alike(key), value) for key, _, value in exercised()} | set(NOT_THESE)
    few = {
        (alike(key), str(value))
        for key, _, option in leaves()
        for value in option.shape.allowed
        if len(option.shape.allowed) > 1 and not is_left_out(key) and value != option.default
    }
    missing = {(key, value) for key, value in few - covered if key != "data.format"}  # tests/data/test_formats.py
    assert not missing


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        ("advantage.name", ADVANTAGES),
        ("policy_loss.name", POLICY_LOSSES),
        ("aggregation", AGGREGATIONS),
        ("kl.estimator", KL_ESTIMATORS),
        ("kl.controller.name", KL_CONTROLLERS),
        ("value_loss.name", VALUE_LOSSES),
        ("train.schedule", SCHEDULES),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_every_registered_name_is_in_a_case(key, registry):
    assert set(registry.names()) == {value for each, _, value in exercised() if each == key}


def test_every_reward_is_in_a_case():
    item = shape_of(list[Reward]).item
    assert item is not None and set(tags(item)) == {value for key, _, value in exercised() if key == "rewards.0.kind"}


def test_nothing_is_left_out_for_nothing():
    keys = {key for key, _, _ in leaves()}
    assert all(any(re.fullmatch(pattern, key) for key in keys) for pattern in NOT_HERE)
    assert all(not is_left_out(key) for key, _, _ in exercised() if "offload" not in key)
    assert {key for key, _ in NOT_THESE} <= keys


def test_cases_are_what_a_recipe_can_say():
    for name, case in CASES.items():
        known = set(options(RECIPES[case.stage]))
        assert {key.partition(".")[0] for key in case.values} <= known, name
