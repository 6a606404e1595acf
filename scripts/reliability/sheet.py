"""All rows: importing this module enters every scenario."""

from scripts.reliability import export, kills, lengths, outages, readers, rewards
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "export", "kills", "lengths", "outages", "readers", "rewards"]
