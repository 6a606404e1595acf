"""Pairs as single answers and as lists; labels and scores as what the losses see."""

from __future__ import annotations

from typing import Any

from rlhf.data.formats import EQUAL, OTHER_PROMPT, Record, convert, detect
from rlhf.data.messages import message
from rlhf.data.reshape import as_answers, as_lists
from rlhf.recipe.schema import SourceBlock


def read(row: dict[str, Any], **options: Any) -> Record:
    source = SourceBlock(path="x", **options)
    return convert(row, "x:1", detect(row, "x:1", source, "data"), source)


def said(record: Record) -> tuple[Any, ...]:
    return record.answer[0]["content"], record.label, record.reward, record.density


PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


def test_answers() -> None:
    single = {"prompt": "p", "completion": "c"}
    rows = [
        {**single, "label": 1},
        {**single, "label": "false", "density": 0.25},
        {**single, "score": 0.5, "density": "0.75"},
        {**single, "score": 0},
        {"messages": [message("user", "p"), message("assistant", "c")], "score": -2},
    ]
    assert [said(record) for record in as_answers(map(read, rows))] == [
        ("c", True, 1.0, 0.5),
        ("c", False, -1.0, 0.25),
        ("c", True, 0.5, 0.75),
        ("c", False, 0.0, 0.5),
        ("c", False, -2.0, 0.5),
    ]


def test_a_pair_is_a_good_and_a_bad_answer() -> None:
    scored = {**PAIR, "score_chosen": 7, "score_rejected": 3}
    found = list(as_answers([read(PAIR, system="s"), read(scored)]))
    assert [(r.kind, *said(r)[:3]) for r in found] == [
        ("completion", "c", True, 1.0),
        ("completion", "r", False, -1.0),
        ("completion", "c", True, 7.0),
        ("completion", "r", False, 3.0),
    ]
    assert found[0].prompt == found[1].prompt == [message("system", "s"), message("user", "p")]


def test_a_pair_is_a_list_of_two() -> None:
    scored = {**PAIR, "score_chosen": 7, "score_rejected": 3}
    own = {"prompt": "p", "answers": ["a", "b", "c"], "ranks": [2, 1, 2]}
    found = list(as_lists([read(PAIR), read(scored), read(own)]))
    assert [r.scores for r in found] == [(1.0, 0.0), (7.0, 3.0), (-2.0, -1.0, -2.0)]
    assert [[answer[0]["content"] for answer in r.answers] for r in found] == [["c", "r"], ["c", "r"], ["a", "b", "c"]]
    assert {r.kind for r in found} == {"list"}


def test_pairs_that_are_of_no_use_stay_so() -> None:
    same = read({**PAIR, "rejected": "c"})
    answers = [[message("user", prompt), message("assistant", "x" + prompt)] for prompt in "ab"]
    apart = read({"chosen": answers[0], "rejected": answers[1]})
    assert [r.problem for r in as_answers([same, apart])] == [EQUAL, EQUAL, OTHER_PROMPT, OTHER_PROMPT]
    assert [r.problem for r in as_lists([same, apart])] == [EQUAL, OTHER_PROMPT]
