"""All rows, in order of their numbers: importing this module enters every scenario."""

import re

from scripts.reliability import (
    crashes,
    damage,
    equivalence,
    escapes,
    export,
    full_disk,
    hostile_text,
    kills,
    lengths,
    malformed,
    malformed_data,
    numerics,
    outages,
    places,
    ranks,
    readers,
    rewards,
    security,
    sockets,
    starts,
    stops,
)
from scripts.reliability.row import ROWS as entered


def _number(id: str) -> tuple[str, int, str]:
    """R2 before R10, S7 before S7b."""
    letter, digits, rest = re.fullmatch(r"([A-Z])(\d+)(.*)", id).groups()  # type: ignore[union-attr]
    return letter, int(digits), rest


ROWS = {id: entered[id] for id in sorted(entered, key=_number)}

__all__ = [
    "ROWS",
    "crashes",
    "damage",
    "equivalence",
    "escapes",
    "export",
    "full_disk",
    "hostile_text",
    "kills",
    "lengths",
    "malformed",
    "malformed_data",
    "numerics",
    "outages",
    "places",
    "ranks",
    "readers",
    "rewards",
    "security",
    "sockets",
    "starts",
    "stops",
]
