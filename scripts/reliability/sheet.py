"""All rows: importing this module enters every scenario."""

from scripts.reliability import escapes, hostile_text, kills, security
from scripts.reliability.row import ROWS

__all__ = ["ROWS", "escapes", "hostile_text", "kills", "security"]
