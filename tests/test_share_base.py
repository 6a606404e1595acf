"""`share_base` through the command line: which base is found, what is learned and published, how a stage resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.pipeline
LORA = ["--set", "model.lora.rank=4"]
SHARED = [*LORA, "--set", "share_base=true", "--set", "rewards.0.from=rm-lora"]
CRITIC = ["--set", "critic.from=rm-lora"]
WALL_CLOCK = ("time", "speed/")


@pytest.fixture(scope="module")
def trained(cli, tiny):
    """Beside `sft` and `rm`, which were trained in full: adapters on `sft` that a reward model and a policy learned."""
    learn = ["--set", "train.lr=0.02"]
    for stage, name, options in (("rm", "rm-lora", []), ("sft", "sft-lora", ["--set", "model.from=sft"])):
        done = cli(*tiny.command(stage, "--name", name, *options, *LORA, *learn))
        assert done.code == 0, done.err
    return tiny


def options_of(stage: str) -> list[str]:
    return SHARED + (CRITIC if stage == "ppo" else [])


def manifest(run, name: str) -> dict:
    return json.loads((run.root / name / "MANIFEST.json").read_text())


def comparable(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.startswith(WALL_CLOCK)} for row in rows]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_the_first_step_is_that_of_separate_models(cli, trained, stage):
    """Fresh adapters change nothing: up to the first update all numbers are those of models with their own weights."""
    name = f"{stage}-{{}}"
    for kind, options in (
        ("shared", options_of(stage)),
        ("apart", [word.replace("share_base=true", "share_base=false") for word in options_of(stage)]),
    ):
        done = cli(*trained.command(stage, "--name", name.format(kind), *options))
        assert done.code == 0, done.err
    shared, apart = (trained.rows(name.format(kind)) for kind in ("shared", "apart"))
    assert [row["step"] for row in shared] == [1, 2]
    same = ["reward/score_mean", "reward/score_std", "reward/model", "rollout/length_mean", "rollout/finished"]
    same += ["value/mean", "value/return_mean"] if stage == "ppo" else []
    for key in same:
        assert shared[0][key] == pytest.approx(apart[0][key], abs=1e-5), key
    assert shared[0]["rollout/ref_gap"] == 0 and shared[1]["rollout/ref_gap"] > 0
    log = (trained.root / name.format("shared") / "log.txt").read_text()
    copies, roles = (3, "policy, reference, critic, rewards") if stage == "ppo" else (2, "policy, reference, rewards")
    line = next(line for line in log.splitlines() if "shared base: " in line)
    numbers = line.split("shared base: ")[1].split()
    assert f"held once instead of {copies} times ({roles}); saves " in line
    assert float(numbers[-3]) == round((copies - 1) * 4 * int(numbers[0].replace(",", "")) / 1e6, 1)


def test_what_is_published_stands_on_the_common_base(cli, trained):
    done = cli(*trained.command("ppo", "--name", "published", *options_of("ppo"), "--set", "train.lr=0.01"))
    assert done.code == 0, done.err
    sft = manifest(trained, "rm-lora")["facts"]["adapter_base"]
    assert sft == manifest(trained, "published")["facts"]["adapter_base"] and set(sft) == {"content_hash"}
    assert manifest(trained, "rm")["facts"]["adapter_base"] is None
    base = load_file(trained.root / "sft" / "model" / "model.safetensors")
    for part, start in (("model", "sft"), ("critic", "rm-lora")):
        folder = trained.root / "published" / part
        merged = load_file(folder / "model.safetensors")
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        before = load_file(trained.root / start / "model" / "model.safetensors")
        assert merged.keys() == before.keys()
        name = "model.layers.0.self_attn.q_proj"
        up, down = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
        expected = base[f"{name}.weight"] + 32 / 4 * (up @ down)
        torch.testing.assert_close(merged[f"{name}.weight"], expected, atol=1e-6, rtol=0)
        assert not torch.equal(merged[f"{name}.weight"], before[f"{name}.weight"])
        if part == "critic":
            assert torch.equal(merged["score.weight"], adapter["base_model.model.score.weight"])
    done = cli(*trained.command("dpo", "--name", "after", "--set", "model.from=published"))
    assert done.code == 0, done.err


def test_a_policy_that_is_an_adapter_itself_shares_the_base_below_it(cli, trained):
    """Policy and reward model were both trained with LoRA on `sft`; the policy's adapter goes on learning."""
    words = [*options_of("ppo"), "--set", "model.from=sft-lora", "--set", "train.lr=0.001"]
    done = cli(*trained.command("ppo", "--name", "below", *words))
    assert done.code == 0, done.err
    assert trained.rows("below")[0]["rollout/ref_gap"] == 0
    assert manifest(trained, "below")["facts"]["adapter_base"] == manifest(trained, "sft-lora")["facts"]["adapter_base"]
    base, start, merged = (
        load_file(trained.root / name / "model" / "model.safetensors") for name in ("sft", "sft-lora", "below")
    )
    name = "model.layers.1.mlp.up_proj.weight"
    from_start, from_base = (float((merged[name] - before[name]).norm()) for before in (start, base))
    assert 0 < from_start < 0.5 * from_base
    adapter = load_file(trained.root / "below" / "model" / "adapter" / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    update = 32 / 4 * adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
    torch.testing.assert_close(merged[name], base[name] + update, atol=1e-6, rtol=0)


def test_roles_without_a_common_base_are_refused(cli, trained):
    before = trained.files()
    done = cli(*trained.command("ppo", "--name", "full", *LORA, "--set", "share_base=true"))
    assert done.code == 4 and "share_base: expected one base under all roles, found" in done.err, done.err
    assert f"model ({trained.root / 'sft' / 'model'}): its own weights\n" in done.err
    for key in ("critic", "rewards.0"):
        assert f"{key} ({trained.root / 'rm' / 'model'}): a whole scorer, trained in full" in done.err
    assert "Train every scorer with model: {from: sft, lora: {}}" in done.err
    assert trained.files() == before


def test_an_adapter_folder_counts_by_the_path_of_its_base(cli, trained):
    """Without manifests: the folders are named, and the adapter's configuration names its base."""
    model, adapter = trained.root / "sft" / "model", trained.root / "rm-lora" / "model" / "adapter"
    words = ["--set", f"model.path={model}", "--set", f"rewards.0.path={adapter}", *LORA, "--set", "share_base=true"]
    for name, options in (("paths", words), ("grpo-shared", options_of("grpo"))):
        done = cli(*trained.command("grpo", "--name", name, *options))
        assert done.code == 0, done.err
    rows, shared = trained.rows("paths"), trained.rows("grpo-shared")
    assert rows[0]["reward/score_mean"] == pytest.approx(shared[0]["reward/score_mean"], abs=1e-6)


@pytest.mark.parametrize(
    ("stage", "zero"), [("ppo", []), ("ppo", ["--set", "zero.stage=3", "--set", "critic.zero.stage=3"]), ("grpo", [])]
)
def test_a_stopped_stage_resumes_to_the_same_bytes(cli, trained, stage, zero):
    name = f"{stage}-{'zero' if zero else 'plain'}"
    words = [*options_of(stage), *zero, "--set", "train.rollouts=4", "--set", "checkpoint.every=1"]
    done = cli(*trained.command(stage, "--name", f"{name}-straight", *words))
    assert done.code == 0, done.err
    command = map(str, trained.command(stage, "--name", f"{name}-stopped", *words))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *command], cwd=ROOT, env=env, stderr=subprocess.PIPE)
    metrics, deadline = trained.root / f"{name}-stopped" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 1:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error.decode()[-2000:]
    done = cli(*trained.command(stage, "--name", f"{name}-stopped", *words))
    assert done.code == 0, done.err
    assert comparable(trained.rows(f"{name}-stopped")) == comparable(trained.rows(f"{name}-straight"))
    for part in ("model", "critic") if stage == "ppo" else ("model",):
        weights = [trained.root / f"{name}-{how}" / part / "model.safetensors" for how in ("straight", "stopped")]
        assert weights[0].read_bytes() == weights[1].read_bytes(), part
