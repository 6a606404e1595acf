"""What the rows about security share."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from scripts.reliability.lab import Done

SAFE, INTEGRITY = 9, 4


def shuffled(items: list[Any], seed: int) -> list[Any]:
    """In an order of the seed's."""
    return random.Random(seed).sample(items, len(items))


def refused(done: Done, mark: Path, codes: tuple[int, ...]) -> None:
    """It ended with one of the codes, in words, and nothing was run."""
    assert not mark.exists(), f"code was run; exit {done.code}: {done.err[-500:]}"
    assert done.code in codes, f"expected exit {codes}, found {done.code}: {done.err[-500:]}"
    assert "Traceback" not in done.err, done.err[-800:]
