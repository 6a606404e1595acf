"""The self-test kills, resumes and compares for real, and would see a difference of one bit."""

from __future__ import annotations

import json
import shutil

import pytest

from rlhf.doctor.selftest import STEPS, Place, Unequal, digest, kill, one_rank, went_on
from rlhf.recipe.load import load_recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    with Place(tmp_path_factory.mktemp("selftest")) as made:
        yield made


@pytest.fixture(scope="module")
def told(place) -> str:
    return one_rank(place, "sft", "sft")


def test_a_killed_run_ends_as_the_straight_one(told):
    assert f"of {STEPS}, resumed after step" in told and told.endswith("equal, every bit")


@pytest.mark.parametrize("part", ["model/model.safetensors", "metrics.jsonl", "checkpoints"])
def test_one_bit_is_seen(told, place, tmp_path, part):
    before = digest(place.run / "sft")
    stage = shutil.copytree(place.run / "sft", tmp_path / "sft")
    assert digest(stage) == before
    path = stage / part if part != "checkpoints" else sorted(stage.glob("checkpoints/step-*/**/*.pt"))[-1]
    if part == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[-1]["train/loss"] += 1e-15
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    after = digest(stage)
    assert [name for name in before if before[name] != after[name]] == [str(path.relative_to(stage))]


def test_what_does_not_end_as_it_must_is_told_with_its_reason(told, place):
    refused = place.start("sft", "refused", "--set", "train.lr=-1")
    with pytest.raises(Unequal, match="expected exit code 0, found 2: .*train.lr"):
        place.ended(refused, 0)
    with pytest.raises(Unequal, match="over before it could be killed"):
        went_on(place, "sft", "sft", "sft")
    with pytest.raises(Unequal, match="ended with 2"):
        place.wait_for_step(refused)
    kill(refused, refused.process.pid)  # it is gone: nothing happens


def test_nothing_that_was_started_is_left(tmp_path):
    with Place(tmp_path) as place:
        running = place.start("sft", "sft")
    assert running.process.poll() is not None


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_recipes_are_valid(place, stage):
    loaded = load_recipe(place.folder / f"{stage}.yaml", stage, [])
    assert loaded.recipe.checkpoint.every and loaded.recipe.train.micro_batch == 4
