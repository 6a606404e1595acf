"""All rows: importing this module enters every scenario."""

from scripts.reliability import kills, rewards
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "kills", "rewards"]
