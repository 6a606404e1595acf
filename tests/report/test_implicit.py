"""The section about a policy as a reward model, whole and with what may be missing."""

from __future__ import annotations

import json

import pytest

from rlhf.report.implicit import implicit_table
from rlhf.report.page import write_report

SCORE = {
    "accuracy": {"mean": 0.75, "low": 0.7, "high": 0.8, "count": 100},
    "drop": None,
    "margin": {"mean": 0.5, "se": 0.1, "count": 100},
    "nll": 0.612,
    "ece": None,
}
DIFFERENCE = {"first": "reward model", "second": "implicit", "mean": -0.02, "low": -0.05, "high": 0.01, "p": 0.25}
RECORD = {
    "policy": "dpo",
    "reference": "sft",
    "datasets": [{"data": "<pairs>", "pairs": 100, "scores": {"implicit": SCORE}, "differences": [DIFFERENCE]}],
}


def text(record: dict) -> str:
    return "".join(map(str, implicit_table(record)))


def test_everything_is_shown():
    shown = text(RECORD)
    for part in ("dpo beside sft", "&lt;pairs&gt;", "75.0%", "70.0% to 80.0%", "0.612", "-2.0%", "McNemar p 0.25"):
        assert part in shown, part


@pytest.mark.parametrize(
    "record",
    [{}, {"datasets": 3}, {"datasets": [None, {}, {"scores": {"implicit": None}, "differences": [1, {}]}]}],
)
def test_a_damaged_record_is_no_reason_to_fail(record):
    assert "DPO as a reward model" in text(record)


def test_the_page_has_the_section_once_it_was_asked_for(full_run):
    assert "DPO as a reward model" not in write_report(full_run).read_text()
    (full_run / "report" / "implicit.json").write_text(json.dumps(RECORD))
    assert "DPO as a reward model: dpo beside sft" in write_report(full_run).read_text()
