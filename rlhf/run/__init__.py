"""The run directory: every path in it, how files land there whole or not at all, and what was made from what."""
