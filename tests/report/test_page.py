"""The whole page: well-formed, self-contained, escaped, and made for every kind of run directory."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from rlhf.report.collect import read_run
from rlhf.report.diagram import depths, lineage_diagram
from rlhf.report.page import render, write_report
from rlhf.report.sections import duration, kl_target
from rlhf.run.commit import append_jsonl

VOID = {"meta", "br", "hr"}


class Checker(HTMLParser):
    """Collects tags, text and ids, and fails on tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == [], "unclosed"
    assert len(set(checker.ids)) == len(checker.ids), "an id twice"
    assert all(link.startswith("#") and link[1:] in checker.ids for link in checker.links), "a link that leads nowhere"
    assert "script" not in checker.tags and "img" not in checker.tags and "link" not in checker.tags
    assert "url(http" not in text and "@import" not in text
    return checker


def test_complete_run(full_run):
    path = write_report(full_run)
    assert path == full_run / "report" / "report.html"
    text = path.read_text(encoding="utf-8")
    page = checked(text)
    words = " ".join(page.text)
    for part in (
        "What to look at",
        "failed at step 70 of 120: step 70: loss is <nan>",
        "policy/loss was not a finite number at step 71",
        "17% of pairs.jsonl was dropped",
        "Held-out prompts, judged by the gold reward (256 prompts)",
        "2.58 ± 0.12",
        "✗",
        "Stages compared",
        "Reward against distance from the reference",
        "Samples, before and after",
        "step 120 · score 0.5",
        "Recipe as given",
        "lr: 2e-3",
        "1,800",
        "warning: a <row> was odd (2 times)",
    ):
        assert part in words, part
    assert "<script>alert('prompt')</script> & <b>" in page.text, "text of files arrives as text"
    assert {"sft", "rm", "ppo", "grpo", "dpo", "ppo-kl0"} <= set(page.ids)
    assert text.count("<figure>") > 40
    assert re.search(r"<details open><summary>End of the log", text), "the log of a failed stage is in sight"


ADAPTIVE = {"stage": "ppo", "recipe": {"kl": {"controller": {"name": "adaptive", "target": 4.5}}}}


@pytest.mark.parametrize(
    ("inputs", "target"),
    [
        (ADAPTIVE, 4.5),
        ({"recipe": {"kl": {"controller": {"name": "fixed"}}}}, None),
        ({"recipe": {"kl": {"controller": {"name": "ppo_penalty_beta", "target": 0.01}}}}, None),
        ({"recipe": {"kl": {"controller": {"name": "adaptive", "target": "many"}}}}, None),
        ({"recipe": {"kl": 3}}, None),
        ({}, None),
    ],
)
def test_alarms_over_optimisation_and_the_target_of_the_kl(make_stage, tmp_path, inputs, target):
    stage = make_stage(tmp_path, "ppo", "ppo", steps=0)
    for step in range(1, 13):
        shifts = {"test/train_shift": step / 10, "test/shift": min(step, 12 - step) / 5, "test/gap": step / 10}
        alarm = {"alarm/kl_spike": 1.0} if step in (7, 8) else {}
        row = {"step": step, "rollout/kl_ref": step**2 - 2.0, "kl/coef": 0.1, "ptx/loss": 2.0, **shifts, **alarm}
        append_jsonl(stage.metrics, row)
    provenance = json.loads(stage.provenance.read_text())
    stage.provenance.write_text(json.dumps({**provenance, "inputs": inputs}))
    text = write_report(tmp_path).read_text()
    page = checked(text)
    words = " ".join(page.text)
    for part in (
        "alarm kl_spike at step 7 to 8, look at rollout/kl_ref",
        "the test score fell from",
        "Train score and test score",
        "Train score ahead of test score",
        "√ KL to the reference, √ nats per answer",
        "Weight of the KL",
        "Supervised loss mixed in",
    ):
        assert part in words, part
    figures = {figure.partition("<span>")[0]: figure for figure in text.split("<figure><figcaption>")[1:]}
    assert not any(caption.startswith("alarm/") for caption in figures)
    distance = figures["Distance to the reference (KL)"]
    assert distance.count("#d97706") == 2 and ("stroke-dasharray" in distance) == (target is not None)
    assert kl_target(read_run(tmp_path).stages[0]) == target


