"""Files that are read, and every way in which they can be broken."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rlhf.data.readers import read_file
from rlhf.errors import DataError

Write = Callable[[str, Any], str]
ROWS = [{"prompt": "a", "completion": "b\nc"}, {"prompt": "ä€😀", "completion": ""}]


def rows(path: str) -> list[dict[str, Any]]:
    return [row for _, row in read_file(Path(path))]


def places(path: str) -> list[str]:
    return [place.removeprefix(f"{path}:") for place, _ in read_file(Path(path))]


def test_json_lines(write: Write) -> None:
    path = write("a.jsonl", ROWS)
    assert rows(path) == ROWS
    assert places(path) == ["1", "2"]


def test_json_lines_with_bom_blank_lines_and_crlf(write: Write) -> None:
    path = write("a.jsonl", b'\xef\xbb\xbf{"a": 1}\r\n\r\n  {"a": 2}\r\n\n')
    assert rows(path) == [{"a": 1}, {"a": 2}]
    assert places(path) == ["1", "3"]


def test_json_list(write: Write) -> None:
    path = write("a.json", json.dumps(ROWS, indent=1))
    assert rows(path) == ROWS
    assert places(path) == ["2", "6"]
    assert rows(write("b.json", "[]")) == []


def test_json_file_with_one_row_per_line(write: Write) -> None:
    assert rows(write("a.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]
    assert rows(write("b.json", '{"a": 1}')) == [{"a": 1}]


def test_compressed(write: Write) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    assert rows(write("a.jsonl.gz", gzip.compress(text))) == ROWS
    assert rows(write("a.json.gz", gzip.compress(json.dumps(ROWS).encode()))) == ROWS


def test_csv(write: Write) -> None:
    path = write("a.csv", '\ufeffprompt,completion\r\na,"b\nc, ""d"""\r\n\r\nä,\r\n')
    assert rows(path) == [{"prompt": "a", "completion": 'b\nc, "d"'}, {"prompt": "ä", "completion": ""}]
    assert places(path) == ["2", "5"]
    assert len(rows(write("long.csv", f"text\n{'x' * 200_000}\n"))[0]["text"]) == 200_000


