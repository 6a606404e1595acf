"""Named choices: a registry holds the functions that one recipe option can choose from, each with its source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Traits:
    """What is true of a preference loss beside its formula: for the trainer, the contract tests and the docs.

    reference: it compares with a reference policy. average, scale: its implicit reward is the log-ratio (without a
    reference: the log-prob), per token or summed, times the option of this name (None: times 1).
    at_reference: options -> its value where policy and reference agree, lengths and scores being equal and as many
    answers good as bad; None: not fixed.
    signs: whose gradient never has the wrong sign (<= 0 on a chosen answer, >= 0 on a rejected one).
    invariant: the same constant added to policy and reference of a row changes nothing.
    unbounded: it has no smallest value (the others never fall below 0).
    couple: what it needs of the whole batch and not of a row alone, see `coupling.py`.
    """

    reference: bool = True
    average: bool = False
    scale: str | None = "beta"
    at_reference: Callable[..., float] | None = None
    signs: Literal["both", "chosen", "rejected", "none"] = "both"
    invariant: bool = True
    unbounded: bool = False
    couple: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Entry:
    """A registered function with the paper it comes from and the first line of its docstring."""

    name: str
    function: Callable[..., Any]
    paper: str
    summary: str
    inputs: tuple[str, ...]  # names of the positional parameters: what a caller must have; the others are options
    traits: Traits = Traits()


class Registry:
    """Functions by name. A name can be taken once, and only by a documented function with a source."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def register(self, name: str, *, paper: str, traits: Traits = Traits()) -> Callable[[F], F]:  # noqa: B008
        """Decorator: enter the function under `name`. `paper` says where the formula is from, with its equation."""

        def enter(function: F) -> F:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            if not paper.strip() or not (function.__doc__ or "").strip():
                raise ValueError(f"{self.kind} {name!r} needs a paper and a docstring")
            summary = (function.__doc__ or "").strip().splitlines()[0]
            parameters = inspect.signature(function).parameters.values()
            inputs = tuple(each.name for each in parameters if each.kind is not inspect.Parameter.KEYWORD_ONLY)
            self._entries[name] = Entry(name, function, paper, summary, inputs, traits)
            return function

        return enter

    def names(self) -> list[str]:
        """All names, in the order of registration."""
        return list(self._entries)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise KeyError(f"no {self.kind} {name!r}; there are {', '.join(self._entries)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())