def test_page_is_a_function_of_the_run_directory(make_stage, tmp_path):
    make_stage(tmp_path, "sft", "sft", steps=20)
    assert render(read_run(tmp_path), "now") == render(read_run(tmp_path), "now")
    write_report(tmp_path)
    write_report(tmp_path)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.html"]


def test_empty_run_directory(tmp_path):
    page = checked(write_report(tmp_path).read_text())
    assert "No stage was started" in " ".join(page.text)


def test_stage_that_has_just_begun(make_stage, tmp_path):
    make_stage(tmp_path, "sft", "sft", steps=0, ends="running")
    page = checked(write_report(tmp_path).read_text())
    assert "No metrics were written." in page.text


@pytest.mark.parametrize("name", ["provenance.json", "status.json", "samples.jsonl", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff<script>", b'{"step": 1, "data": {"sources": [{"path": 3}]}}\n'])
def test_damaged_stage(make_stage, tmp_path, name, content):
    stage = make_stage(tmp_path, "sft", "sft", steps=6)
    make_stage(tmp_path, "dpo", "dpo", ("sft",), steps=6)
    (stage.path / name).write_bytes(content)
    page = checked(write_report(tmp_path).read_text())
    assert {"sft", "dpo"} <= set(page.ids)


@pytest.mark.parametrize(
    "demo",
    [
        "{}",
        '{"rows": 3}',
        '{"rows": [{"cells": [1]}, 4]}',
        '{"rows": [{"cells": [], "checks": [1]}], "samples": [{}, 2]}',
    ],
)
def test_damaged_demo_table(make_stage, tmp_path, demo):
    make_stage(tmp_path, "sft", "sft", steps=2)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "demo.json").write_text(demo)
    checked(write_report(tmp_path).read_text())


def test_hostile_texts(make_stage, tmp_path):
    hostile = "</pre></details><script>alert(1)</script>\x1b[31m"
    stage = make_stage(tmp_path, "sft", "sft", steps=2)
    for path in (stage.recipe, stage.resolved, stage.log):
        path.write_text(hostile)
    page = checked(write_report(tmp_path).read_text())
    assert "</pre></details><script>alert(1)</script>\ufffd[31m" in page.text


def test_lineage_puts_parents_first(full_run):
    found = depths({"a": [], "b": ["a"], "c": ["a", "b"], "d": ["runs/other/sft"]})
    assert found == {"a": 0, "b": 1, "c": 2, "runs/other/sft": 0, "d": 1}
    assert depths({"a": ["b"], "b": ["a"]}).keys() == {"a", "b"}, "a circle, which only a damaged file can hold"
    svg = lineage_diagram(read_run(full_run))
    assert svg.count("<rect") == 6 and svg.count("<path") == 8


def test_parent_of_another_run(make_stage, tmp_path):
    make_stage(tmp_path / "one", "sft", "sft", steps=2)
    make_stage(tmp_path / "two", "dpo", "dpo", steps=2)
    provenance = tmp_path / "two" / "dpo" / "provenance.json"
    record = {"stage": "sft", "path": str(tmp_path / "one" / "sft"), "content_hash": "x"}
    provenance.write_text(json.dumps({"parents": [record], "inputs": {}}))
    text = write_report(tmp_path / "two").read_text()
    assert "another run" in text and "stroke-dasharray" in text
    assert "sft has changed or gone" in text


def test_duration():
    assert [duration(s) for s in (0, 59, 119, 120, 7199, 7200)] == [
        "0 s",
        "59 s",
        "119 s",
        "2.0 min",
        "120.0 min",
        "2.0 h",
    ]
