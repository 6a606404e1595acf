"""YAML text -> plain values, with the line and column of every key and value.

Only plain YAML 1.2 values exist here: text, numbers, true/false, null, lists and blocks. So `1e-5` is a number, `no` is
text, and a tag such as `!!python/object` is a problem to report, never something to construct.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from rlhf.errors import RecipeError
from rlhf.recipe.problems import Problem, Spot, closest, dotted, found, shown, told

MAX_BYTES = 256 * 1024
MAX_VALUES = 5_000  # after aliases are expanded
MAX_DEPTH = 30
LINE_END = b"\n"
MAX_TOLD = 20  # problems at once
LARGEST = 2**63 - 1  # of whole numbers: beyond, arithmetic with fractions overflows, and no option means such a number

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_RESOLVERS = (
    ("null", re.compile(r"~|null|Null|NULL|"), "~nN\0"),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("int", _INT, "-+0123456789"),
    ("float", _FLOAT, "-+.0123456789"),
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe reader with the number and truth words of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    count = depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node:
        """Like the inherited one, but what is too much is refused at its place, before it costs time."""
        self.count += 1
        self.depth += 1
        if self.count > MAX_VALUES or self.depth > MAX_DEPTH + 1:
            raise _TooMuch(self.peek_event().start_mark, is_deep=self.depth > MAX_DEPTH + 1)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


class _TooMuch(Exception):
    """A text with more in it than any recipe."""

    def __init__(self, mark: yaml.Mark, *, is_deep: bool) -> None:
        super().__init__()
        self.mark, self.what = mark, _too_much(is_deep)


def _too_much(is_deep: bool) -> str:
    return "values nested too deeply" if is_deep else f"more than {MAX_VALUES:,} values"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    """Writes what both YAML 1.1 and 1.2 readers understand alike: whatever either takes for a number is quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def short_list(self, values: list[Any]) -> Node:
        """Lists of single values stand on one line."""
        flat = not any(isinstance(value, (list, dict)) for value in values)
        return self.represent_sequence(_TAG + "seq", values, flow_style=flat)


