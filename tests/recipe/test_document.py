"""YAML reading: values, marks, and everything that keeps a file from being read."""

from __future__ import annotations

import math
import os
import random
from pathlib import Path

import pytest
import yaml

from rlhf.errors import RecipeError
from rlhf.recipe.document import MAX_TOLD, Document, read_document, to_yaml
from rlhf.recipe.problems import Problem

VALUES = [
    ("1e-5", 1e-5),
    ("1E-5", 1e-5),
    ("-1e+3", -1000),
    ("1.5e-4", 1.5e-4),
    ("1e5", 100_000),
    ("1.0", 1.0),
    (".5", 0.5),
    ("5.", 5.0),
    ("100_000", 100_000),
    ("0x10", 16),
    ("0o17", 15),
    ("007", 7),
    (".inf", math.inf),
    ("-.inf", -math.inf),
    ("1e400", math.inf),
    ("true", True),
    ("False", False),
    ("yes", "yes"),
    ("no", "no"),
    ("off", "off"),
    ("~", None),
    ("null", None),
    ("", None),
    ("12:30:45", "12:30:45"),
    ("2024-01-02", "2024-01-02"),
    ("e5", "e5"),
    ("1e", "1e"),
    ("1e-5x", "1e-5x"),
    ("'1e-5'", "1e-5"),
    ("!!str 5", "5"),
    ("!!float 5", 5.0),
    ("<<", "<<"),
    ("=", "="),
    ("[1, {a: 2}]", [1, {"a": 2}]),
    ("|\n    two\n    lines\n", "two\nlines\n"),
]


def read(text: str | bytes, folder: Path) -> Document:
    file = folder / "r.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_document(file)


def message(text: str | bytes, folder: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text, folder)
    return str(caught.value).replace(str(folder) + "/", "")


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_scalars_are_read_as_yaml_1_2(text: str, value: object, tmp_path: Path) -> None:
    document = read(f"key: {text}", tmp_path)
    assert document.problems == []
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


def test_nan_is_read(tmp_path: Path) -> None:
    assert math.isnan(read("key: .nan", tmp_path).values["key"])


def test_what_is_written_reads_back_equal_for_us_and_for_yaml_1_1(tmp_path: Path) -> None:
    texts = [text for text, _ in VALUES] + ["a: b", "#", "- x", " x ", "ä\n\tü", "1_0", "y", "123", "0b1", "+1", "1."]
    values = {"texts": texts, "numbers": [1e-5, 1e22, 5e-324, 1e16, -0.0, 3, 2**63 - 1], "none": None, "yes": True}
    for one_line in (False, True):
        written = to_yaml(values, one_line=one_line)
        assert yaml.safe_load(written) == values
        assert read(written, tmp_path).values == values
    assert "\n" not in to_yaml({"a": "x" * 300, "b": "two\nlines"}, one_line=True)


def test_every_key_and_value_has_its_line_and_column(tmp_path: Path) -> None:
    document = read("a:\n  b: 3\n  c:\n  - x\n  -  {d: 4}\n", tmp_path)
    spots = {key: (mark.key[:2], mark.value[:2]) for key, mark in document.marks.items() if key}
    assert spots == {
        "a": ((1, 1), (2, 3)),
        "a.b": ((2, 3), (2, 6)),
        "a.c": ((3, 3), (4, 3)),
        "a.c.0": ((4, 5), (4, 5)),
        "a.c.1": ((5, 6), (5, 6)),
        "a.c.1.d": ((5, 7), (5, 10)),
    }
    assert document.place("a.c.1.unwritten").endswith("r.yaml:5:6")
    assert document.place("nowhere").endswith("r.yaml:1:1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml: expected a recipe, found an empty file"),
        ("# only a comment\n", "r.yaml: expected a recipe, found an empty file"),
        ("- a\n- b\n", "r.yaml:1:1: expected keys at the top, found a list"),
        ("just text", "r.yaml:1:1: expected keys at the top, found a single value"),
        (
            "a: [1\nb: 2",
            "r.yaml:2:2: expected valid YAML, found an error while parsing a flow sequence: expected ',' or",
        ),
        ("a:\n  b: 1\n c: 2", "r.yaml:3:2: expected valid YAML, found an error while parsing a block mapping"),
        ("a: b: c", "r.yaml:1:5: expected valid YAML, found an error mapping values are not allowed here"),
        ("a:\n\tb: 1", "r.yaml:2:1: expected valid YAML, found an error while scanning for the next token"),
        ("a: &x 1\n---\nb: 2", "r.yaml:2:1: expected valid YAML, found an error expected a single document"),
        ("a: *nowhere", "r.yaml:1:4: expected valid YAML, found an error found undefined alias"),
        ("a: 1\nb: \x07", "r.yaml:2:4: expected text, found the control character '\\x07'"),
        (b"a: 1\nb: \xff\xfe", "r.yaml:2:4: expected a YAML file, found the byte 0xff, which is not UTF-8"),
        ("a: 1".encode("utf-16"), "r.yaml:1:1: expected a YAML file, found UTF-16"),
        (b"a: 1\n" * 100_000, "r.yaml: expected a YAML file, found more than 256 KiB"),
        ("a: " + "[" * 5000, "r.yaml:1:34: expected plain values, found values nested too deeply"),
        ("a: [" + "1," * 30_000 + "1]", "r.yaml:1:9999: expected plain values, found more than 5,000 values"),
        ("a: " + "[" * 40 + "]" * 40, "r.yaml:1:34: expected plain values, found values nested too deeply"),
        ("a: &a [*a]", "r.yaml:1:4: expected plain values, found values nested too deeply"),
        ('a: 1\nb: "\\UFFFFFFFF"', "r.yaml:2:7: expected valid YAML, found an error"),
    ],
)
def test_unreadable_files_are_one_message_with_a_place(text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert message(text, tmp_path).startswith(expected)
    assert len(message(text, tmp_path).splitlines()) <= 2


def test_tabs_are_named(tmp_path: Path) -> None:
    assert message("a:\n\tb: 1", tmp_path).endswith("indent with spaces, not tabs")


def test_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 15))
    assert "expected plain values, found more than 5,000 values" in message(bomb, tmp_path)


