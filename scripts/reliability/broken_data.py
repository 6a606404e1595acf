"""Data files with one mistake each, in every format, and what must come of it: a message with its place, or counts."""

from __future__ import annotations

import copy
import gzip
import io
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

Row = dict[str, Any]

# Per shape of rows: the kind of examples that is made of them, and a good row.
TURNS = [{"role": "user", "content": "how are you"}, {"role": "assistant", "content": "fine"}]
SHAPES: dict[str, tuple[str, Row]] = {
    "prompt_completion": ("tokens", {"prompt": "hello", "completion": "world"}),
    "messages": ("tokens", {"messages": TURNS}),
    "sharegpt": ("tokens", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
    "alpaca": ("tokens", {"instruction": "add", "input": "1 1", "output": "2"}),
    "text": ("tokens", {"text": "a document"}),
    "pairs": ("pairs", {"prompt": "hello", "chosen": "good", "rejected": "bad"}),
    "dialogue_pairs": ("pairs", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    "message_pairs": ("pairs", {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "bad"}]}),
    "labelled": ("answers", {"prompt": "hello", "completion": "world", "label": True}),
    "scored": ("answers", {"prompt": "hello", "completion": "world", "score": 0.5}),
    "lists": ("lists", {"prompt": "hello", "answers": ["a", "b"], "scores": [1.0, 2.0]}),
    "prompts": ("prompts", {"prompt": "hello", "answer": "4"}),
}


@dataclass(frozen=True)
class BadData:
    """A file (or what stands in its place), and what must be told. Without `says`, these counts of dropped rows."""

    kind: str
    shape: str
    name: str
    make: Callable[[Path], object]  # writes it
    says: str = ""  # a regular expression on the message, FILE its path
    dropped: dict[str, int] = field(default_factory=dict)
    may_load: bool = False  # damage that leaves a valid file cannot be told from one
    options: dict[str, Any] = field(default_factory=dict)  # of the data block


# --- containers ---------------------------------------------------------------------------------------------------


def json_lines(rows: list[Any]) -> bytes:
    """A row per line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def json_list(rows: list[Any]) -> bytes:
    """One list, a row per line."""
    return ("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n").encode()


def table_of(rows: list[Row]) -> pyarrow.Table:
    """A table with the columns of all rows, null where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def holds(rows: list[Row]) -> bool:
    """Whether columns of one type can hold these rows as they are."""
    try:
        table = table_of(rows)
    except (pyarrow.ArrowException, OverflowError):
        return False
    return all(
        json.dumps(row) == json.dumps({k: found[k] for k in row})
        for row, found in zip(rows, table.to_pylist(), strict=True)
    )


def parquet(rows: list[Row]) -> bytes:
    """A Parquet file."""
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table_of(rows), sink)
    return sink.getvalue()


