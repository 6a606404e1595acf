"""The table of algorithms: in which order stages run, what their failures stop, and what the table says of them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.errors import RecipeError
from rlhf.eval.demo import DemoScores, Row
from rlhf.eval.metrics import Estimate, estimate
from scripts.algorithms import (
    ALGORITHMS,
    NOT_STARTED,
    RECIPES,
    Judged,
    Line,
    Task,
    algorithms,
    judge_run,
    page,
    run_all,
    spread,
    tasks_of,
)

RUNS = Path("runs/x")


def test_a_seed_shares_its_first_stages():
    tasks = tasks_of(RUNS, [0, 7], ["grpo", "rloo"])
    assert [f"{task.run.name}/{task.name}" for task in tasks] == [
        *("seed-0/sft", "seed-7/sft", "seed-0/rm", "seed-7/rm"),
        *("seed-0/grpo", "seed-0/rloo", "seed-7/grpo", "seed-7/rloo"),
    ]
    words = " ".join(tasks[-1].command(Path("recipes"))[1:])
    assert words == "-m rlhf grpo recipes/rloo.yaml --run runs/x/seed-7 --name rloo --set train.seed=7"


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_stages_wait_for_their_parents_and_no_more_than_jobs_run(jobs):
    lock, started, ended, together = threading.Lock(), [], [], []

    def work(task: Task) -> int:
        with lock:
            assert all((task.run, parent) in ended for parent in task.after)
            started.append(task)
            together.append(len(started) - len(ended))
        time.sleep(0.005)
        with lock:
            ended.append((task.run, task.name))
        return 0

    tasks = tasks_of(RUNS, [0, 1, 2], list(ALGORITHMS))
    assert run_all(tasks, jobs, work) == dict.fromkeys(tasks, 0)
    assert len(started) == 3 * (2 + len(ALGORITHMS)) and max(together) == jobs


@pytest.mark.parametrize("failing", ["sft", "rm", "ppo"])
def test_what_needs_a_failed_stage_is_not_started(failing):
    started = []

    def work(task: Task) -> int:
        started.append(task)
        return 5 if task.name == failing and task.run.name == "seed-1" else 0

    codes = run_all(tasks_of(RUNS, [0, 1], ["ppo", "grpo"]), 2, work)
    found = {task.name: code for task, code in codes.items() if task.run.name == "seed-1"}
    never = {"sft": ["rm", "ppo", "grpo"], "rm": ["ppo", "grpo"], "ppo": []}[failing]
    assert found == {"sft": 0, "rm": 0, "ppo": 0, "grpo": 0, failing: 5, **dict.fromkeys(never, NOT_STARTED)}
    assert not [task for task in started if task.run.name == "seed-1" and task.name in never]
    assert all(code == 0 for task, code in codes.items() if task.run.name == "seed-0")


def test_an_exception_ends_everything_that_has_not_begun():
    started = []

    def work(task: Task) -> int:
        started.append(task)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_all(tasks_of(RUNS, [0, 1, 2], ["ppo"]), 1, work)
    assert len(started) < 3


def test_numbers_of_a_row():
    scores = DemoScores([1.0, 3.0], estimate([1.0, 3.0]), 1.0, 0.3, 15.0)
    row = Row("rloo", "grpo", 100.0, scores, kl=Estimate(4.0, 0.1, 2), gain=Estimate(1.5, 0.5, 2))
    assert Judged.from_row(row) == Judged(gold=2.0, seconds=100.0, gain=1.5, errors=3.0, kl=4.0)
    assert Judged.from_row(replace(row, gain=Estimate(0.0, 0.0, 2))).errors is None
    assert Judged.from_row(Row("sft", "sft", None, scores)) == Judged(2.0, None, None, None, None)


def test_a_line_is_mean_and_deviation_over_seeds():
    # deviations of two values: their difference / sqrt(2)
    line = Line("rloo", [Judged(2.0, 100.0, 1.5, 3.0, 4.0), Judged(3.0, 120.0, 2.5, 10.0, 6.0)])
    assert line.cells() == (
        "[rloo](../recipes/demo/rloo.yaml)",
        *("2.50 ± 0.71", "2.00 ± 0.71", "3.0", "5.0 ± 1.4", "110 ± 14", "2"),
    )
    assert Line("sft", [Judged(0.5, 9.0, None, None, None)]).cells() == ("SFT", "0.50", "", "", "", "9", "1")


def test_spread():
    assert spread([1.0, 2.0, 6.0], 1) == "3.0 ± 2.6"
    assert spread([1.25], 1) == "1.2" and spread([], 1) == ""


def test_the_page_has_a_row_and_a_recipe_for_every_line():
    lines = [Line(name, [Judged(0.5, 1.0, 1.0, 2.0, 1.0)]) for name in ("sft", *ALGORITHMS)]
    text = page(lines, RECIPES)
    for name in ALGORITHMS:
        assert f"| [{name}](../recipes/demo/{name}.yaml) | 0.50 |" in text and f"\n- `{name}`: " in text
    assert "| SFT | 0.50 |" in text and "256 held-out prompts" in text and "{" not in text


def test_unknown_algorithms_are_refused():
    assert algorithms("ppo, rloo") == ["ppo", "rloo"]
    with pytest.raises(RecipeError, match="--only: expected names of ppo, .* found a2c"):
        algorithms("ppo,a2c")


def test_a_run_without_sft_has_nothing_to_judge(tmp_path):
    assert judge_run(tmp_path) == {}