for _name, _pattern, _first in _RESOLVERS:
    _whole = re.compile(rf"^(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, ["" if c == "\0" else c for c in _first])
    _Dumper.add_implicit_resolver(_TAG + _name, _whole, ["" if c == "\0" else c for c in _first])
_Dumper.add_representer(list, _Dumper.short_list)


@dataclass(frozen=True)
class Mark:
    """Where a key and its value stand, and a scalar's text."""

    key: Spot
    value: Spot
    text: str | None = None


@dataclass
class Document:
    """A file's values with their marks; `--set` changes both."""

    file: str
    text: str = ""
    values: Any = None
    marks: dict[str, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    untold: int = 0  # problems beyond those that are worth looking at

    def spot(self, key: str, also: tuple[str, ...] = ()) -> Spot:
        """Where a key stands; if several are concerned, one from the command line, else the first that is written."""
        written = [self.marks[k] for k in (key, *also) if k in self.marks]
        for mark in written:
            if mark.value.override is not None:
                return mark.value
        if written:
            return written[0].key if written[0].text is None else written[0].value
        block = key.rpartition(".")[0]
        return self.spot(block) if block else Spot(1, 1)

    def place(self, key: str) -> str:
        """`file:line:column` of a key, or the `--set` that gave it."""
        return self.place_of(self.spot(key))

    def place_of(self, spot: Spot) -> str:
        """A spot in the words of an error message."""
        return f"{self.file}:{spot.line}:{spot.column}" if spot.override is None else f"--set {spot.override}"

    def error(self, problems: Sequence[Problem]) -> RecipeError:
        """One error that tells all problems, in the order of the file."""
        lines = {}
        for problem in problems:
            spot = problem.spot or self.spot(problem.key, problem.also)
            key = f"{shown(problem.key)}: " if problem.key else ""
            fix = f"\n  {told(problem.fix)}" if problem.fix else ""
            lines[f"{told(self.place_of(spot))}: {key}{told(problem.what)}{fix}"] = (spot.override is not None, spot)
        ordered = sorted(lines, key=lambda line: lines[line])
        more = len(ordered[MAX_TOLD:]) + self.untold
        return RecipeError("\n".join([*ordered[:MAX_TOLD], *([f"... and {more:,} more problems"] if more else [])]))


def read_document(path: str | Path) -> Document:
    """Read and parse a YAML file; what keeps it from being read at all is raised at once."""
    file = Path(path)
    document = Document(file=str(path), text=_read_text(file))
    try:
        document.values = parse(document, document.text, lambda mark: Spot(mark.line + 1, mark.column + 1))
    except Unreadable as error:
        raise document.error([error.problem]) from error
    if document.values is None and not document.problems:
        raise RecipeError(
            "expected a recipe, found an empty file", where=str(path), fix="write at least model and data"
        )
    if not isinstance(document.values, dict):
        raise document.error([Problem("", f"expected keys at the top, found {_kind(document.values)}")])
    return document


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else "a single value"


def _read_text(file: Path) -> str:
    def refuse(what: str, fix: str | None = None, at: str = "") -> RecipeError:
        return RecipeError(f"expected a YAML file, found {what}", where=f"{file}{at}", fix=fix)

    try:
        if file.is_dir():
            inside = sorted(p.name for p in file.glob("*.y*ml"))
            raise refuse("a folder", f"name a file in it: {', '.join(inside)}" if inside else None)
        if not file.exists():
            folder = file.parent
            near = closest(file.name, [p.name for p in folder.glob("*.y*ml")]) if folder.is_dir() else []
            looked = f"did you mean {folder / near[0]}?" if near else f"it is looked for from {Path.cwd()}"
            raise refuse("nothing", looked)
        if not file.is_file():  # a pipe would be waited for, a device has no end
            raise refuse("something that is no file")
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise refuse(f"a file that cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise refuse(f"more than {MAX_BYTES // 1024} KiB", "a recipe is a page or two; is this a data file?")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise refuse("UTF-16", "save the file as UTF-8", ":1:1")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        at = f":{before.count(LINE_END) + 1}:{len(before) - before.rfind(LINE_END)}"
        what = f"the byte 0x{raw[error.start]:02x}, which is not UTF-8"
        raise refuse(what, "save the file as UTF-8", at) from error


class Unreadable(Exception):
    """The text as a whole cannot be read; carries the problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


def parse(document: Document, text: str, spot: Callable[[yaml.Mark], Spot], at: str = "") -> Any:
    """The values of a YAML text; marks and problems go to the document, under the key `at`."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or _mark(text, 0)
        fix = "indent with spaces, not tabs" if "'\\t'" in str(error.problem) else None
        reason = ": ".join(filter(None, [error.context, error.problem]))
        problem = Problem(at, f"expected valid YAML, found an error {reason}", fix, spot=spot(mark))
        raise Unreadable(problem) from error
    except yaml.reader.ReaderError as error:
        what = f"expected text, found the control character {chr(error.character)!r}"
        where = spot(_mark(text, error.position))
        raise Unreadable(Problem(at, what, "remove it", spot=where)) from error
    except (ValueError, OverflowError) as error:  # an escaped character beyond Unicode
        where = spot(_mark(text, 0) if loader is None else loader.get_mark())
        raise Unreadable(Problem(at, f"expected valid YAML, found an error: {error}", spot=where)) from error
    except _TooMuch as error:
        raise Unreadable(Problem(at, f"expected plain values, found {error.what}", spot=spot(error.mark))) from error
    return None if node is None else _Reading(document, spot).value(node, at, spot(node.start_mark))


def _mark(text: str, index: int) -> yaml.Mark:
    before = text[:index]
    return yaml.Mark("", index, before.count("\n"), index - before.rfind("\n") - 1, None, 0)


class _Reading:
    """One pass over composed nodes. What cannot be a plain value becomes a problem and reads as null."""

    def __init__(self, document: Document, spot: Callable[[yaml.Mark], Spot]) -> None:
        self.document, self.spot = document, spot
        self.count = self.depth = 0

    def value(self, node: Node, at: str, key: Spot) -> Any:
        """The plain value of a node that stands under the dotted key `at`, whose own place is `key`."""
        where = self.spot(node.start_mark)
        self.count += 1
        if self.count > MAX_VALUES or self.depth > MAX_DEPTH:
            fix = "aliases (*name) must not repeat each other"
            size = _too_much(self.depth > MAX_DEPTH)
            raise Unreadable(Problem("", f"expected plain values, found {size}", fix, spot=where))
        self.document.marks[at] = Mark(key, where, node.value if isinstance(node, ScalarNode) else None)
        self.depth += 1
        try:
            if isinstance(node, MappingNode) and node.tag == _TAG + "map":
                return self._block(node, at)
            if isinstance(node, SequenceNode) and node.tag == _TAG + "seq":
                return [self.value(v, _join(at, i), self.spot(v.start_mark)) for i, v in enumerate(node.value)]
            if isinstance(node, ScalarNode) and node.tag in _SCALARS:
                return _SCALARS[node.tag](node.value)
        except ValueError:
            self._problem(at, f"expected {_wanted(node)}, found {found(node.value)}", None, where)
            return None
        finally:
            self.depth -= 1
        fix = "tags are never followed, since they could run code: write the value itself"
        self._problem(at, f"expected plain YAML, found the tag {_words(node.tag)}", fix, where)
        return None

    def _block(self, node: MappingNode, at: str) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            where = self.spot(key.start_mark)
            if not isinstance(key, ScalarNode) or key.tag != _TAG + "str":
                what = key.value if isinstance(key, ScalarNode) else "a list or block"
                self._problem(at, f"expected text as a key, found {what or 'nothing'}", "put it in quotes", where)
            elif key.value in values:
                what = f"expected every key once, found it again (first in line {lines[key.value]})"
                self._problem(_join(at, key.value), what, "remove one of the two", where)
            else:
                values[key.value] = self.value(value, _join(at, key.value), where)
                lines[key.value] = where.line
        return values

    def _problem(self, at: str, what: str, fix: str | None, where: Spot) -> None:
        self.document.problems.append(Problem(at, what, fix, spot=where))


def _join(at: str, part: str | int) -> str:
    return f"{at}.{dotted([part])}" if at else dotted([part])


def _wanted(node: ScalarNode) -> str:
    is_number = node.tag == _TAG + "int" and _INT.fullmatch(node.value)
    return "a whole number of at most 64 bits" if is_number else _words(node.tag)


def _words(tag: str) -> str:
    return tag.replace(_TAG, "!!")


def _text(text: str) -> str:
    text.encode()  # an escaped half of a surrogate pair could not be written to any file
    return text


def _bool(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _int(text: str) -> int:
    digits = text.replace("_", "")
    number = int(digits, 0) if digits[:2] in ("0x", "0o") else int(digits)
    if abs(number) > LARGEST:
        raise ValueError(text)
    return number


def _float(text: str) -> float | int:
    digits = text.replace("_", "").lower()
    number = float(digits.replace(".inf", "inf").replace(".nan", "nan"))
    # 1e5 may stand where a whole number is expected; 1.0 may not.
    is_whole = "e" in digits and "." not in digits and number.is_integer() and abs(number) <= LARGEST
    return int(number) if is_whole else number


_SCALARS: dict[str, Callable[[str], Any]] = {
    _TAG + "str": _text,
    _TAG + "null": lambda text: None,
    _TAG + "bool": _bool,
    _TAG + "int": _int,
    _TAG + "float": _float,
}


def to_yaml(values: Any, *, one_line: bool = False) -> str:
    """Plain values as YAML that `parse` reads back equal."""
    text: str = yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=one_line,
        width=2**31 if one_line else 100,
    )
    if not one_line:
        return text
    text = text.removesuffix("...\n").rstrip("\n")
    return json.dumps(values, ensure_ascii=False) if "\n" in text else text  # JSON escapes line breaks
