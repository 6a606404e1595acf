"""All rows: importing this module enters every scenario."""

from scripts.reliability import kills, numerics
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "kills", "numerics"]
