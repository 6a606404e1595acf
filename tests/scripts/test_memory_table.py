"""The page on memory is what the script writes around its table, and the table has the order that it explains."""

from __future__ import annotations

import argparse
from pathlib import Path

from scripts.memory_table import LAYOUTS, page

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


def test_the_page_is_current():
    text = PAGE.read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert text == page(table, argparse.Namespace(model="small", dtype="fp32"))


def test_sharing_takes_less_than_lora_and_lora_less_than_full():
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines()[6:]]
    rows = [row for row in rows if row[0] in ("1", "2")]
    assert len(rows) == 2 * len(LAYOUTS)
    for full, lora, shared in (rows[:3], rows[3:]):
        assert (full[1], lora[1], shared[1]) == tuple(LAYOUTS.values())
        for sizes in zip(full[2:], lora[2:], shared[2:], strict=True):
            most, middle, least = map(float, sizes)
            assert most > middle > least > 0
