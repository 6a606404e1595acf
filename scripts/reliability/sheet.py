"""All rows: importing this module enters every scenario."""

from scripts.reliability import crashes, damage, full_disk, kills, numerics, places, ranks, sockets, starts, stops
from scripts.reliability.row import ROWS

__all__ = [
    "ROWS",
    "crashes",
    "damage",
    "full_disk",
    "kills",
    "numerics",
    "places",
    "ranks",
    "sockets",
    "starts",
    "stops",
]
