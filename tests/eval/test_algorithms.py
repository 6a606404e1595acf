"""Judging the algorithms of one seed: what is judged, and how long a verdict holds."""

from __future__ import annotations

import json

from rlhf.data.demo import demo_rows
from rlhf.eval.demo import summary_rows
from rlhf.run.rundir import RunDir
from scripts.algorithms import judge_run


def test_a_verdict_holds_until_its_stage_changes(publish, tmp_path):
    run = tmp_path / "seed-0"
    for seed, (name, command) in enumerate((("sft", "sft"), ("rm", "rm"), ("grpo", "grpo"), ("grpo-long", "grpo"))):
        publish(run, name, command, seed)
    first = judge_run(run)
    assert list(first) == ["sft", "grpo"], "policies of the table only"
    prompts = [row["prompt"] for row in demo_rows("eval_prompts")]
    sft, grpo = summary_rows(RunDir(run), prompts, 1.0, only=["grpo"])[0]
    assert (sft.stage, grpo.stage) == ("sft", "grpo")
    assert first["sft"].gold == sft.scores.gold.mean and first["sft"].kl is None
    assert (first["grpo"].gold, first["grpo"].gain, first["grpo"].kl) == (
        grpo.scores.gold.mean,
        grpo.gain.mean,
        grpo.kl.mean,
    )
    kept = run / "report" / "judged.json"
    records = json.loads(kept.read_text())
    records["grpo"]["gold"] = records["sft"]["gold"] = 123.0  # tells what was kept from what is judged anew
    kept.write_text(json.dumps(records))
    publish(run, "rloo", "grpo", 4)
    second = judge_run(run)
    assert second["grpo"].gold == 123.0 and set(second) == {"sft", "grpo", "rloo"}
    records["grpo"]["key"] = "of other weights"
    kept.write_text(json.dumps(records))
    assert judge_run(run)["grpo"] == first["grpo"]