def arrow(rows: list[Row], new: Callable[..., Any] = pyarrow.ipc.new_stream) -> bytes:
    """An Arrow stream."""
    sink, table = io.BytesIO(), table_of(rows)
    with new(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def arrow_file(rows: list[Row]) -> bytes:
    """The other of Arrow's layouts."""
    return arrow(rows, pyarrow.ipc.new_file)


# name -> (its bytes, how it names row i of the file, whether its values have types)
CONTAINERS: dict[str, tuple[Callable[[list[Any]], bytes], Callable[[int], str], bool]] = {
    "rows.jsonl": (json_lines, lambda i: f":{i + 1}", False),
    "rows.json": (json_list, lambda i: f":{i + 2}", False),
    "rows.jsonl.gz": (lambda rows: gzip.compress(json_lines(rows)), lambda i: f":{i + 1}", False),
    "rows.parquet": (parquet, lambda i: f":row {i + 1}", True),
    "rows.arrow": (arrow, lambda i: f":row {i + 1}", True),
}


def write(content: bytes) -> Callable[[Path], object]:
    """What writes these bytes."""
    return lambda path: path.write_bytes(content)


# --- rows ---------------------------------------------------------------------------------------------------------


def row_mistakes(shape: str) -> Iterator[tuple[str, Row | list[Any], str, str]]:
    """(kind, the bad row, what the message says behind the place, or else why the row is dropped)."""
    kind, good = SHAPES[shape]
    optional = {"answer", "input"}
    for column, value in good.items():
        changed = lambda new, column=column: {**good, column: new}  # noqa: E731
        wrong = "expected" if isinstance(value, (list, bool, float)) else "expected text"
        if column not in optional:
            yield (
                "missing column",
                {k: v for k, v in good.items() if k != column} | {"other": 1},
                f"{column}: expected this column",
                "",
            )
            yield "null", changed(None), rf"{column}.*: {wrong}.*null", ""
            yield "object", changed({"a": {"b": 1}}), rf"{column}.*: expected", ""
        if isinstance(value, str) and column not in optional:
            yield "number as text", changed(3.5), rf"{column}: expected text, found the number 3\.5", ""
            yield "truth as text", changed(True), rf"{column}: expected text, found true", ""
            if shape != "dialogue_pairs":
                yield "empty list", changed([]), rf"{column}: expected", ""
            yield "lone surrogate", changed("a\ud800"), rf"{column}: expected text, found half of a surrogate", ""
            yield "NUL", changed("a\0b"), rf"{column}: expected text, found a NUL character at character 2", ""
        elif isinstance(value, list):
            yield "empty list", changed([]), rf"{column}.*: expected", ""
            yield "list of lists", changed([[[]], [[]]]), rf"{column}\[?0?\]?.*: expected", ""
            yield "text as a list", changed(7), rf"{column}.*: expected", ""
    for bad, says, why in _own_mistakes(shape, good):
        yield "rows of this shape", bad, says, why
    yield "no row", [1, 2], "expected a row as an object", ""


def _own_mistakes(shape: str, good: Row) -> Iterator[tuple[Row, str, str]]:  # noqa: C901  a table
    """(the bad row, what is said, or why it is dropped) of what only rows of this shape can get wrong."""
    user, assistant = TURNS
    match shape:
        case "messages":
            yield (
                {"messages": [{"role": "wizard", "content": "a"}, assistant]},
                r"messages\[0\]\.role: expected one of",
                "",
            )
            yield {"messages": [{"role": "user"}, assistant]}, r"messages\[0\]: expected \{role, content\}", ""
            yield (
                {"messages": [user, {"role": "assistant", "content": 3}]},
                r"messages\[1\]\.content: expected text",
                "",
            )
            yield {"messages": [user, {**assistant, "tool_calls": [1]}]}, r"messages\[1\]\.tool_calls: expected", ""
            yield (
                {"messages": [user, {"role": "assistant", "content": [{"type": "image"}]}]},
                r".*expected a part of type text",
                "",
            )
            yield {"messages": [assistant, user]}, "", "no answer at the end"
            yield {"messages": [user]}, "", "no answer at the end"
            yield {"messages": [user, {"role": "assistant", "content": " "}]}, "", "empty answer"
        case "alpaca":
            yield {**good, "history": 5}, "history: expected a list", ""
            yield {**good, "history": ["a"]}, r"history\[0\]: expected \[question, answer\]", ""
            yield {**good, "input": 3}, "input: expected text", ""
            yield {**good, "output": ""}, "", "empty answer"
        case "pairs":
            yield {**good, "rejected": "good"}, "", "chosen equals rejected"
            yield {**good, "chosen": ""}, "", "empty answer"
            yield {**good, "margin": "wide"}, "margin: expected a number", ""
            yield {**good, "margin": 10**400}, "margin: expected a number", ""
            yield {**good, "score_chosen": [1], "score_rejected": 1}, "score_chosen: expected a number", ""
        case "message_pairs":
            other = [{"role": "user", "content": "other"}, assistant]
            yield {**good, "rejected": other}, "", "chosen and rejected answer different prompts"
            yield {**good, "rejected": [user]}, "", "no answer at the end"
        case "dialogue_pairs":
            yield (
                {**good, "rejected": "\n\nHuman: z\n\nAssistant: c"},
                "",
                "chosen and rejected answer different prompts",
            )
            yield {**good, "rejected": "no turns"}, "rejected: expected a transcript", ""
        case "labelled":
            for label in ("yes", 2, "", [True], {"a": 1}):
                yield {**good, "label": label}, "label: expected true, false, 1 or 0", ""
            yield {**good, "density": 1.5}, "density: expected a number between 0 and 1", ""
        case "scored":
            for score in ("high", True, [1], 10**400, "nan"):
                yield {**good, "score": score}, "score: expected a number", ""
        case "lists":
            yield {**good, "answers": ["a"]}, "answers: expected at least 2 answers", ""
            yield {**good, "scores": [1.0]}, "scores: expected one for each of 2 answers", ""
            yield {**good, "scores": [1.0, "2"]}, r"scores\[1\]: expected a number", ""
            yield {**good, "answers": ["a", ""]}, "", "empty answer"
            yield {**good, "answers": ["a", "a"]}, "", "all answers are equal"
        case "prompts":
            yield {**good, "prompt": " "}, "", "empty prompt"
        case "text" | "prompt_completion":
            yield {**good, list(good)[-1]: ""}, "", "empty answer"


def broken_rows(draw: random.Random) -> Iterator[BadData]:
    """Every mistake of a row in every container that can hold it, at the start, in the middle or at the end."""
    for shape in SHAPES:
        for kind, bad, says, why in row_mistakes(shape):
            for name, (as_bytes, place, is_typed) in CONTAINERS.items():
                at = draw.choice((1, 7, 11))
                if is_typed and (kind in ("no row", "missing column", "lone surrogate") or not isinstance(bad, dict)):
                    continue
                rows: list[Any] = [copy.deepcopy(SHAPES[shape][1]) for _ in range(12)]
                rows[at] = bad
                if is_typed and not holds(rows):
                    continue
                content = as_bytes(rows)
                told = rf"^FILE{place(at)}(:\d+)?: {says}" if says else ""
                yield BadData(kind, shape, name, write(content), told, {why: 1} if why else {})


# --- bytes --------------------------------------------------------------------------------------------------------


def broken_text(draw: random.Random) -> Iterator[BadData]:
    """What keeps a text file from being read at all, by its bytes."""
    shape = draw.choice(list(SHAPES))
    good = json.dumps(SHAPES[shape][1]).encode()
    n = draw.randrange(3, 30)
    before = (good + b"\n") * n
    cut = draw.randrange(1, len(good) - 1)
    at = rf"^FILE:{n + 1}(:\d+)?: "
    extra = good[:-1] + b', "more": '
    lines: list[tuple[str, bytes, str]] = [
        ("cut line", good[:cut], "expected"),
        ("bad JSON", good[:-1] + b", }\n", "expected JSON"),
        ("bad JSON", b"{'prompt': 'a'}\n", "expected JSON"),
        ("two rows on a line", good + good + b"\n", "expected one object per line"),
        ("a row over two lines", good[:-1] + b"\n}\n", "expected JSON"),
        ("a number", b"3\n", "expected a row"),
        ("text", b"hello\n", "expected JSON"),
        ("duplicate key", extra + b'1, "more": 2}\n', "twice in one object"),
        ("NaN", extra + b"NaN}\n", "NaN, which is not JSON"),
        ("Infinity", extra + b"-Infinity}\n", "not JSON"),
        ("huge number", extra + b"1e999}\n", "too large for a number"),
        ("huge number", extra + b"9" * 5000 + b"}\n", "thousands of digits"),
        ("nested", extra + b"[" * 10_000 + b"]" * 10_000 + b"}\n", "nested too deeply"),
        ("nested", extra + b"[" * 400 + b"]" * 400 + b"}\n", "nested too deeply"),
        ("nested", extra + b'{"a":' * 10_000, "nested too deeply"),
        ("Windows-1252", extra + b'"it\x92s"}\n', "expected UTF-8 text, found the byte 0x92"),
        ("Latin-1", extra + b'"caf\xe9"}\n', "expected UTF-8 text, found the byte 0xe9"),
        ("NUL", extra + b'"\0"}\n', "found a NUL byte"),
        ("surrogates as bytes", extra + b'"\xed\xa0\x80"}\n', "expected UTF-8 text"),
        ("BOM in the middle", b"\xef\xbb\xbf" + good + b"\n", "expected JSON"),
        ("control character", extra + b'"\x01"}\n', "expected JSON"),
    ]
    for kind, line, says in lines:
        yield BadData(kind, shape, "rows.jsonl", write(before + line), at + ".*" + says)
        yield BadData(kind, shape, "rows.jsonl.gz", write(gzip.compress(before + line)), at + ".*" + says)
        listed = b"[\n" + (good + b",\n") * n + line.rstrip(b"\n") + b"\n]"
        place = at if kind not in ("two rows on a line", "a row over two lines") else ""
        said = "expected" if kind in ("cut line", "two rows on a line") else says
        if kind not in ("a row over two lines", "a number") and b"\n" not in line.rstrip(b"\n"):
            where = rf"^FILE:({n + 2}|{n + 3})(:\d+)?: " if place else r"^FILE:\d+(:\d+)?: "
            yield BadData(kind, shape, "rows.json", write(listed), where + ".*" + said)
    whole = [
        ("UTF-16", before.decode().encode("utf-16"), "found UTF-16"),
        ("UTF-16 without mark", before.decode().encode("utf-16-le"), "found a NUL byte"),
        ("zip", b"PK\x03\x04\x14\0\0\0" + before, "a zip archive"),
        ("pickle", b"\x80\x04\x95\x10\0\0\0" + before, "a pickle, which is never read"),
        ("gzip", gzip.compress(before), "a gzip file"),
        ("parquet", parquet([{"text": "a"}]), "a Parquet file"),
        ("0 rows", b"", "an empty file"),
        ("0 rows", b"\n \n\t\n", "expected rows, found none"),
        ("0 rows", b"\xef\xbb\xbf", "expected rows, found none"),
        ("binary", bytes(range(128, 256)) * 9, "expected UTF-8"),
        ("carriage returns", before.replace(b"\n", b"\r"), "expected"),
    ]
    for kind, content, says in whole:
        yield BadData(kind, shape, "rows.jsonl", write(content), rf"^FILE(:1)?(:\d+)?: .*{says}")
    fine = [
        ("BOM", b"\xef\xbb\xbf" + before),
        ("CRLF", before.replace(b"\n", b"\r\n")),
        ("1 row", good),
        ("no end", before[:-1]),
    ]
    for kind, content in fine:
        yield BadData(kind, shape, "rows.jsonl", write(content))
    csv_files = [
        ("open quote", b'text\na\n"b\n', r":3: expected CSV"),
        ("fields", b"text,x\na,b\na\n", r":3: expected 2 fields, found 1"),
        ("header", b"text,text\na,b\n", r":1: expected a header"),
        ("header", b"text,,\na,b,c\n", r":1: expected a header"),
        ("header", ",".join(["x"] * 50_000).encode() + b"\n", r":1: expected a header"),
        ("no column", b"txet\na\n", r":2: columns: expected"),
        ("Windows-1252", b"text\nit\x92s\n", r":2:3: expected UTF-8"),
        ("0 rows", b"text\n", r": expected rows, found none"),
        ("carriage returns", b"text\ra\rb\r", r":1: expected CSV"),
    ]
    for kind, content, says in csv_files:
        yield BadData(f"csv {kind}", "text", "rows.csv", write(content), f"^FILE{says}")
    yield BadData(
        "mixed columns",
        "prompt_completion",
        "rows.jsonl",
        write(before + b'{"text": "a"}\n')
        if shape == "prompt_completion"
        else write(b'{"prompt": "a", "completion": "b"}\n' * n + b'{"text": "a"}\n'),
        at + "prompt: expected this column",
    )


def broken_archives(draw: random.Random) -> Iterator[BadData]:
    """Compressed and columnar files that were cut, or in which a bit has turned; and what they may hold."""
    shape = draw.choice(list(SHAPES))
    rows = [copy.deepcopy(SHAPES[shape][1]) for _ in range(200)]
    packed = {
        "rows.jsonl.gz": gzip.compress(json_lines(rows)),
        "rows.parquet": parquet(rows),
        "rows.arrow": arrow(rows),
    }
    for name, content in [*packed.items(), ("rows.arrow", arrow_file(rows))]:
        for _ in range(6):
            end = draw.randrange(1, len(content) - 1)
            yield BadData(
                f"cut {name}", shape, name, write(content[:end]), "^FILE: expected", may_load=name == "rows.arrow"
            )
            turned = bytearray(content)
            for _ in range(draw.randrange(1, 5)):
                turned[draw.randrange(len(turned))] ^= 1 << draw.randrange(8)
            yield BadData(f"bit of {name}", shape, name, write(bytes(turned)), "^FILE.*: expected", may_load=True)
        yield BadData(f"other bytes as {name}", shape, name, write(b"hello\n" * 20), "^FILE: expected")
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"a", b"\xff"]).buffers())
    tables = [
        ("bytes", {"text": [b"a"]}, "row 1: text: expected text"),
        ("not UTF-8", {"text": latin}, "row 2: expected plain values"),
        (
            "dates",
            {"text": ["a"], "t": pyarrow.array([2**62], pyarrow.timestamp("ms"))},
            "row 1: expected plain values",
        ),
        ("nothing", {"text": pyarrow.nulls(3)}, "row 1: text: expected text, found null"),
        ("0 rows", {"text": pyarrow.array([], pyarrow.string())}, " expected rows, found none"),
        ("no column", {"x": ["a"]}, "row 1: columns: expected"),
    ]
    for kind, columns, says in tables:
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
        yield BadData(f"parquet of {kind}", "text", "rows.parquet", write(sink.getvalue()), f"^FILE:{says}")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    sink = io.BytesIO()
    pyarrow.parquet.write_table(twice, sink)
    yield BadData("columns twice", "text", "rows.parquet", write(sink.getvalue()), "^FILE: expected one distinct name")


