"""Data files -> rows, each with its place `file:line`.

Text formats are read by hand, line by line: a broken row must name its line and column, and no library may guess a type
from the first thousand rows and fail, or convert, at row 100,000.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from rlhf.errors import DataError

Row = tuple[str, dict[str, Any]]  # its place, its columns

TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet", ".arrow")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_LONGEST_LINE = 64 << 20  # bytes; no row is that long, and memory must not depend on what a file holds
_LONGEST_LIST = 2 << 30  # of a `.json` file that is one line; it is held in memory
_DEEPEST = 100  # lists and objects inside each other in a row
_PLACES_SHOWN = 40
_UNFIT = (ValueError, TypeError, KeyError)  # what the types that `datasets` registers raise on a hostile description
_NAMES_SHOWN = 12
# What a file of another kind begins with, and what to do about it.
_MAGIC = (
    (b"\x1f\x8b", "a gzip file", "Name it so: {0}.gz"),
    (b"PK\x03\x04", "a zip archive", "Unpack it."),
    (b"PAR1", "a Parquet file", "Name it so: its ending must be .parquet"),
    (b"ARROW1", "an Arrow file", "Name it so: its ending must be .arrow"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "Unpack it: zstd -d"),
    (b"\xfd7zXZ", "an xz file", "Unpack it: xz -d"),
    (b"BZh", "a bzip2 file", "Unpack it: bzip2 -d"),
    *((b"\x80" + bytes([version]), "a pickle, which is never read", None) for version in range(2, 6)),
)


def suffix_of(path: Path) -> str | None:
    """The supported suffix of a file name, None where it has none."""
    return next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), None)


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one data file, in order."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}
    readers.update({".parquet": _read_parquet, ".arrow": _read_arrow})
    suffix = suffix_of(path)
    assert suffix is not None, path
    return readers[suffix.removesuffix(".gz")](path)


# --- bytes -> text -------------------------------------------------------------------------------------------------


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _lines(path: Path, longest: int = _LONGEST_LINE) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends, as text. longest: bytes, of a line."""
    number = 0
    try:
        with _open(path) as file:
            while raw := file.readline(longest + 1):
                number += 1
                if len(raw) > longest:
                    what = f"expected lines of at most {longest >> 20:,} MiB, found a longer one"
                    raise DataError(what, where=f"{path}:{number}")
                yield number, _decode(raw, path, number)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"expected a whole gzip file, found damage after line {number}: {error}", where=str(path)
        ) from error
    except OSError as error:
        what = f"expected a file that can be read, found after line {number}: {error.strerror or error}"
        raise DataError(what, where=str(path)) from error


def _decode(raw: bytes, path: Path, first_line: int) -> str:
    """UTF-8 text of `raw`, which starts at the given line of the file."""
    if first_line == 1:
        if raw.startswith(_UTF16):
            raise DataError(
                "expected UTF-8 text, found UTF-16",
                where=str(path),
                fix=f"Convert it: iconv -f UTF-16 -t UTF-8 {path.name}",
            )
        raw = raw.removeprefix(b"\xef\xbb\xbf")
        for start, kind, fix in _MAGIC:
            if raw.startswith(start):
                fix = fix and fix.format(path.name)
                raise DataError(f"expected UTF-8 text, found {kind}", where=f"{path}:1", fix=fix)
    if (at := raw.find(b"\0")) >= 0:
        raise DataError("expected text, found a NUL byte", where=_place(path, first_line, raw[:at]))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = raw[error.start : error.start + 1]
        looks = byte.decode("cp1252", "replace")
        raise DataError(
            f"expected UTF-8 text, found the byte 0x{byte.hex()} (in Windows-1252 it would be {looks!r})",
            where=_place(path, first_line, raw[: error.start]),
            fix=f"Convert it: iconv -f CP1252 -t UTF-8 {path.name}",
        ) from error


