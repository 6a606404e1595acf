"""Repeated steps of a pipeline, written out: `{rounds: 3, stages: [...]}` -> plain steps, before anything is checked.

In the steps' `name`, and in the values of their `set`, `{round}` is the number of the round, 1 to `rounds`, and
`{previous}` the one before: 0 in the first round, so that what the first round starts from is named `rm-0`. A value
that is nothing but `{round}` or `{previous}` becomes a number. Other braces stay what they are.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rlhf.recipe.document import Document
from rlhf.recipe.problems import Problem, found, index

_KEYS = ("rounds", "stages")
MOST = 1000  # rounds
MOST_STEPS = 5000  # that one block of rounds is written out to


def expand_rounds(document: Document) -> tuple[Document, Callable[[Problem], Problem]]:
    """The document with every round written out, and what turns a problem of it into one of the file as written.

    What is wrong with a block of rounds itself is added to the problems; such a block is left out.
    """
    items = document.values.get("stages")
    if not isinstance(items, list):
        return document, lambda problem: problem
    steps: list[Any] = []
    origins: list[str] = []  # of every step: its key in the file
    problems = list(document.problems)
    for i, item in enumerate(items):
        if not (isinstance(item, dict) and "rounds" in item):
            steps.append(item)
            origins.append(f"stages.{i}")
        elif wrong := _problems(item, f"stages.{i}"):
            problems += wrong
        else:
            for number in range(1, item["rounds"] + 1):
                steps += [_in_round(step, number) for step in item["stages"]]
                origins += [f"stages.{i}.stages.{j}" for j in range(len(item["stages"]))]
    marks = {key: mark for key, mark in document.marks.items() if not key.startswith("stages.")}
    for n, origin in enumerate(origins):
        inside = [key for key in document.marks if key == origin or key.startswith(f"{origin}.")]
        marks |= {f"stages.{n}{key.removeprefix(origin)}": document.marks[key] for key in inside}

    def as_written(problem: Problem) -> Problem:
        here, there = _step_of(problem.key, origins)
        fix = None if problem.fix is None else problem.fix.replace(f"{here}.", f"{there}.")
        return replace(problem, key=problem.key.replace(here, there, 1), fix=fix)

    values = {**document.values, "stages": steps}
    # The problems found so far have the file's own keys: the caller adds them to what it finds in the steps.
    document.problems = problems
    return replace(document, values=values, marks=marks, problems=[]), as_written


def _step_of(key: str, origins: list[str]) -> tuple[str, str]:
    """The step that a key of the expanded document lies in, there and in the file."""
    number = index(key.split(".")[1]) if key.startswith("stages.") else None
    return (key, key) if number is None or number >= len(origins) else (f"stages.{number}", origins[number])


def _problems(item: dict[str, Any], key: str) -> list[Problem]:
    """What keeps a block of rounds from being written out."""
    problems = []
    if strange := [name for name in item if name not in _KEYS]:
        problems.append(Problem(key, f"expected rounds and stages, found {', '.join(strange)} too", "remove it"))
    rounds, stages = item["rounds"], item.get("stages")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or not 1 <= rounds <= MOST:
        problems.append(Problem(f"{key}.rounds", f"expected a whole number from 1 to {MOST}, found {found(rounds)}"))
    if not isinstance(stages, list) or not stages or not all(isinstance(step, dict) for step in stages):
        fix = "they are written like those of the pipeline"
        problems.append(Problem(f"{key}.stages", f"expected a list of stages, found {found(stages)}", fix))
        return problems
    if not problems and rounds * len(stages) > MOST_STEPS:
        what = f"expected at most {MOST_STEPS} stages in all rounds, found {rounds} x {len(stages)}"
        problems.append(Problem(f"{key}.rounds", what))
    for j, step in enumerate(stages):
        name = step.get("name")
        if "rounds" in step:
            problems.append(Problem(f"{key}.stages.{j}", "expected a stage, found rounds inside rounds"))
        elif not (isinstance(name, str) and "{round}" in name):
            what = f"expected a name with {{round}} in it, found {found(name)}"
            fix = "every round has a folder of its own, e.g. name: grpo-{round}"
            problems.append(Problem(f"{key}.stages.{j}.name", what, fix))
    return problems


def _in_round(step: dict[str, Any], number: int) -> dict[str, Any]:
    """A step as it reads in one round."""
    return {
        key: _filled(value, number) if key in ("name", "set") else copy.deepcopy(value) for key, value in step.items()
    }


def _filled(value: Any, number: int) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, number) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, number) for item in value]
    if not isinstance(value, str):
        return value
    known = {"{round}": number, "{previous}": number - 1}
    if value in known:
        return known[value]
    for mark, meant in known.items():
        value = value.replace(mark, str(meant))
    return value