# --- files --------------------------------------------------------------------------------------------------------


def strange_files(draw: random.Random) -> Iterator[BadData]:
    """What may stand where a file is expected."""
    good = json_lines([SHAPES["text"][1]] * 3)

    def folder(*names: str) -> Callable[[Path], object]:
        def make(path: Path) -> None:
            path.mkdir()
            for name in names:
                (path / name).write_bytes(good)

        return make

    def link(to: str) -> Callable[[Path], object]:
        return lambda path: path.symlink_to(to)

    def locked(path: Path) -> None:
        path.write_bytes(good)
        path.chmod(0)

    cases: list[tuple[str, str, Callable[[Path], object], str, dict[str, Any]]] = [
        ("pipe", "rows.jsonl", os.mkfifo, "^FILE: expected a file, found something else", {}),
        ("device", "rows.jsonl", link("/dev/zero"), "^FILE: expected a file, found something else", {}),
        ("device", "rows.jsonl", link("/dev/null"), "^FILE: expected a file, found something else", {}),
        ("link to itself", "rows.jsonl", link("rows.jsonl"), "^FILE: expected a file.*found nothing", {}),
        ("link to nothing", "rows.jsonl", link("gone.jsonl"), "^FILE: expected a file.*found nothing", {}),
        ("empty folder", "rows", folder(), "^FILE: expected files that end in", {}),
        ("folder as a file", "rows.jsonl", folder(), "^FILE: expected files that end in", {}),
        ("folder of others", "rows", folder("a.txt", "b.md"), "^FILE: expected files.*found a.txt, b.md", {}),
        ("ending", "rows.xlsx", write(good), "^FILE: expected a file that ends in", {}),
        ("ending", "rows", write(good), "^FILE: expected a file that ends in", {}),
        ("part", "rows.jsonl", write(good), "^FILE: expected rows in part 9/9, found none", {"part": "9/9"}),
        ("nothing", "rows.jsonl", lambda path: None, "^FILE: expected a file.*found nothing", {}),
        ("name", "ä b'\"\n.jsonl", write(good), "", {}),
        ("folder", "rows", folder("a.jsonl", "b.jsonl"), "", {}),
    ]  # fmt: skip
    if os.geteuid():
        cases.append(("not for us", "rows.jsonl", locked, "^FILE: expected a file that can be read", {}))
    for kind, name, make, says, options in cases:
        yield BadData(kind, "text", name, make, says, options=options)
    bad = draw.randrange(1, 5)
    many = json_lines([SHAPES["text"][1]] * 100_000) + b'{"text": 3}\n' + good
    yield BadData(
        "row 100,001", "text", "rows.jsonl", write(many), r"^FILE:100001: text: expected text, found the number 3"
    )
    texts = [{"text": "a"}] * bad + [{"text": ["a"]}]
    yield BadData(
        "mixed types", "text", "rows.jsonl", write(json_lines(texts)), rf"^FILE:{bad + 1}: text: expected text"
    )


