"""What is wrong with a recipe, and how it is said."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Spot(NamedTuple):
    """A line and column, counted from 1, of the file; or the number of a `--set` and its text."""

    line: int
    column: int
    override: str | None = None


_DOT = "\ue02e"  # stands for a dot inside a name, which is not one between two names


def dotted(path: Iterable[object]) -> str:
    """A key as one text: train.lr, rewards.0.kind. Names that hold dots themselves do not get in the way."""
    return ".".join(str(part).replace(".", _DOT) for part in path)


def shown(key: str) -> str:
    """A dotted key as it is told: printable, and not longer than a line."""
    key = key.replace(_DOT, ".")
    return _short(key if key.isprintable() else repr(key), 120)


def index(part: str) -> int | None:
    """The list index that a part of a key stands for, None where it is a name."""
    return int(part) if part.isascii() and part.isdecimal() and len(part) < 10 else None


def told(text: str) -> str:
    """A message without line breaks and other control characters, a long one shortened."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[:_MOST])
    return plain + " ..." * (len(text) > _MOST)


_MOST = 600


@dataclass(frozen=True)
class Problem:
    """One thing to correct."""

    key: str  # dotted: train.lr, rewards.0.kind; empty for the whole file
    what: str  # expected ..., found ...
    fix: str | None = None
    also: tuple[str, ...] = ()  # further keys that the problem is about
    near: tuple[str, ...] = ()  # keys that were probably meant
    spot: Spot | None = None  # where, if that is not where `key` stands


def found(value: Any) -> str:
    """A value in the words of a recipe: 'abc', 3, true, nothing, [1, 2]."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return _short(repr(value))
    try:
        return _short(json.dumps(value, ensure_ascii=False))
    except ValueError:  # an integer of thousands of digits
        return "a very long number"


def _short(text: str, width: int = 60) -> str:
    return text if len(text) <= width else text[: width - 4] + " ..."


def choice(names: Iterable[object], last: str = "or") -> str:
    """`a`, `a or b`, `a, b or c`."""
    words = [str(name) for name in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def closest(name: object, names: Iterable[object], *, cutoff: float = 0.6) -> list[str]:
    """The names that look most like a misspelt one, best first; letters in the wrong order count as near."""
    wanted = _plain(str(name))
    candidates = list(dict.fromkeys(str(n) for n in names))
    swapped = [n for n in candidates if sorted(_plain(n)) == sorted(wanted)]
    by_plain = {_plain(n): n for n in candidates}
    near = [by_plain[n] for n in difflib.get_close_matches(wanted, by_plain, n=3, cutoff=cutoff)]
    return list(dict.fromkeys(swapped + near))[:3]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_").replace(" ", "_")
