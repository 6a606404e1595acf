"""Reading run directories: the numbers that were written, and whatever is left of damaged files."""

from __future__ import annotations

import json

import pytest

from rlhf.errors import CheckpointError
from rlhf.report.collect import first_and_last, log_warnings, pick, read_run, split_metrics


def test_complete_run(full_run):
    run = read_run(full_run)
    assert [stage.summary.name for stage in run.stages] == ["sft", "rm", "ppo", "grpo", "dpo", "ppo-kl0"]
    assert run.parents["ppo"] == ["sft", "rm"] and run.parents["sft"] == []
    assert run.demo is not None and run.demo["prompts"] == 256
    assert run.problems == []
    sft, failed = run.stages[0], run.stages[-1]
    assert len(sft.series["train/loss"]) == 120 and [step for step, _ in sft.series["eval/loss"]] == [40, 80, 120]
    assert "time" not in sft.series and "step" not in sft.series
    assert sft.manifest["kind"] == "policy" and sft.provenance["seed"] == 0 and "lr: 2e-3" in sft.recipe
    assert sft.warnings == ["warning: a <row> was odd (2 times)"]
    assert sft.problems == []
    assert failed.summary.state == "failed" and failed.gaps == {"policy/loss": [71]}
    assert failed.series["reward/score_mean"][-1] == (71, 1.9)


def test_no_run_directory(tmp_path):
    with pytest.raises(CheckpointError, match="expected a run directory"):
        read_run(tmp_path / "nothing")


def test_empty_run_directory(tmp_path):
    run = read_run(tmp_path)
    assert run.stages == [] and run.demo is None and run.name == tmp_path.name


def test_damaged_lines_are_left_out_and_counted(make_stage, tmp_path):
    stage = make_stage(tmp_path, "sft", "sft", steps=10)
    lines = stage.metrics.read_bytes().split(b"\n")
    lines[3] = b"{broken"
    lines[5] = b"[1, 2]"
    stage.metrics.write_bytes(b"\n".join([*lines[:-1], b'{"step": 11, "train/lo']))
    (page,) = read_run(tmp_path).stages
    assert [step for step, _ in page.series["train/loss"]] == [1, 2, 3, 5, 7, 8, 9, 10]
    assert page.problems == [f"{stage.metrics}: 3 damaged lines left out, the first is line 4"]


@pytest.mark.parametrize(
    "name", ["provenance.json", "status.json", "MANIFEST.json", "recipe.yaml", "samples.jsonl", "log.txt"]
)
@pytest.mark.parametrize(
    "content", [None, b"", b"\xff\x00\xfe", b"[]", b"null", b'{"a": ', b'{"parents": 3, "data": 4}']
)
def test_any_file_may_be_missing_or_damaged(make_stage, tmp_path, name, content):
    stage = make_stage(tmp_path, "sft", "sft", steps=3)
    path = stage.path / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    (page,) = read_run(tmp_path).stages
    assert page.summary.name == "sft" and len(page.series["train/loss"]) == 3


def test_unreadable_file_is_a_problem(make_stage, tmp_path):
    stage = make_stage(tmp_path, "sft", "sft", steps=3)
    stage.metrics.unlink()
    stage.metrics.mkdir()
    (page,) = read_run(tmp_path).stages
    assert page.series == {} and len(page.problems) == 1


def test_damaged_demo_table_is_a_problem(make_stage, tmp_path):
    make_stage(tmp_path, "sft", "sft", steps=3)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "demo.json").write_text("{")
    run = read_run(tmp_path)
    assert run.demo is None and "demo.json" in run.problems[0]


def test_split_metrics():
    rows = [
        {"step": 1, "time": 5.0, "a": 1, "b": None},
        {"step": 2, "a": 2.5, "b": "text", "c": True, "d": [1]},
        {"a": 9.0},
        {"step": None, "a": 9.0},
        {"step": 3, "a": 1e300, "b": float("nan")},
    ]
    series, gaps = split_metrics(rows)
    assert series == {"a": [(1, 1.0), (2, 2.5)]}
    assert gaps == {"b": [1], "a": [3]}


def test_first_and_last():
    def row(step: int, number: int, prompt: str, answer: str) -> dict:
        return {"step": step, "row": number, "prompt": prompt, "answer": answer}

    rows = [row(0, 7, "p", "a"), row(0, 8, "q", "b"), row(10, 7, "p", "c"), row(20, 7, "p", "d"), {"step": 3}]
    groups = first_and_last(rows)
    assert [(g.prompt, g.first["answer"], g.last["answer"]) for g in groups] == [("p", "a", "d"), ("q", "b", "b")]
    assert groups[1].first is groups[1].last
    assert len(first_and_last([row(0, 1, "p", "a"), row(0, 2, "p", "b")])) == 2, "equal prompts of different rows"


def test_log_warnings():
    log = "\n".join(
        [
            "2026-01-01 10:00:00,000 INFO rlhf.stage: fine",
            "2026-01-01 10:00:00,000 ERROR rlhf.stage: failed",
            "Traceback (most recent call last):",
            *[f"2026-01-01 10:00:00,000 WARNING rlhf.data: row {i}" for i in range(40)],
        ]
    )
    found = log_warnings(log)
    assert found[0] == "error: failed" and found[-1] == "and 11 more in log.txt" and len(found) == 31
    assert log_warnings("") == []


def test_pick():
    assert pick({"a": 1}, "a", int) == 1
    assert pick({"a": 1}, "a", str) is None
    assert pick({}, "a", int) is None and pick(None, "a", int) is None and pick([1], "a", int) is None


def test_json_of_the_fixture_is_strict(full_run):
    for path in full_run.rglob("*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
