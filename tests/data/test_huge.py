"""Rows that are too long to be tokenised are told so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data.examples import load_examples
from rlhf.data.huge import HUGE
from rlhf.data.limits import LONG
from rlhf.errors import DataError
from rlhf.recipe.schema import DataBlock

Write = Callable[[str, Any], str]
LARGE = "word " * (HUGE // 4)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("tokens", {"prompt": "a", "completion": LARGE}),
        ("tokens", {"text": LARGE}),
        ("pairs", {"prompt": LARGE, "chosen": "b", "rejected": "c"}),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": LARGE}),
        ("prompts", {"prompt": LARGE, "completion": "b"}),
    ],
)
def test_huge_rows_are_dropped_or_refused_but_never_tokenised(
    kind: Any, row: dict[str, str], write: Write, plain: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {name: "z" if name == "rejected" else "a" for name in row}
    path = write("a.jsonl", [small, row])
    loaded = load_examples(DataBlock(path=path, max_length=64), plain, kind, 0, max_new_tokens=8)
    assert (len(loaded.train), dict(loaded.report.sources[0].dropped)) == (1, {LONG: 1})
    for on_long in ("truncate_prompt", "error"):
        with pytest.raises(DataError, match=r"a.jsonl:2: expected at most \d+ tokens, found 1,250,\d+ characters"):
            load_examples(DataBlock(path=path, max_length=64, on_long=on_long), plain, kind, 0, max_new_tokens=8)


def test_a_list_with_a_huge_answer_is_refused(write: Write, plain: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "a", "answers": ["b", "c", LARGE], "scores": [1, 2, 3]}]
    with pytest.raises(DataError, match="a.jsonl:1: expected at most"):
        load_examples(DataBlock(path=write("a.jsonl", rows), max_length=64), plain, "lists", 0)


def test_a_huge_row_that_may_fit_is_tokenised(write: Write, plain: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", [{"text": " " * HUGE + "a"}])
    loaded = load_examples(DataBlock(path=path, max_length=2 * HUGE), plain, "tokens", 0)
    assert len(loaded.train) == 1
