"""The table of preference losses: what is trained for it, from which rows, and how it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.errors import RecipeError
from scripts import preferences
from scripts.preferences import RECIPES, Verdict, page, tasks_of, wanted

RUN = Path("runs/preferences/seed-0")


def test_every_loss_has_a_stage_and_rows_that_can_feed_it():
    tasks = {task.name: task for task in tasks_of(RUN, PREFERENCE_LOSSES.names())}
    assert set(tasks) == {"sft", "rm", "label", *PREFERENCE_LOSSES.names()}
    for name in PREFERENCE_LOSSES.names():
        assert f"loss={{name: {name}}}" in tasks[name].settings and tasks[name].stage == "dpo"
    assert tasks["kto"].after == ("sft",) and tasks["sppo"].after == ("label",)
    assert "demo:lists" in " ".join(tasks["pl_dpo"].settings)
    command = tasks["ipo"].command(RECIPES)
    assert command[3:5] == ["dpo", str(RECIPES / "dpo.yaml")] and "train.seed=0" in command


def test_what_needs_no_scores_waits_for_no_labels():
    assert [task.name for task in tasks_of(RUN, ["dpo", "kto"])] == ["sft", "dpo", "kto"]


def test_unknown_losses_are_refused():
    assert wanted("dpo, ipo") == ["dpo", "ipo"]
    with pytest.raises(RecipeError, match="found smpo"):
        wanted("dpo,smpo")


def test_the_page_names_a_reason_below_the_line(monkeypatch):
    monkeypatch.setattr(preferences, "REASONS", {"npo": "it only pushes down"})
    good = Verdict(0.8, 0.01, 0.82, 1.5, 0.1, 2.0, 16.0, 0.5, 40.0)
    found = {"sft": good, "dpo": good, "npo": Verdict(0.6, 0.02, 0.61, 0.1, 0.1, 9.0, 20.0, 0.9, 40.0)}
    text = page(found)
    assert "| `dpo` | pairs | 0.800 ± 0.010 | 0.820 | 1.50 ± 0.10 | 2.0 | 16.0 | 0.50 | 40 |" in text
    assert "- `npo` (0.600): it only pushes down." in text and "- `dpo` (" not in text