def long_lines() -> Iterator[BadData]:
    """A line of 50 MB: dropped as too long, refused where it would be cut; and lines that are longer still."""
    for text in ("x" * 50_000_000, "word " * 10_000_000, "\U0001f600" * 12_500_000):
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        content = b'{"text": "a"}\n' + line
        yield BadData("50 MB line", "text", "rows.jsonl", write(content), dropped={"longer than max_length": 1})
    cut = {"on_long": "truncate_answer"}
    yield BadData(
        "50 MB line to cut", "text", "rows.jsonl", write(content), r"^FILE:2: expected at most \d+ tokens", options=cut
    )
    yield BadData("50 MB line, broken", "text", "rows.jsonl", write(content[:-3]), r"^FILE:2:\d+: expected JSON")
    yield BadData(
        "80 MB line",
        "text",
        "rows.jsonl",
        write(b'{"text": "' + b"x" * 80_000_000),
        r"^FILE:1: expected lines of at most 64 MiB",
    )
    bomb = gzip.compress(b"x" * 400_000_000, compresslevel=1)
    yield BadData("gzip bomb", "text", "rows.jsonl.gz", write(bomb), r"^FILE:1: expected lines of at most 64 MiB")


def all_bad(seed: int) -> Iterator[BadData]:
    """Without end: strange files, then rows, texts and archives in turn, again and again in other places."""
    for again in itertools.count():
        draw = random.Random(f"{seed}/{again}")
        rows = list(broken_rows(draw))
        draw.shuffle(rows)
        turns = itertools.zip_longest(
            rows,
            itertools.chain(strange_files(draw), broken_text(draw), broken_archives(draw)),
        )
        yield from (bad for turn in turns for bad in turn if bad is not None)


def found_in(message: str, bad: BadData, path: Path) -> bool:
    """Whether a message says what it must."""
    pattern = bad.says.replace("FILE", re.escape(str(path)).replace("\\\n", r"\\n"))
    return re.search(pattern, message, re.MULTILINE | re.DOTALL) is not None