def _place(path: Path, first_line: int, before: bytes | str) -> str:
    """`file:line:column` of what follows `before`."""
    newline = b"\n" if isinstance(before, bytes) else "\n"
    line = first_line + before.count(newline)  # type: ignore[arg-type]
    return f"{path}:{line}:{len(before) - before.rfind(newline)}"  # type: ignore[arg-type]


# --- JSON ----------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} twice in one object")
    return made


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is not JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{digits[:_PLACES_SHOWN]}, which is too large for a number")
    return number


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_finite)


def _parse(text: str, at: int, path: Path, first_line: int) -> tuple[Any, int]:
    """The JSON value at `text[at]` and where it ends."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        if text.count("[", at, end) + text.count("{", at, end) > _DEEPEST and _is_deep(value):
            raise RecursionError
        return value, end
    except json.JSONDecodeError as error:
        raise DataError(
            f"expected JSON, found {_snippet(text, error.pos)} ({error.msg})",
            where=_place(path, first_line, text[: error.pos]),
        ) from error
    except RecursionError as error:
        raise DataError(
            "expected a row, found JSON nested too deeply", where=_place(path, first_line, text[:at])
        ) from error
    except ValueError as error:
        found = "a number of thousands of digits" if "digits" in str(error) and "limit" in str(error) else error
        raise DataError(f"expected JSON, found {found}", where=_place(path, first_line, text[:at])) from error


def _is_deep(value: Any) -> bool:
    layer = [value]
    for _ in range(_DEEPEST):
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not layer:
            return False
    return True


def _snippet(text: str, at: int) -> str:
    rest = text[at:].split("\n", 1)[0].rstrip("\r")
    if not rest:
        return "the end"
    return repr(rest[:_PLACES_SHOWN] + ("..." if len(rest) > _PLACES_SHOWN else ""))


def _row(value: Any, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"expected a row as an object {{...}}, found {describe(value)}", where=place)
    return place, value


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            yield _whole_line(line.rstrip("\r\n"), path, number)


def _whole_line(line: str, path: Path, number: int) -> Row:
    value, end = _parse(line, len(line) - len(line.lstrip()), path, number)
    if line[end:].strip():
        raise DataError(
            f"expected one object per line, found {_snippet(line, end)} after it",
            where=_place(path, number, line[:end]),
        )
    return _row(value, f"{path}:{number}")


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows; or one row per line, as many `.json` files have it."""
    text = "".join(line for _, line in _lines(path, _LONGEST_LIST))
    at = len(text) - len(text.lstrip())
    if text[at : at + 1] == "[":
        yield from _read_list(text, at, path)
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if len(lines) > 1 and _is_one_object(text, at):
        raise DataError(
            "expected a list of rows [...] or one object per line, found one object over several lines",
            where=f"{path}:{lines[0][0]}",
            fix="Put the rows in a list: [{...}, {...}].",
        )
    for number, line in lines:
        yield _whole_line(line, path, number)


def _is_one_object(text: str, at: int) -> bool:
    try:
        value, end = _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not text[end:].strip()


def _read_list(text: str, at: int, path: Path) -> Iterator[Row]:
    line, counted = 1, 0

    def skip_space(position: int) -> int:
        while text[position : position + 1].isspace():
            position += 1
        return position

    at = skip_space(at + 1)
    while text[at : at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        value, at = _parse(text, at, path, 1)
        yield _row(value, f"{path}:{line}")
        at = skip_space(at)
        if text[at : at + 1] == ",":
            at = skip_space(at + 1)
        elif text[at : at + 1] != "]":
            raise DataError(f"expected ',' or ']', found {_snippet(text, at)}", where=_place(path, 1, text[:at]))
    if text[at + 1 :].strip():
        at = skip_space(at + 1)
        raise DataError(f"expected the end of the file, found {_snippet(text, at)}", where=_place(path, 1, text[:at]))


# --- CSV -----------------------------------------------------------------------------------------------------------


def _read_csv(path: Path) -> Iterator[Row]:
    """Rows of a CSV file with a header line. All values are text."""
    csv.field_size_limit(_LONGEST_LINE)  # the module's own limit of 128 KiB is shorter than real documents
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] | None = None
    line = 1
    try:
        for values in reader:
            place, line = f"{path}:{line}", reader.line_num + 1
            if header is None:
                header = _header(values, place)
            elif values:
                if len(values) != len(header):
                    raise DataError(f"expected {len(header)} fields, found {len(values)}", where=place)
                yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise DataError(f"expected CSV, found {error}", where=f"{path}:{line}") from error


