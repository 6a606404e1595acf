"""All rows: importing this module enters every scenario."""

from scripts.reliability import kills, starts, stops
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "kills", "starts", "stops"]
