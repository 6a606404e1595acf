"""All rows: importing this module enters every scenario."""

from scripts.reliability import kills, malformed
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "kills", "malformed"]
