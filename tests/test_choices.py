"""Every named choice and every option of the on-policy stages, through the command line, in full and with LoRA.

The cases of tests/choices.py name what differs from the tiny recipe of tests/conftest.py. The last tests fail where a
registered name, an option, or a value of an option that has a few is in no case.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
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
from tests.choices import CASES, NOT_HERE, NOT_THESE

pytestmark = pytest.mark.pipeline
STAGES = ("ppo", "grpo")

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
    done = cli(*tiny.command("rm", "--name", "choice-rm", "--set", "model.lora.rank=4"))
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
