"""From the columns of a file to the names that the formats know: `columns` and `templates` of a source."""

from __future__ import annotations

import difflib
import string
from collections.abc import Iterable
from typing import Any

from rlhf.data.readers import describe, name_list
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.schema import SourceBlock

# What `columns` and `templates` may define.
NAMES = (
    "prompt",
    "completion",
    "text",
    "messages",
    "chosen",
    "rejected",
    "margin",
    "score_chosen",
    "score_rejected",
    "win_rate_chosen",
    "win_rate_rejected",
    "label",
    "score",
    "density",
    "answers",
    "scores",
    "ranks",
    "answer",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
)


class Mapping:
    """A source's `columns` and `templates`, checked once and applied to every row.

    The file's own columns stay as they are, so that rewards find their answer columns; a canonical name that is also a
    column of the file is replaced.
    """

    def __init__(self, source: SourceBlock, key: str) -> None:
        for option, names in (("columns", source.columns), ("templates", source.templates)):
            for name in names:
                _check_name(name, f"{key}.{option}.{name}")
        both = sorted(source.columns.keys() & source.templates.keys())
        if both:
            raise RecipeError(
                f"expected columns or templates to define {both[0]}, found both", where=f"{key}.templates"
            )
        self._columns = source.columns
        self._templates = {
            name: (text, _fields(text, f"{key}.templates.{name}")) for name, text in source.templates.items()
        }
        self._key = key
        self.defines = frozenset(source.columns) | frozenset(source.templates)

    def __call__(self, where: str, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its canonical names added."""
        mapped = dict(row)
        for name, column in self._columns.items():
            mapped[name] = _column(row, column, where, f"{self._key}.columns.{name}")
        for name, (text, fields) in self._templates.items():
            key = f"{self._key}.templates.{name}"
            values = {field: _text(_column(row, field, where, key), where, field) for field in fields}
            mapped[name] = "".join(before + (values[field] if field else "") for before, field in _pieces(text))
        return mapped


def _check_name(name: str, where: str) -> None:
    if name not in NAMES:
        raise RecipeError(
            f"expected one of {', '.join(NAMES)}, found {name!r}", where=where, fix=did_you_mean(name, NAMES)
        )


def _pieces(text: str) -> list[tuple[str, str | None]]:
    """(text before a field, field name), ending with the text after the last field."""
    return [(before, field) for before, field, _, _ in string.Formatter().parse(text)]


def _fields(text: str, where: str) -> list[str]:
    """The columns that a template names. Only plain names: `{a.b}` and `{a[0]}` would reach into objects."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        raise RecipeError(
            f"expected text with {{column}} in it, found {text!r} ({error})",
            where=where,
            fix="Write {{ and }} for braces that are text.",
        ) from error
    for _, field, form, conversion in parsed:
        if field is not None and (not field or form or conversion or set(field) & set(".[]")):
            raise RecipeError(
                f"expected only plain {{column}} fields, found {{{field}}} in {text!r}",
                where=where,
                fix="Name a column; attributes, indices, formats and conversions are not available.",
            )
    return [field for _, field, _, _ in parsed if field is not None]


def _column(row: dict[str, Any], column: str, where: str, key: str) -> Any:
    if column not in row:
        raise DataError(
            f"{column}: expected this column, found {name_list(row)}",
            where=where,
            fix=f"{did_you_mean(column, row)} It is named in {key} of the recipe.".strip(),
        )
    return row[column]


def _text(value: Any, where: str, field: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{field}: expected text or a number, found {describe(value)}", where=where)


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """`Did you mean ...?` if one of the words is near, else nothing."""
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"Did you mean {near[0]}?" if near else ""
