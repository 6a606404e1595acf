"""All rows: importing this module enters every scenario."""

from scripts.reliability import export, kills, outages, rewards
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "export", "kills", "outages", "rewards"]
