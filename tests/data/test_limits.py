"""What becomes of rows that are too long."""

from __future__ import annotations

import pytest

from rlhf.data.limits import (
    FEW_ANSWERS,
    LONG,
    LONG_ANSWER,
    LONG_PROMPT,
    NO_ROOM,
    Cut,
    Limits,
    cut,
    cut_list,
    limits_of,
)
from rlhf.errors import RecipeError
from rlhf.recipe.schema import DataBlock


@pytest.mark.parametrize(
    ("prompt", "answers", "maximum", "rule", "expected"),
    [
        (6, [4], None, "drop", Cut()),
        (6, [5], None, "drop", Cut(LONG)),
        (6, [2, 5], None, "drop", Cut(LONG)),
        (6, [2], 6, "drop", Cut()),
        (6, [2], 5, "drop", Cut(LONG_PROMPT)),
        (6, [5], None, "truncate_prompt", Cut(prompt=1)),
        (6, [2, 5], None, "truncate_prompt", Cut(prompt=1)),
        (6, [9], None, "truncate_prompt", Cut(prompt=5)),
        (6, [10], None, "truncate_prompt", Cut(LONG_ANSWER)),
        (0, [11], None, "truncate_prompt", Cut(LONG_ANSWER)),
        (6, [2], 4, "truncate_prompt", Cut(prompt=2)),
        (6, [8], 4, "truncate_prompt", Cut(prompt=4)),
        (6, [5], None, "truncate_answer", Cut(answer=4)),
        (6, [2, 5], None, "truncate_answer", Cut(answer=4)),
        (9, [2], None, "truncate_answer", Cut(answer=1)),
        (10, [1], None, "truncate_answer", Cut(NO_ROOM)),
        (6, [2], 5, "truncate_answer", Cut(LONG_PROMPT)),
        (10, [], None, "drop", Cut()),
        (11, [], None, "drop", Cut(LONG)),
        (11, [], None, "truncate_answer", Cut(LONG)),
        (11, [], None, "truncate_prompt", Cut(prompt=1)),
        (11, [], None, "error", Cut(LONG)),
    ],
)
def test_cut(prompt: int, answers: list[int], maximum: int | None, rule: str, expected: Cut) -> None:
    assert cut(prompt, answers, Limits(10, maximum, rule)) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "answers", "rule", "expected"),
    [
        (6, [2, 4], "drop", Cut()),
        (6, [2, 5, 4], "drop", Cut(without=(1,))),
        (6, [5, 4], "drop", Cut(FEW_ANSWERS, without=(0,))),
        (6, [5, 6], "drop", Cut(LONG, without=(0, 1))),
        (6, [2, 10, 5], "truncate_prompt", Cut(prompt=1, without=(1,))),
        (6, [10, 11], "truncate_prompt", Cut(LONG_ANSWER, without=(0, 1))),
        (6, [2, 9], "truncate_answer", Cut(answer=4)),
        (10, [2, 9], "truncate_answer", Cut(NO_ROOM, without=(0, 1))),
        (6, [2, 5], "error", Cut(LONG)),
    ],
)
def test_cut_list(prompt: int, answers: list[int], rule: str, expected: Cut) -> None:
    assert cut_list(prompt, answers, Limits(10, None, rule)) == expected  # type: ignore[arg-type]


def test_prompts_leave_room_for_the_answer() -> None:
    data = DataBlock(path="x", max_length=100)
    assert limits_of(data, "prompts", 60, None).total == 40
    assert limits_of(data, "tokens", 60, None).total == 100
    with pytest.raises(RecipeError, match=r"data.max_length: expected more than sampling.max_new_tokens \(100\)"):
        limits_of(data, "prompts", 100, None)