def test_harmless_aliases_work(tmp_path: Path) -> None:
    assert read("a: &z {stage: 3}\nb: *z", tmp_path).values == {"a": {"stage": 3}, "b": {"stage": 3}}


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("a: 1")
    with pytest.raises(
        RecipeError, match=r"sfd.yaml: expected a YAML file, found nothing\n  did you mean .*/sft.yaml\?"
    ):
        read_document(tmp_path / "sfd.yaml")
    with pytest.raises(RecipeError, match=r"found nothing\n  it is looked for from /"):
        read_document(tmp_path / "no" / "where.yaml")
    with pytest.raises(RecipeError, match=r"found a folder\n  name a file in it: sft.yaml"):
        read_document(tmp_path)


def test_encoding_mark_and_windows_lines_are_fine(tmp_path: Path) -> None:
    document = read(b"\xef\xbb\xbfa: 1\r\nb: \r\n  c: 2\r\n", tmp_path)
    assert document.values == {"a": 1, "b": {"c": 2}}
    assert document.place("b.c").endswith(":3:6")


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("a: 1\nb: 2\na: 3", (3, 1), "expected every key once, found it again (first in line 1)"),
        ("1: x", (1, 1), "expected text as a key, found 1"),
        ("[a, b]: x", (1, 1), "expected text as a key, found a list or block"),
        ("a: {{b}}", (1, 5), "expected text as a key, found a list or block"),
        ("a: !!python/object/apply:os.system [x]", (1, 4), "found the tag !!python/object/apply:os.system"),
        ("a: !!python/name:os.system", (1, 4), "found the tag !!python/name:os.system"),
        ("a: !mine 3", (1, 4), "found the tag !mine"),
        ("a: !!binary aGk=", (1, 4), "found the tag !!binary"),
        ("a: !!int abc", (1, 4), "expected !!int, found 'abc'"),
        ("a: !!bool maybe", (1, 4), "expected !!bool, found 'maybe'"),
        ("a: " + "9" * 5000, (1, 4), "expected a whole number of at most 64 bits, found"),
        ("a: 0x" + "f" * 5000, (1, 4), "expected a whole number of at most 64 bits, found"),
        ('a: "\\ud800"', (1, 4), "expected !!str, found"),
    ],
)
def test_values_that_are_not_plain_become_problems(
    text: str, at: tuple[int, int], expected: str, tmp_path: Path
) -> None:
    [problem] = read(text, tmp_path).problems
    assert expected in problem.what
    assert problem.spot is not None and problem.spot[:2] == at


def test_any_bytes_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = ["a: ", "- ", "{", "}", "[", "]", "\n", "  ", "*x", "&x ", "!!", "'", '"', "#", "|", ">", "%", "1e-5",
              ": ", "?", "\t", "\x00", "é", "<<", "---\n", "\\", ","]  # fmt: skip
    for _ in range(400):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 30)))
        try:
            assert isinstance(read(text, tmp_path).values, dict)
        except RecipeError as error:
            assert "r.yaml" in str(error)


def test_keys_with_dots_do_not_take_the_place_of_others(tmp_path: Path) -> None:
    document = read("train.lr: 3\ntrain: {lr: x}\n", tmp_path)
    assert (document.spot("train.lr")[:2], document.values) == ((2, 13), {"train.lr": 3, "train": {"lr": "x"}})


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="expected a YAML file, found something that is no file"):
        read_document(tmp_path / "r.yaml")


def test_thousands_of_problems_are_counted_and_long_ones_shortened(tmp_path: Path) -> None:
    document = read("a: 1\n", tmp_path)
    told = str(document.error([Problem(f"k{i}", "x" * 5000 + "\n") for i in range(100)])).splitlines()
    assert len(told) == MAX_TOLD + 1 and told[-1] == "... and 80 more problems" and max(map(len, told)) < 700
