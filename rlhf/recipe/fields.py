"""What the blocks say about their keys: names as written in YAML, types in words, defaults.

Messages, `rlhf explain`, `--set` and did-you-mean all read the schema through this file, so they agree with it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from rlhf.recipe.problems import choice, found, index
from rlhf.recipe.schema import Block

SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "a value"}


@dataclass(frozen=True)
class Shape:
    """A type, unwrapped."""

    words: str  # a number > 0
    blocks: tuple[type[Block], ...] = ()  # one for a block, several where a tag chooses
    tag: str | None = None  # the key that chooses among blocks: name or kind
    item: Shape | None = None  # of a list, or of the values of a block with free keys
    is_list: bool = False
    is_text: bool = False
    is_either: bool = False  # several types that no tag tells apart
    allowed: tuple[Any, ...] = ()  # the values of a choice


@dataclass(frozen=True)
class Option:
    """One key of a block."""

    name: str  # as written in YAML
    shape: Shape
    description: str
    default: Any
    is_required: bool

    def default_words(self) -> str:
        """The default as it would be written."""
        default = self.default
        if isinstance(default, Block):
            default = default.model_dump(mode="json", by_alias=True, exclude_unset=True)
        elif isinstance(default, (list, tuple)):
            default = [v.model_dump(mode="json", by_alias=True, exclude_none=True) if isinstance(v, Block) else v
                       for v in default]  # fmt: skip
        is_plain = isinstance(default, str) and default.isprintable() and default
        return "null" if default is None else default if is_plain else found(default)


@functools.cache
def options(block: type[Block]) -> dict[str, Option]:
    """The keys of a block, in the order of its definition."""
    return {option.name: option for option in map(_option, block.model_fields, block.model_fields.values())}


def _option(attribute: str, info: FieldInfo) -> Option:
    name = info.alias or attribute
    default = None if info.default is PydanticUndefined else info.default
    shape = shape_of(info.annotation, info.metadata, info.discriminator)
    return Option(name, shape, info.description or "", default, info.is_required())


def shape_of(annotation: Any, metadata: Sequence[Any] = (), tag: Any = None) -> Shape:
    """The shape of a field's annotation with the constraints that pydantic has collected for it."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        for extra in args[1:]:
            metadata = [*metadata, *(extra.metadata if isinstance(extra, FieldInfo) else [extra])]
            tag = extra.discriminator if isinstance(extra, FieldInfo) else tag
        return shape_of(args[0], metadata, tag)
    if origin in (Union, types.UnionType):
        return _union(args, metadata, tag)
    if origin is Literal:
        return Shape(f"one of {', '.join(map(str, args))}" if len(args) > 1 else str(args[0]), allowed=args)
    if origin in (list, tuple):
        item = shape_of(args[0])
        size = f"{len(args)} " if origin is tuple else ""
        least = "".join(f", at least {m.min_length}" for m in metadata if isinstance(m, MinLen))
        return Shape(f"a list of {size}{_plural(item.words)}{least}", item=item, is_list=True)
    if origin is dict:
        item = shape_of(args[1])
        return Shape(f"names with {_plural(item.words)}", item=item)
    if annotation in SCALARS:
        return Shape(f"{SCALARS[annotation]} {_bounds(metadata)}".strip(), is_text=annotation is str)
    return Shape("a block of options", blocks=(annotation,))


def _union(args: tuple[Any, ...], metadata: Sequence[Any], tag: Any) -> Shape:
    members = [arg for arg in args if arg is not type(None)]
    if tag is not None:
        return Shape("a block of options", blocks=tuple(members), tag=str(tag))
    if len(members) == 1:
        return shape_of(members[0], metadata)
    return Shape(choice(shape_of(member).words for member in members), is_either=True)


def _bounds(metadata: Sequence[Any]) -> str:
    words = []
    for limit in metadata:
        match limit:
            case Gt():
                words.append(f"> {limit.gt}")
            case Ge():
                words.append(f">= {limit.ge}")
            case Lt():
                words.append(f"< {limit.lt}")
            case Le():
                words.append(f"<= {limit.le}")
    return " and ".join(words)


def _plural(words: str) -> str:
    for one, many in (("a whole number", "whole numbers"), ("a number", "numbers"), ("a block", "blocks")):
        if words.startswith(one):
            return many + words[len(one) :]
    return "values" if words == "a value" else words


def tags(shape: Shape) -> dict[str, type[Block]]:
    """The values of a tag and the blocks they stand for."""
    return {str(options(block)[shape.tag].shape.allowed[0]): block for block in shape.blocks} if shape.tag else {}


def chosen(shape: Shape, value: Any) -> tuple[type[Block], ...]:
    """The blocks that a value can be: one if the tag tells, else all."""
    known = tags(shape)
    name = value.get(shape.tag) if isinstance(value, dict) else None
    return (known[name],) if isinstance(name, str) and name in known else shape.blocks


def shape_at(model: type[Block], path: Sequence[str], values: Any) -> Shape | None:
    """The shape of the key at `path`, where `values` (the recipe as written) tells which tag is meant."""
    shape = Shape("a block of options", blocks=(model,))
    for part in path:
        inner = step(shape, part, values)
        if inner is None:
            return None
        shape, values = inner, child(values, part)
    return shape


def step(shape: Shape, part: str, values: Any) -> Shape | None:
    """The shape one key or list index further down."""
    if shape.item is not None:
        return shape.item if index(part) is not None or not shape.is_list else None
    for block in chosen(shape, values):
        if part in options(block):
            return options(block)[part].shape
    return None


def option_at(model: type[Block], path: Sequence[str], values: Any) -> Option | None:
    """The option with the key at `path`; None for list items and unknown keys."""
    parent = shape_at(model, path[:-1], values)
    for part in path[:-1]:
        values = child(values, part)
    for block in chosen(parent, values) if parent and path else ():
        if path[-1] in options(block):
            return options(block)[path[-1]]
    return None


def child(values: Any, part: str) -> Any:
    """The value under a key or list index, None where there is none."""
    if isinstance(values, dict):
        return values.get(part)
    number = index(part)
    if isinstance(values, list) and number is not None and number < len(values):
        return values[number]
    return None


def walk(model: type[Block], prefix: str = "", tag: str = "") -> Iterator[tuple[str, str, Option]]:
    """Every key of a recipe, depth first: (dotted key, the tag under which it exists or "", option)."""
    for name, option in options(model).items():
        key = f"{prefix}{name}"
        yield key, tag, option
        inner, dots = option.shape, f"{key}."
        if inner.is_list and inner.item is not None:
            inner, dots = inner.item, f"{key}.0."
        for block in inner.blocks:
            label = f"{dots}{inner.tag}={options(block)[inner.tag].shape.allowed[0]}" if inner.tag else tag
            yield from walk(block, dots, label)


def meaning(model: type[Block], name: str) -> list[str]:
    """Keys whose description holds the words of a name: `learning_rate` finds `train.lr`."""
    words = name.replace("_", " ").replace("-", " ").lower()
    return list(dict.fromkeys(key for key, _, option in walk(model) if words in option.description.lower()))
