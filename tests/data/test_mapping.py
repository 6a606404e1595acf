"""Columns and templates of a source."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf.data.mapping import Mapping
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.schema import SourceBlock


def mapping(**options: Any) -> Mapping:
    return Mapping(SourceBlock(path="x", **options), "data")


def test_columns_and_templates_add_canonical_names() -> None:
    row = {"question": "2+2?", "answer": "4", "my score": 3.5, "prompt": "old"}
    mapped = mapping(columns={"completion": "answer"}, templates={"prompt": "{{Q}} {question} ({my score})\n"})
    assert mapped("a:1", row) == {**row, "completion": "4", "prompt": "{Q} 2+2? (3.5)\n"}
    assert row["prompt"] == "old"


def test_text_of_a_row_is_never_taken_for_a_template() -> None:
    assert mapping(templates={"text": "<{a}>"})("a:1", {"a": "{b} {0.__class__}"})["text"] == "<{b} {0.__class__}>"


@pytest.mark.parametrize("template", ["{a.b}", "{a[0]}", "{0}{}", "{}", "{a!r}", "{a:>9}", "{a", "a}", "{a.__class__}"])
def test_templates_reach_no_further_than_columns(template: str) -> None:
    with pytest.raises(RecipeError, match="data.templates.text: expected"):
        mapping(templates={"text": template})


def test_a_digit_is_a_column_name_like_any_other() -> None:
    assert mapping(templates={"text": "{0}"})("a:1", {"0": "x"})["text"] == "x"


def test_missing_columns_name_place_recipe_key_and_nearest_column() -> None:
    row = {"question": "a", "answer": "b"}
    for made, key in (
        (mapping(columns={"prompt": "qestion"}), "data.columns.prompt"),
        (mapping(templates={"prompt": "{qestion}"}), "data.templates.prompt"),
    ):
        with pytest.raises(DataError) as caught:
            made("a.jsonl:3", row)
        assert str(caught.value) == (
            "a.jsonl:3: qestion: expected this column, found question, answer\n"
            f"  Did you mean question? It is named in {key} of the recipe."
        )


def test_templates_take_text_and_numbers_only() -> None:
    for value, found in ((None, "null"), (["a"], "a list of 1"), (True, "true"), ({"b": 1}, "an object with b")):
        with pytest.raises(DataError, match=f"a:1: a: expected text or a number, found {found}"):
            mapping(templates={"text": "{a}"})("a:1", {"a": value})


def test_unknown_canonical_names_and_double_definitions() -> None:
    with pytest.raises(RecipeError, match=r"data.columns.promt: expected one of .*\n  Did you mean prompt\?"):
        mapping(columns={"promt": "question"})
    with pytest.raises(RecipeError, match="expected columns or templates to define text, found both"):
        mapping(columns={"text": "a"}, templates={"text": "{a}"})
