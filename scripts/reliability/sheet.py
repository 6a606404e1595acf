"""All rows: importing this module enters every scenario."""

from scripts.reliability import kills, malformed, malformed_data
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "kills", "malformed", "malformed_data"]
