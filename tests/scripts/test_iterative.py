"""Iterative against one-shot DPO: the order of the stages, equal data, and how the result reads."""

from __future__ import annotations

from pathlib import Path

from scripts.iterative import Point, difference, draw, page, tasks_of

RUN = Path("runs/iterative/seed-3")


def test_every_shard_is_answered_by_the_policy_before_it():
    tasks = {task.name: task for task in tasks_of(RUN)}
    assert "model.from=sft" in tasks["label-once"].settings and "data.part=1/3" not in tasks["label-once"].settings
    for i, before in ((1, "sft"), (2, "iterative-1"), (3, "iterative-2")):
        assert {f"model.from={before}", f"data.part={i}/3"} <= set(tasks[f"label-{i}"].settings)
        assert {f"model.from={before}", f"data.from=label-{i}"} <= set(tasks[f"iterative-{i}"].settings)
        assert before in tasks[f"label-{i}"].after and tasks[f"iterative-{i}"].after == (f"label-{i}",)
    assert "label.seed=3" in tasks["label-1"].command(Path("recipes"))


def seeds() -> list[dict[str, Point]]:
    names = ("sft", "one-shot", "iterative-1", "iterative-2", "iterative-3")
    return [{name: Point(0.5 * i + seed, float(i), 0.9, 15.0) for i, name in enumerate(names)} for seed in (0, 1)]


def test_the_difference_is_taken_seed_by_seed():
    # gold 2.0 against 0.5 in either seed, KL 4 against 1
    assert "+1.50 ± 0.00" in difference(seeds()) and "+3.0 nats" in difference(seeds())
    assert difference(seeds()[:1]) == ""


def test_the_page_and_the_figure(tmp_path):
    text = page(seeds(), "Says so.")
    assert "| iterative-3 | 2.50 ± 0.71 | 4.0 ± 0.0 | 0.90 ± 0.00 | 15.0 ± 0.0 | 2 |" in text
    assert text.endswith("Says so.\n")
    draw(seeds(), tmp_path / "one.svg")
    draw(seeds(), tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
