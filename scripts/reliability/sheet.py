"""All rows: importing this module enters every scenario."""

from scripts.reliability import equivalence, kills
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "equivalence", "kills"]
