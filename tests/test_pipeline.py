"""Whole stages through the command line, on a tiny model: what they leave behind, what they refuse, how they resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.algo.registry import Registry
from rlhf.data.demo import DemoSizes, write_demo_data

pytestmark = pytest.mark.pipeline
ROOT = Path(__file__).parents[1]
INIT = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "vocab": 400, "context": 128}
OFFLINE = {"steps": 2, "batch_size": 8, "micro_batch": 4, "lr": 1e-3}
ONLINE = {"rollouts": 2, "prompts": 8, "micro_batch": 4, "minibatches": 2, "inner_epochs": 2, "lr": 1e-4}
SAMPLING = {"max_new_tokens": 12}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_demo_data(
        folder, 0, DemoSizes(sft=60, pairs=60, prompts=40, eval_prompts=8, eval_pairs=8, lists=60, eval_lists=8)
    )
    (folder / "sums.jsonl").write_text(
        "".join(json.dumps({"question": f"{n} + 1?", "answer": f"#### {n + 1}"}) + "\n" for n in range(20))
    )
    return folder


class Run:
    """A run directory and the recipes for it."""

    def __init__(self, cli, folder: Path, data: Path) -> None:
        self.cli, self.root, self.recipes = cli, folder / "run", folder / "recipes"
        self.recipes.mkdir()
        self.write("sft", model={"init": INIT}, data=self.rows(data, "sft"), train=OFFLINE, sampling=SAMPLING)
        self.write("rm", model={"from": "sft"}, data=self.rows(data, "pairs"), train=OFFLINE)
        self.write("dpo", model={"from": "sft"}, data=self.rows(data, "pairs"), train=OFFLINE, sampling=SAMPLING)
        online = {"model": {"from": "sft"}, "data": self.rows(data, "prompts", 0), "sampling": SAMPLING}
        self.write("ppo", **online, train=ONLINE, critic={"lr": 1e-4})
        self.write("grpo", **online, train={**ONLINE, "answers": 4})

    @staticmethod
    def rows(data: Path, name: str, held_out: int = 8) -> dict:
        return {"path": str(data / f"{name}.jsonl"), "eval_rows": held_out, "max_length": 96}

    def write(self, stage: str, **blocks) -> None:
        (self.recipes / f"{stage}.yaml").write_text(yaml.safe_dump(blocks))

    def __call__(self, stage: str, *options: str):
        return self.cli(stage, self.recipes / f"{stage}.yaml", "--run", self.root, *options)

    def metrics(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.root / name / "metrics.jsonl").read_text().splitlines()]

    def manifest(self, name: str) -> dict:
        return json.loads((self.root / name / "MANIFEST.json").read_text())


@pytest.fixture(scope="module")
def finished(cli, data, tmp_path_factory) -> Run:
    """All five stages, run once."""
    run = Run(cli, tmp_path_factory.mktemp("pipeline"), data)
    for stage in ("sft", "rm", "ppo", "grpo", "dpo"):
        done = run(stage)
        assert done.code == 0, done.err
    return run


def test_every_stage_leaves_what_the_run_directory_promises(finished):
    kinds = {"sft": "policy", "rm": "reward", "ppo": "policy", "grpo": "policy", "dpo": "policy"}
    for stage, kind in kinds.items():
        folder = finished.root / stage
        for name in ("recipe.yaml", "resolved.yaml", "status.json", "provenance.json", "log.txt", "model"):
            assert (folder / name).exists(), (stage, name)
        assert finished.manifest(stage)["kind"] == kind
        assert [row["step"] for row in finished.metrics(stage)] == [1, 2]
        assert json.loads((folder / "status.json").read_text())["state"] == "finished"
        assert (folder / "recipe.yaml").read_text() == (finished.recipes / f"{stage}.yaml").read_text()
    assert (finished.root / "ppo" / "critic").is_dir()
    samples = [json.loads(line) for line in (finished.root / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert {row["step"] for row in samples} == {0, 2}
    assert all(math.isfinite(row["score"]) for row in samples)


def test_on_policy_stages_start_at_the_reference(finished):
    for stage in ("ppo", "grpo"):
        first = finished.metrics(stage)[0]
        assert first["rollout/kl_ref"] == pytest.approx(0, abs=1e-5)
        assert first["rollout/sampler_gap"] < 1e-4
    assert finished.metrics("grpo")[0]["reward/unscored"] == 0
    assert finished.metrics("dpo")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert finished.metrics("dpo")[0]["train/reference_gap"] == pytest.approx(0, abs=1e-5)


def test_published_policies_load_with_plain_transformers(finished):
    for stage in ("sft", "ppo", "dpo"):
        folder = finished.root / stage / "model"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert tokenizer.pad_token_id != tokenizer.eos_token_id
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "the plot was"}],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert torch.isfinite(model(**prompt).logits).all()
        assert model.generate(**prompt, max_new_tokens=3).shape[1] > prompt["input_ids"].shape[1]
    for folder in (finished.root / "rm" / "model", finished.root / "ppo" / "critic"):
        scorer = AutoModelForSequenceClassification.from_pretrained(folder)
        assert scorer.config.num_labels == 1 and scorer.config.pad_token_id is not None


def test_the_same_command_again_does_nothing_and_another_recipe_is_refused(finished):
    before = {path: path.stat().st_mtime_ns for path in (finished.root / "dpo").rglob("*") if path.is_file()}
    again = finished("dpo")
    assert again.code == 0 and "finished before" in again.out
    changed = finished("dpo", "--set", "loss.beta=0.3")
    assert changed.code == 2
    assert "loss.beta" in changed.err and "--name" in changed.err and "--restart" in changed.err
    after = {path: path.stat().st_mtime_ns for path in (finished.root / "dpo").rglob("*") if path.is_file()}
    assert after == before
    named = finished("dpo", "--set", "loss.beta=0.3", "--name", "dpo-b0.3")
    assert named.code == 0 and finished.manifest("dpo-b0.3")["kind"] == "policy"
    assert "read from" in (finished.root / "dpo-b0.3" / "log.txt").read_text(), "the reference was computed twice"


def test_status_lists_all_stages(finished, cli):
    done = cli("status", finished.root, "--json")
    stages = {row["name"]: row for row in json.loads(done.out)}
    assert stages["ppo"]["state"] == "finished" and set(stages["ppo"]["parents"]) == {"sft", "rm"}
    assert stages["rm"]["key_metric"][0] == "eval/accuracy"
    assert "finished" in cli("status", finished.root).out


def test_lora_stages_publish_merged_weights_and_the_adapter(finished):
    for stage in ("dpo", "ppo", "rm"):
        name = f"{stage}-lora"
        done = finished(stage, "--name", name, "--set", "model.lora.rank=4")
        assert done.code == 0, done.err
        assert (finished.root / name / "model" / "adapter" / "adapter_model.safetensors").exists()
    assert "adapter switched off" in (finished.root / "ppo-lora" / "log.txt").read_text()
    assert finished.metrics("ppo-lora")[0]["rollout/kl_ref"] == pytest.approx(0, abs=1e-5)
    assert finished.metrics("dpo-lora")[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_bf16_with_fp32_master_weights(finished):
    for stage in ("sft", "grpo"):
        options = ["--set", "model.dtype=bf16", "--set", "zero.stage=1"]
        done = finished(stage, "--name", f"{stage}-bf16", *options)
        assert done.code == 0, done.err
    config = json.loads((finished.root / "sft-bf16" / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"


# --- every registered name --------------------------------------------------------------------------------------------


def names(registry: Registry, *skip: str) -> list[str]:
    return [name for name in registry.names() if name not in skip]


def registered() -> list[tuple[str, str]]:
    """Losses on judged answers are in tests/test_preferences.py."""
    from rlhf.algo.kl import KL_ESTIMATORS
    from rlhf.algo.schedules import SCHEDULES

    chosen = [("ppo", f"kl.estimator={name}") for name in names(KL_ESTIMATORS, "k1")]
    chosen += [("grpo", f"kl.estimator={name}") for name in names(KL_ESTIMATORS, "k1", "k3")]
    chosen += [("sft", f"train.schedule={name}") for name in names(SCHEDULES, "cosine")]
    return [*chosen, ("grpo", "aggregation=token_mean"), ("sft", "train.optimizer=sgd")]


@pytest.mark.parametrize(("stage", "choice"), registered())
def test_every_choice_runs_two_steps(finished, stage, choice):
    name = f"{stage}-{''.join(c if c.isalnum() else '-' for c in choice)}"
    done = finished(stage, "--name", name, "--set", choice)
    assert done.code == 0, done.err
    assert len(finished.metrics(name)) == 2


def test_every_rule_reward_runs_two_steps(finished, data, tmp_path):
    from rlhf.rewards.rules import RULES

    code = tmp_path / "mine.py"
    code.write_text(
        "def score(rows, answers):\n    return [None if i % 3 == 0 else 1.0 for i, _ in enumerate(answers)]\n"
    )
    rules = [{"kind": name} for name in RULES.names() if name != "function"]
    rules.append({"kind": "function", "function": f"{code}:score"})
    columns = {"path": str(data / "sums.jsonl"), "columns": {"prompt": "question"}, "max_length": 96}
    options = ["--set", f"rewards={json.dumps(rules)}", "--set", f"data={json.dumps(columns)}", "--name", "grpo-rules"]
    refused = finished("grpo", *options)
    assert refused.code == 9 and "--allow-code" in refused.err
    assert not (finished.root / "grpo-rules").exists()
    done = finished("grpo", *options, "--allow-code", str(code))
    assert done.code == 0, done.err
    rows = finished.metrics("grpo-rules")
    assert len(rows) == 2 and all(f"reward/{name}" in rows[0] for name in RULES.names())
    assert rows[0]["reward/unscored"] > 0


# --- stopping and resuming --------------------------------------------------------------------------------------------

WALL_CLOCK = ("time", "speed/")


def comparable(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in rows]


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ppo", "grpo"])
def test_a_stopped_stage_resumes_to_the_same_bytes(finished, stage):
    key = "train.rollouts=6" if stage in ("ppo", "grpo") else "train.steps=6"
    straight = ["--set", key, "--set", "checkpoint.every=2"]
    done = finished(stage, "--name", f"{stage}-straight", *straight)
    assert done.code == 0, done.err
    command = [sys.executable, "-m", "rlhf", stage, finished.recipes / f"{stage}.yaml", "--run", finished.root]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*map(str, command), "--name", f"{stage}-stopped", *straight], cwd=ROOT, env=env, stderr=subprocess.PIPE
    )
    metrics = finished.root / f"{stage}-stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.005)
    code = process.wait(timeout=120)
    assert code == 75, process.stderr.read().decode()[-2000:]
    done = finished(stage, "--name", f"{stage}-stopped", *straight)
    assert done.code == 0, done.err
    assert comparable(finished.metrics(f"{stage}-stopped")) == comparable(finished.metrics(f"{stage}-straight"))
    for part in ("model", "critic") if stage == "ppo" else ("model",):
        weights = [finished.root / f"{stage}-{how}" / part / "model.safetensors" for how in ("straight", "stopped")]
        assert weights[0].read_bytes() == weights[1].read_bytes(), part


def test_a_pipeline_runs_its_stages_in_order_and_skips_what_is_finished(finished, cli):
    file = finished.recipes / "pipeline.yaml"
    steps = [
        {"stage": "sft", "recipe": "sft.yaml"},
        {"stage": "rm", "recipe": "rm.yaml", "name": "rm-long", "set": {"train.steps": 3}},
        {
            "stage": "dpo",
            "recipe": "dpo.yaml",
            "name": "dpo-last",
            "expect": {"metric": "train/lr", "direction": "falls", "by": 0},
        },
    ]
    file.write_text(yaml.safe_dump({"stages": steps}))
    done = cli("run", file, "--run", finished.root)
    assert done.code == 0, done.err
    assert "sft was finished before" in done.out
    assert len(finished.metrics("rm-long")) == 3
    assert "dpo-last: train/lr went from" in done.err
    steps[2]["expect"]["by"] = 1.0
    file.write_text(yaml.safe_dump({"stages": steps}))
    refused = cli("run", file, "--run", finished.root)
    assert refused.code == 5 and "expected train/lr to change by at least 1" in refused.err
