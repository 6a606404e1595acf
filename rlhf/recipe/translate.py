"""Pydantic's errors in the words of a recipe.

Pydantic only says where something is wrong and of what kind; what was expected is read from the schema, what was found
from the file.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf.recipe.document import Document
from rlhf.recipe.fields import Option, Shape, child, chosen, meaning, option_at, options, shape_at, step, tags, walk
from rlhf.recipe.problems import Problem, choice, closest, dotted, found, shown
from rlhf.recipe.schema import Block


def translate(document: Document, model: type[Block], values: Any, error: Any) -> tuple[Problem, tuple[str, ...]]:
    """The problem behind one entry of `ValidationError.errors()`, and the path of the value to blame."""
    path, shape = _locate(model, error["loc"], values)
    kind, key = error["type"], dotted(path)
    if kind == "extra_forbidden":
        return _unknown_key(document, model, path, values), path
    if kind == "conflict":
        return Problem(key, error["ctx"]["message"], also=tuple(f"{key}.{k}" for k in error["ctx"]["keys"])), path
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, str(shape.tag))
        key, shape = dotted(path), Shape(f"one of {', '.join(tags(shape))}", allowed=tuple(tags(shape)))
    value = _at(values, path)
    return Problem(
        key, f"expected {shape.words}, found {_found(document, key, value)}", _hint(model, path, shape, value, values)
    ), path


def _locate(model: type[Block], loc: Iterable[int | str], values: Any) -> tuple[tuple[str, ...], Shape]:
    """A pydantic location without the labels of union members, and the shape that is expected there."""
    shape = Shape("a block of options", blocks=(model,))
    path: list[str] = []
    for part in map(str, loc):
        if shape.tag:  # this part names the member that the tag chose
            shape = Shape("a block of options", blocks=(tags(shape)[part],))
        elif shape.is_either or (shape.is_list and child(values, part) is None):
            break  # the value as a whole is wrong, or the list is too short
        else:
            path.append(part)
            shape, values = step(shape, part, values) or Shape("a value"), child(values, part)
    return tuple(path), shape


def _at(values: Any, path: Iterable[str]) -> Any:
    for part in path:
        values = child(values, part)
    return values


def _found(document: Document, key: str, value: Any) -> str:
    """The value, numbers as they were written."""
    mark = document.marks.get(key)
    is_word = isinstance(value, (bool, int, float))
    return mark.text if is_word and mark is not None and mark.text else found(value)


def _hint(model: type[Block], path: tuple[str, ...], shape: Shape, value: Any, values: Any) -> str | None:
    """What to write instead."""
    option = option_at(model, path, values)
    if shape.allowed and value is not None:
        near = closest(value, shape.allowed)
        return f"did you mean {near[0]}?" if near else _about(option)
    if shape.tag and isinstance(value, str):
        near = closest(value, tags(shape))
        return f"write {path[-1]}: {{{shape.tag}: {near[0]}}}" if near else _about(option)
    if isinstance(value, str) and shape.words.startswith(("a number", "a whole number")) and _is_number(value):
        return "write the number without quotes"
    if shape.words == "true or false" and str(value).lower() in _TRUTH:
        return f"write {_TRUTH[str(value).lower()]}"
    if shape.is_text and isinstance(value, (bool, int, float)):
        return "put it in quotes to make it text"
    return _about(option)


_TRUTH = {"yes": "true", "on": "true", "1": "true", "no": "false", "off": "false", "0": "false"}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _about(option: Option | None) -> str | None:
    if option is None:
        return None
    default = "" if option.is_required or option.shape.blocks else f" (default {option.default_words()})"
    return f"{option.name}: {option.description}{default}"


def _unknown_key(document: Document, model: type[Block], path: tuple[str, ...], values: Any) -> Problem:
    block, name = path[:-1], path[-1]
    prefix = "".join(f"{part}." for part in block)
    shape = shape_at(model, block, values) or Shape("a value")
    siblings = [key for b in chosen(shape, _at(values, block)) for key in options(b)]
    near = [prefix + key for key in closest(name, siblings)]
    near += [key for key in _elsewhere(model, ".".join(path), name, is_lost=not near) if key not in near]
    other = [tag for tag, b in tags(shape).items() if name in options(b)]
    if "." in name and option_at(model, (*block, *name.split(".")), values) is not None:
        fix = f"dots are for --set: write {name.replace('.', ': {')}: ...{'}' * name.count('.')}"
    elif other:
        fix = f"it is a key of {prefix}{shape.tag}: {choice(other)}"
    elif near:
        fix = f"did you mean {choice(near[:3])}?"
    else:
        fix = f"keys of {shown(dotted(block)) or 'this recipe'}: {', '.join(dict.fromkeys(siblings))}"
    key = dotted(path)
    mark = document.marks.get(key)
    return Problem(
        key, f"expected a known key, found {found(name)}", fix, near=tuple(near), spot=mark.key if mark else None
    )


def _elsewhere(model: type[Block], key: str, name: str, *, is_lost: bool) -> list[str]:
    """Keys of other blocks with this name; if there is nothing else to offer, keys that read or mean alike."""
    everywhere = list(dict.fromkeys(k for k, _, _ in walk(model)))
    exact = [k for k in everywhere if k.rpartition(".")[2] == name]
    if exact or not is_lost:
        return exact
    alike = closest(name, everywhere, cutoff=0.8) or closest(key, everywhere, cutoff=0.9)
    return alike or (meaning(model, name) if len(name) > 5 else [])
