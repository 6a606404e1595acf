"""Which checkpoints are there, which weights are published, and what may change when a stage goes on."""

from __future__ import annotations

import json

import pytest

from scripts.reliability.stops import slowed

pytestmark = pytest.mark.pipeline
CONSTANT = ("--set", "train.schedule=constant", "--set", "train.warmup=0.0", "--set", "eval.every=1")
WORST = "checkpoint.keep_best={metric: eval/loss, larger_is_better: true"  # of a loss that falls it is the first step


def checkpoints(lab, name: str) -> list[str]:
    return sorted(path.name for path in (lab.root / name / "checkpoints").iterdir())


def weights(lab, name: str) -> bytes:
    return (lab.root / name / "model" / "model.safetensors").read_bytes()


def test_the_best_step_is_kept_and_published_where_asked(lab):
    words = [*CONSTANT, "--set", "checkpoint.every=0", "--set", "checkpoint.keep=1", "--name"]
    for name, options in (
        ("plain", []),
        ("kept", ["--set", WORST + "}"]),
        ("published", ["--set", WORST + ", publish: true}"]),
        ("one-step", ["--set", "train.steps=1"]),
    ):
        done = lab.run(lab.command("sft", *words, name, *options))
        assert done.code == 0, done.err
    assert checkpoints(lab, "kept") == checkpoints(lab, "published") == ["step-000001"]
    assert not (lab.root / "plain" / "checkpoints").exists()
    assert weights(lab, "kept") == weights(lab, "plain") != weights(lab, "one-step") == weights(lab, "published")
    steps = [json.loads((lab.root / n / "MANIFEST.json").read_text())["facts"]["step"] for n in ("kept", "published")]
    assert steps == [6, 1]
    status = lab.run(["status", lab.root])
    [line] = [line for line in status.out.splitlines() if line.strip().startswith("kept ")]
    assert "best eval/loss" in line and "at 1" in line


def test_how_a_run_is_carried_out_may_change_when_it_goes_on(lab):
    name = ["--name", "changed", *CONSTANT]
    short = lab.command("sft", *name, "--set", "max_minutes=0.02", "--set", WORST + "}")
    done = lab.run(short, before=slowed)
    assert done.code == 75 and "after max_minutes = 0.02" in done.err, done.err
    refused = lab.run(lab.command("sft", *name, "--set", WORST + ", publish: true}"))
    assert refused.code == 2 and "publishes.publish" in refused.err, refused.err
    options = ["checkpoint={every: 2, minutes: 5.0, keep: 3}", "log={samples: 0}", "max_minutes=60.0"]
    done = lab.run(lab.command("sft", *name, *(word for option in options for word in ("--set", option))))
    assert done.code == 0 and "goes on after step" in done.err, done.err
    straight = lab.run(lab.command("sft", "--name", "not-changed", *CONSTANT))
    assert straight.code == 0 and weights(lab, "changed") == weights(lab, "not-changed")
