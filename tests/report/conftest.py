"""Run directories as stages leave them behind (finished, failed), written by `rlhf.run`; the curves are made up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import NumericsError
from rlhf.run.commit import append_jsonl, write_json
from rlhf.run.lineage import Parent, content_hash
from rlhf.run.rundir import RunDir
from rlhf.run.stage import StageDir

REPORT = {
    "sources": [
        {
            "key": "data",
            "path": "pairs.jsonl",
            "format": "pairs",
            "fingerprint": "ab",
            "read": 1800,
            "kept": 1500,
            "dropped": {"longer than max_length": 290, "empty answer": 10},
            "changed": {},
        }
    ],
    "train": {"rows": 1500, "tokens": 60000, "trained": 20000, "longest": 90},
    "eval": {"rows": 0, "tokens": 0, "trained": 0, "longest": 0},
}


def supervised(step: int, noise: Callable[[], float]) -> dict[str, Any]:
    row = {
        "train/loss": 2.5 * math.exp(-step / 60) + 1.5 + 0.05 * noise(),
        "train/lr": 2e-3 * min(1, step / 10) * (1 - step / 240),
        "train/grad_norm": 1.5 + 0.3 * noise(),
        "speed/tokens_per_second": 9000 + 400 * noise(),
        "speed/seconds": 0.2,
    }
    return row | ({"eval/loss": 2.5 * math.exp(-step / 60) + 1.55} if step % 40 == 0 else {})


def pairwise(step: int, noise: Callable[[], float]) -> dict[str, Any]:
    accuracy = 0.75 - 0.25 * math.exp(-step / 50) + 0.03 * noise()
    row = {"train/accuracy": accuracy, "train/margin": step / 100, "train/score_chosen": step / 200}
    return supervised(step, noise) | row | {"train/score_rejected": -step / 200}


def online(step: int, noise: Callable[[], float]) -> dict[str, Any]:
    rise = 1 - math.exp(-step / 40)
    return {
        "reward/score_mean": 2 * rise + 0.1 * noise(),
        "reward/score_std": 1.0,
        "reward/model": 2 * rise,
        "rollout/kl_ref": 6 * rise + 0.2 * noise(),
        "rollout/length_mean": 15 + 2 * rise,
        "rollout/finished": 0.99,
        "policy/loss": 0.01 * noise(),
        "policy/entropy": 1.6 - 0.6 * rise,
        "policy/clipfrac": 0.08 + 0.01 * noise(),
        "policy/lr": 3e-4,
        "policy/grad_norm": 0.8 + 0.1 * noise(),
        "value/loss": 0.5 * math.exp(-step / 30),
        "value/explained_variance": 0.6 * rise,
        "speed/tokens_per_second": 3000.0,
    }


CURVES = {"sft": supervised, "rm": pairwise, "dpo": pairwise, "ppo": online, "grpo": online}
SAMPLES = ["we saw this western", "my aunt rented this drama", "<script>alert('prompt')</script> & <b>"]


@pytest.fixture
def make_stage() -> Callable[..., StageDir]:
    """make_stage(run, name, command, parents=..., steps=..., ends="finished" | "failed" | "running")."""

    def make(
        run: Path, name: str, command: str, parents: tuple[str, ...] = (), steps: int = 120, ends: str = "finished"
    ) -> StageDir:
        stage, rng = RunDir(run).stage(name), random.Random(name)
        opened = stage.open({"stage": command, "recipe": {"train": {"lr": 0.002}}, "parents": {}, "data": {}})
        stage.write_recipe(f"# {name}\ntrain: {{lr: 2e-3}}\n", "train:\n  lr: 0.002\n")
        above = [RunDir(run).stage(parent) for parent in parents]
        manifests = [(each.path, each.read_manifest()) for each in above]
        records = [Parent(path, manifest, content_hash(manifest)) for path, manifest in manifests]
        stage.write_provenance(devices=["CPU"], seed=0, parents=records, data=REPORT)  # type: ignore[arg-type]
        for step in range(1, steps + 1):
            append_jsonl(stage.metrics, {"step": step, "time": step, **CURVES[command](step, lambda: rng.gauss(0, 1))})
        for step in (0, steps):
            for row, prompt in enumerate(SAMPLES):
                answer = f" at the club, and the plot was {'superb' if step else 'dull'} <i>&amp;</i>."
                append_jsonl(
                    stage.samples, {"step": step, "row": row, "prompt": prompt, "answer": answer, "score": 0.5}
                )
        stage.log.write_text("2026-01-02 10:00:00,000 WARNING rlhf.data: a <row> was odd\n" * 2 + "plain line\n")
        metric = {"name": next(iter(CURVES[command](steps, lambda: 0.0))), "value": 1.25}
        stage.write_status(step=steps, total_steps=120, key_metric=metric)
        if ends == "failed":
            with pytest.raises(NumericsError), opened:
                raise NumericsError("loss is <nan>", where="step 70")
        elif ends == "finished":
            folder = stage.export_dir("model")
            (folder / "config.json").write_text("{}")
            stage.publish("reward" if command == "rm" else "policy", {"base": "init"}, steps)
        opened.close()
        return stage

    return make


@pytest.fixture
def full_run(make_stage: Callable[..., StageDir], tmp_path: Path) -> Path:
    """A pipeline with every kind of stage, one of them failed, and the demo's table."""
    run = tmp_path / "demo"
    make_stage(run, "sft", "sft")
    make_stage(run, "rm", "rm", ("sft",))
    make_stage(run, "ppo", "ppo", ("sft", "rm"))
    make_stage(run, "grpo", "grpo", ("sft", "rm"))
    make_stage(run, "dpo", "dpo", ("sft",))
    failed = make_stage(run, "ppo-kl0", "ppo", ("sft", "rm"), steps=70, ends="failed")
    append_jsonl(failed.metrics, {"step": 71, "time": 71, "policy/loss": float("nan"), "reward/score_mean": 1.9})
    (run / "report").mkdir()
    write_json(run / "report" / "demo.json", DEMO)
    return run


COLUMNS = ["stage", "gold reward", "gap closed", "KL to SFT", "RM accuracy", "words", "parse", "distinct-2", "time"]
CHECKS = [{"text": "19.6 standard errors above SFT", "passed": True}, {"text": "KL 23 nats", "passed": False}]
DEMO = {
    "prompts": 256,
    "optimum": 3.9,
    "columns": COLUMNS,
    "rows": [
        {"stage": "sft", "cells": ["sft", "-0.13 ± 0.16", "", "", "", "15.1", "95.3%", "0.293", "81 s"], "checks": []},
        {
            "stage": "ppo",
            "cells": ["ppo", "2.58 ± 0.12", "66%", "6.97", "", "18", "92%", "0.177", "90 s"],
            "checks": CHECKS,
        },
    ],
    "failed": ["ppo"],
    "samples": [{"prompt": "we saw", "answers": [{"stage": "sft", "answer": " <b>it</b>.", "gold": -4.0}]}],
}
