"""All rows: importing this module enters every scenario."""

from scripts.reliability import (
    crashes,
    damage,
    escapes,
    full_disk,
    hostile_text,
    kills,
    numerics,
    places,
    ranks,
    security,
    sockets,
    starts,
    stops,
)
from scripts.reliability.row import ROWS

__all__ = [
    "ROWS",
    "crashes",
    "damage",
    "escapes",
    "full_disk",
    "hostile_text",
    "kills",
    "numerics",
    "places",
    "ranks",
    "security",
    "sockets",
    "starts",
    "stops",
]