def test_parquet_and_both_arrow_layouts(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, new in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with pyarrow.OSFile(str(tmp_path / name), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table)
    for name in ("a.parquet", "stream.arrow", "file.arrow"):
        assert rows(str(tmp_path / name)) == ROWS
        assert places(str(tmp_path / name)) == ["row 1", "row 2"]


GOOD = b'{"a": 1}\n'
BROKEN = {
    "cut line": ("a.jsonl", GOOD + b'{"a": "b', ":2:7: expected JSON, found '\"b'"),
    "missing comma": ("a.jsonl", GOOD * 2 + b'{"a": 1 "b": 2}\n', ":3:9: expected JSON, found '\"b\": 2}'"),
    "no value": ("a.jsonl", b'{"a": }\n', ":1:7: expected JSON, found '}'"),
    "end": ("a.jsonl", b'{"a":\n', ":1:6: expected JSON, found the end ("),
    "two rows": ("a.jsonl", b'{"a": 1} {"a": 2}\n', ":1:9: expected one object per line"),
    "list row": ("a.jsonl", GOOD + b"[1, 2]\n", ":2: expected a row as an object {...}, found a list of 2"),
    "number row": ("a.jsonl", b"3\n", ":1: expected a row as an object {...}, found the number 3"),
    "twice": ("a.jsonl", b'{"a": 1, "a": 2}\n', ":1:1: expected JSON, found the key 'a' twice in one object"),
    "NaN": ("a.jsonl", b'{"a": NaN}\n', ":1:1: expected JSON, found NaN, which is not JSON"),
    "deep": ("a.jsonl", b'{"a":' + b"[" * 100_000 + b"\n", ":1:1: expected a row, found JSON nested too deeply"),
    "CP-1252": ("a.jsonl", GOOD + b'{"a": "it\x92s"}\n', ":2:10: expected UTF-8 text, found the byte 0x92"),
    "UTF-16": ("a.jsonl", '{"a": 1}\n'.encode("utf-16"), ": expected UTF-8 text, found UTF-16"),
    "NUL": ("a.jsonl", GOOD + b'{"a": "\0"}\n', ":2:8: expected text, found a NUL byte"),
    "deep enough": ("a.jsonl", b'{"a":' + b"[" * 101 + b"]" * 101 + b"}\n", ":1:1: expected a row, found JSON nested"),
    "huge": ("a.jsonl", b'{"a": 1e999}\n', ":1:1: expected JSON, found 1e999, which is too large for a number"),
    "digits": ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", ":1:1: expected JSON, found a number of thousands of digits"),
    "zip": ("a.jsonl", b"PK\x03\x04\x14\0", ":1: expected UTF-8 text, found a zip archive\n  Unpack it."),
    "pickle": ("a.csv", b"\x80\x04\x95", ":1: expected UTF-8 text, found a pickle, which is never read"),
    "named wrong": (
        "a.jsonl",
        gzip.compress(GOOD),
        ":1: expected UTF-8 text, found a gzip file\n  Name it so: a.jsonl.gz",
    ),
    "long": ("a.jsonl", b"x" * (65 << 20), ":1: expected lines of at most 64 MiB, found a longer one"),
    "gzip": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-12], ": expected a whole gzip file, found damage"),
    "no gzip": ("a.jsonl.gz", GOOD, ": expected a whole gzip file, found damage"),
    "list cut": ("a.json", b'[{"a": 1},\n {"a": 2}', ":2:10: expected ',' or ']', found the end"),
    "list comma": ("a.json", b'[{"a": 1}\n {"a": 2}]', ":2:2: expected ',' or ']', found '{\"a\": 2}]'"),
    "list item": ("a.json", b'[\n{"a": 1},\n3]', ":3: expected a row as an object"),
    "list more": ("a.json", b'[{"a": 1}] x', ":1:12: expected the end of the file, found 'x'"),
    "list bytes": ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', ":2:8: expected UTF-8 text, found the byte 0xff"),
    "one object": ("a.json", b'{\n "a": 1\n}\n', ":1: expected a list of rows [...] or one object per line"),
    "csv fields": ("a.csv", b"a,b\n1,2\n1,2,3\n", ":3: expected 2 fields, found 3"),
    "csv quote": ("a.csv", b'a,b\n1,"2\n', ":2: expected CSV, found unexpected end of data"),
    "csv header": ("a.csv", b"a,a\n1,2\n", ":1: expected a header with one distinct name per column"),
    "parquet": ("a.parquet", b"PAR1 no PAR1", ": expected a Parquet file, found damage"),
    "arrow": ("a.arrow", b"no", ": expected an Arrow file, found damage"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_name_their_place(case: str, write: Write) -> None:
    name, content, message = BROKEN[case]
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        rows(path)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"{path}{message}"), str(caught.value)


def test_a_broken_line_is_reported_after_the_rows_before_it(write: Write) -> None:
    reader = read_file(Path(write("a.jsonl", GOOD * 1000 + b"{")))
    assert sum(1 for _ in zip(range(1000), reader, strict=False)) == 1000
    with pytest.raises(DataError, match=":1001:2: expected JSON"):
        next(reader)


def test_a_list_in_one_long_line_is_read(write: Write) -> None:
    row = '{"a": "' + "x" * (1 << 20) + '"}'
    assert len(rows(write("a.json", f"[{','.join([row] * 66)}]"))) == 66


def test_damage_in_arrow_files_is_told_and_never_ends_the_process(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"a": f"text {i}"} for i in range(300)])
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    good = sink.getvalue().to_pybytes()
    path, refused = tmp_path / "a.arrow", 0
    for at in range(7, len(good), 97):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x80]) + good[at + 1 :])
        try:
            rows(str(path))
        except DataError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 20


def test_values_without_a_like_in_python_name_their_row(tmp_path: Path) -> None:
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"a", b"\xff"]).buffers())
    dates = pyarrow.array([0, 2**62], pyarrow.timestamp("ms"))
    for column in (latin, dates):
        pyarrow.parquet.write_table(pyarrow.table({"a": column}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="a.parquet:row 2: expected plain values, found one that cannot be read"):
            rows(str(tmp_path / "a.parquet"))


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="expected one distinct name per column, found text, text"):
        rows(str(tmp_path / "a.parquet"))
