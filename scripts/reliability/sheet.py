"""All rows: importing this module enters every scenario."""

from scripts.reliability import crashes, kills
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "crashes", "kills"]
