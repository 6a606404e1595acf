"""A row of the reliability sheet: a scenario, how often it is tried, and what was seen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.reliability.lab import Lab


@dataclass
class Tally:
    """How often a scenario was tried, and every time that it did not end as it must."""

    tried: int = 0
    violations: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """One try; an exception inside, of an assertion too, is a violation. what: enough to repeat it."""
        self.tried += 1
        try:
            yield
        except Exception as error:  # noqa: BLE001  whatever it is, the next try goes on
            self.violations.append(f"{what}: {type(error).__name__}: {error}"[:2000])

    def remark(self, text: str) -> None:
        """Something that a reader of the table should know, e.g. why fewer were tried than asked."""
        if text not in self.remarks:
            self.remarks.append(text)


Scenario = Callable[["Lab", Tally, int, int], None]  # lab, tally, tries, seed


@dataclass(frozen=True)
class Row:
    """A scenario by its number on the sheet. tries: quick ones for the tests, full ones for the table."""

    id: str
    title: str
    expected: str
    asked: str  # what the sheet asks for, in words
    quick: int
    full: int
    alone: bool  # it starts two ranks or measures time: nothing else runs beside it
    scenario: Scenario

    def run(self, lab: Lab, *, tries: int, seed: int) -> tuple[Tally, float]:
        """(what was seen, seconds)."""
        tally, started = Tally(), time.monotonic()
        self.scenario(lab, tally, tries, seed)
        return tally, time.monotonic() - started


ROWS: dict[str, Row] = {}


def row(
    id: str, title: str, *, expected: str, asked: str, quick: int, full: int, alone: bool = False
) -> Callable[[Scenario], Scenario]:
    """Enter a scenario into the sheet."""

    def enter(scenario: Scenario) -> Scenario:
        assert id not in ROWS, id
        ROWS[id] = Row(id, title, expected, asked, quick, full, alone, scenario)
        return scenario

    return enter