def _header(names: list[str], place: str) -> list[str]:
    if any(not name.strip() for name in names) or len(set(names)) < len(names):
        raise DataError(f"expected a header with one distinct name per column, found {name_list(names)}", where=place)
    return names


# --- Arrow ---------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[Row]:
    # Imported here: it takes most of a second, which recipes over text files should not pay.
    import pyarrow
    import pyarrow.parquet

    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        yield from _batch_rows(batches, path)
    except (pyarrow.ArrowException, OSError, *_UNFIT) as error:
        raise DataError(f"expected a Parquet file, found damage: {_first_line(error)}", where=str(path)) from error


def _read_arrow(path: Path) -> Iterator[Row]:
    import pyarrow  # here for the same reason

    try:
        with pyarrow.OSFile(str(path)) as file:  # mapped into memory, a damaged one could end the process
            try:
                batches: Any = pyarrow.ipc.open_stream(file)
            except pyarrow.ArrowInvalid:  # the other of Arrow's two file layouts
                reader = pyarrow.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield from _batch_rows(batches, path)
    except (pyarrow.ArrowException, OSError, *_UNFIT) as error:
        raise DataError(f"expected an Arrow file, found damage: {_first_line(error)}", where=str(path)) from error


def _batch_rows(batches: Any, path: Path) -> Iterator[Row]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            what = f"expected one distinct name per column, found {name_list(sorted(names))}"
            raise DataError(what, where=str(path))
        for row in _plain(batch, path, number):
            number += 1
            yield f"{path}:row {number}", row


def _plain(batch: Any, path: Path, before: int) -> list[dict[str, Any]]:
    """The rows of a batch that comes after `before` others."""
    try:
        return _checked(batch)
    except (ValueError, OverflowError):
        for i in range(batch.num_rows):
            try:
                _checked(batch.slice(i, 1))
            except (ValueError, OverflowError) as error:
                what = f"expected plain values, found one that cannot be read: {_first_line(error)}"
                raise DataError(what, where=f"{path}:row {before + i + 1}") from error
        raise


def _checked(batch: Any) -> list[dict[str, Any]]:
    """Python values. Raises for what Python has no like for, such as a date after the year 9999."""
    batch.validate(full=True)  # offsets that point outside would be followed
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def check_arrow(path: Path) -> None:
    """Refuse an Arrow file that is damaged, before a library maps it into memory and trusts it."""
    for _ in _read_arrow(path):
        pass


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def describe(value: Any) -> str:
    """A value in a few words, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return repr(value[:_PLACES_SHOWN] + ("..." if len(value) > _PLACES_SHOWN else "")) if value else "empty text"
    if isinstance(value, dict):
        return f"an object with {name_list(value) if value else 'no keys'}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def name_list(names: Iterable[Any]) -> str:
    """Names of columns or keys, for messages: printable, and not more than fit a line."""
    few = list(itertools.islice(names, _NAMES_SHOWN + 1))
    words = [
        name if (name := str(each)).isprintable() and len(name) <= _PLACES_SHOWN else describe(name) for each in few
    ]
    return ", ".join(words[:_NAMES_SHOWN]) + (", ..." if len(words) > _NAMES_SHOWN else "") if words else "none"
