"""Every row is looked at before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.data.records import check_records
from rlhf.errors import DataError
from rlhf.recipe.schema import DataBlock, SourceBlock

GOOD = '{"prompt": "hello", "completion": "world"}\n'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "a", "completion\n', r"rows.jsonl:3:17: expected JSON"),
        ('{"prompt": "a"}\n', r"rows.jsonl:3: completion: expected this column, found prompt"),
        ('{"prompt": "a", "completion": 3}\n', r"rows.jsonl:3: completion: expected text, found the number 3"),
        ("[1]\n", r"rows.jsonl:3: expected a row as an object"),
    ],
)
def test_a_bad_row_is_found_wherever_it_stands(tmp_path: Path, bad: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 2 + bad)
    with pytest.raises(DataError, match=message):
        check_records(DataBlock(path=str(path)), "tokens")
    with pytest.raises(DataError, match=message):
        check_records(DataBlock(path="demo:sft", eval=SourceBlock(path=str(path))), "tokens")
    check_records(DataBlock(path=str(path), limit=2), "tokens")


def test_the_hub_is_left_alone() -> None:
    check_records(DataBlock(path="owner/name"), "tokens")


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, rlhf.data.records; sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
