"""`--set a.b=c`: changes a recipe's values before they are checked, so that both are checked alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.recipe.document import Document, Mark, Unreadable, parse
from rlhf.recipe.fields import child, chosen, option_at, shape_at
from rlhf.recipe.problems import Problem, Spot, found, index, shown
from rlhf.recipe.schema import Block


def apply_overrides(document: Document, model: type[Block], texts: Sequence[str]) -> list[str]:
    """Apply every `key=value`, the last one wins. Returns what else was changed by it, to be told to the user.

    Setting one of several alternatives (model.from, model.path, model.init) takes the place of another that the file
    gives: the command line wins. What the file says about a value that is replaced (the split of another dataset) goes
    with it. Two alternatives that are both set are left for the checks to refuse.
    """
    keys = [_assign(document, model, text, Spot(number, 0, text)) for number, text in enumerate(texts)]
    return [notice for key in keys if key for notice in _drop_alternatives(document, model, key)]


def _assign(document: Document, model: type[Block], text: str, spot: Spot) -> str | None:
    """Put one value in its place; returns its key, or None when there is no such place."""
    key, equals, raw = (part.strip() for part in text.partition("="))
    path = key.split(".")
    if not equals or not all(path):
        what = f"expected KEY=VALUE such as train.lr=1e-6, found {found(text)}"
        document.problems.append(Problem("", what, spot=spot))
        return None
    for old in [k for k in document.marks if k == key or k.startswith(f"{key}.")]:
        del document.marks[old]
    document.marks[key] = Mark(spot, spot, raw)
    container = document.values
    for depth in range(1, len(path)):
        if not _has_room(document, container, path[:depth], spot):
            return None
        container = _enter(document, model, path[:depth], container, spot)
    if not _has_room(document, container, path, spot):
        return None
    _put(container, path[-1], _value(document, model, path, raw, spot))
    return key


def _has_room(document: Document, container: Any, path: list[str], spot: Spot) -> bool:
    """Whether `container` can hold the last part of `path`; a problem is noted if not."""
    part, number = path[-1], index(path[-1])
    if isinstance(container, dict) or (isinstance(container, list) and number is not None and number <= len(container)):
        return True
    block = ".".join(path[:-1])
    if isinstance(container, list):
        what = f"expected an index from 0 to {len(container)}, found {shown(part)}"
    else:
        what = f"expected {block} to be a block, found {found(container)}"
    document.problems.append(Problem(".".join(path), what, spot=spot))
    return False


def _enter(document: Document, model: type[Block], path: list[str], container: Any, spot: Spot) -> Any:
    """What stands at `path`; where nothing does, a new block, or a list of the schema's default items."""
    inner = child(container, path[-1])
    if inner is None:
        option = option_at(model, path, document.values)
        items = option.default if option is not None and option.shape.is_list else None
        inner = {} if items is None else [v.model_dump(mode="json", by_alias=True) for v in items]
        document.marks[".".join(path)] = Mark(spot, spot)
        _put(container, path[-1], inner)
    return inner


def _put(container: Any, part: str, value: Any) -> None:
    if isinstance(container, dict):
        container[part] = value
    else:
        container[int(part) :] = [value, *container[int(part) + 1 :]]


def _value(document: Document, model: type[Block], path: list[str], raw: str, spot: Spot) -> Any:
    key, before = ".".join(path), len(document.problems)
    try:
        value = parse(document, raw, lambda mark: spot, at=key)
    except Unreadable as error:
        document.problems.append(error.problem)
        return None
    shape = shape_at(model, path, document.values)
    # The shell has taken the quotes: where text belongs, 2024 and #### are text.
    if shape is not None and shape.is_text and not isinstance(value, (str, list, dict)) and not raw.startswith("!"):
        del document.problems[before:]  # so is a number that is none for being too large
        return None if raw in ("", "~", "null") else raw
    return value


def _drop_alternatives(document: Document, model: type[Block], key: str) -> Iterator[str]:
    path = key.split(".")
    values = document.values
    for depth, part in enumerate(path):
        shape = shape_at(model, path[:depth], document.values)
        for block in chosen(shape, values) if shape is not None and isinstance(values, dict) else ():
            others = {k for group in block.alternatives if part in group for k in group} - {part}
            others |= {k for k in block.qualifiers.get(part, ()) if k in values}
            for other in sorted(others) if not _is_absent(values.get(part)) else ():
                full = ".".join([*path[:depth], other])
                if not _is_absent(values.get(other)) and not _is_set(document, full):
                    yield f"{document.place(key)} replaces {full} of {document.place(full)}"
                    del values[other]
        values = child(values, part)


def _is_absent(value: Any) -> bool:
    return value is None or value == 0 or value == [] or value == ""


def _is_set(document: Document, key: str) -> bool:
    return any(
        mark.value.override is not None for k, mark in document.marks.items() if k == key or k.startswith(f"{key}.")
    )
