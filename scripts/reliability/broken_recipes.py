"""Recipes with one mistake each, and what must be said of it: where, about which key, and what was probably meant."""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rlhf.errors import RecipeError
from rlhf.recipe.document import to_yaml
from rlhf.recipe.fields import Option, shape_at, tags, walk
from rlhf.recipe.load import load_pipeline, load_recipe
from rlhf.recipe.stages import RECIPES

Values = dict[str, Any]

IN_TIME = 2.0  # seconds of a processor for a recipe to be refused
LONGEST = 1500  # characters of a line

# What a key needs beside it for its block to be the one that is meant.
NEEDS: dict[str, Values] = {
    "model.init": {"model": {}},
    "data.sources": {"data": {}},
    "data.eval": {"data": {"path": "x", "eval": {"path": "y"}}},
    "pretraining": {"pretraining": {"data": {"path": "x"}}},
    "pretraining.data.sources": {"pretraining": {"data": {}}},
    "pretraining.data.eval": {"pretraining": {"data": {"path": "x", "eval": {"path": "y"}}}},
}


@dataclass(frozen=True)
class Broken:
    """A recipe, the overrides beside it, and what must be told. An empty `says` means that it must load."""

    kind: str
    stage: str  # or "run": a pipeline
    content: bytes
    overrides: tuple[str, ...] = ()
    says: tuple[str, ...] = ()  # regular expressions, each found in some line
    devices: int | None = None


def minimal(stage: str) -> Values:
    """What must be written for a block of the stage to be looked at."""
    if stage == "merge":
        return {"base": {"from": "sft"}, "models": [{"from": "dpo", "weight": 1}]}
    if stage == "label":
        return {"model": {"from": "sft"}, "data": {"path": "x"}, "rewards": [{"kind": "length"}]}
    return {"model": {"from": "sft"}, "data": {"path": "x"}}


def keys(stage: str) -> Iterator[tuple[str, Option, Values]]:
    """(dotted key, option, a recipe in which the key's block exists) of every key of a stage."""
    for key, tag, option in walk(RECIPES[stage]):
        values = minimal(stage)
        for prefix, needed in NEEDS.items():
            if key.startswith(f"{prefix}."):
                values |= copy.deepcopy(needed)
        if tag:
            name, _, value = tag.partition("=")
            put(values, name, value)
        yield key, option, values


def shuffled(stage: str, draw: random.Random) -> list[tuple[str, Option, Values]]:
    """The same in any order."""
    every = list(keys(stage))
    draw.shuffle(every)
    return every


def put(values: Values, key: str, value: Any) -> None:
    """Set a dotted key, blocks and lists created on the way."""
    parts = key.split(".")
    node: Any = values
    for part, following in zip(parts, parts[1:] + [""], strict=True):
        new = value if not following else [] if following.isdigit() else {}
        if isinstance(node, list):
            if int(part) == len(node):
                node.append(new)
            elif not following:
                node[int(part)] = value
            node = node[int(part)]
        else:
            if not following or not isinstance(node.get(part), (dict, list)):
                node[part] = new
            node = node[part]


def misspelt(name: str, draw: random.Random) -> str:
    """A name with two letters swapped, one lost, doubled or in the wrong case."""
    middle = draw.randrange(1, len(name)) if len(name) > 1 else 0
    ways = [name[:middle] + name[middle - 1 :], name.capitalize() + name[-1]]
    if len(name) > 3:
        ways += [
            name[:middle] + name[middle + 1 :],
            name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :],
        ]
    return draw.choice([way for way in ways if way != name])


def wrong_values(option: Option) -> tuple[Any, ...]:
    """Values of another type than a key's."""
    shape = option.shape
    if shape.words.startswith("names with"):
        return 3, [3], "abc"
    if shape.is_list:
        return "abc", {"x": 1}, 3
    if shape.blocks:
        return "abc", [3], 7
    if shape.is_text or shape.is_either:
        return True, {"x": 1}, [[]]
    if shape.words.startswith("true or false"):
        return "abc", 3, [True]
    return "abc", [[1]], {"x": 1}


def out_of_range(option: Option) -> tuple[Any, ...]:
    """Numbers just beyond a key's bounds, and far beyond; none where it has no bound."""
    found = [(sign, float(bound)) for sign, bound in re.findall(r"(>=|<=|>|<) (-?[\d.e+-]+)", option.shape.words)]
    is_whole = option.shape.words.startswith("a whole number")
    far: list[Any] = []
    for sign, bound in found:
        step = 1 if is_whole else 1e-6
        beyond = bound - step if sign == ">=" else bound + step if sign == "<=" else bound
        far += [beyond, -1e9 if ">" in sign else 1e18]
    return tuple(int(value) if is_whole else value for value in far)


# --- kinds --------------------------------------------------------------------------------------------------------


def line_of(text: str, pattern: str) -> int:
    """The line of a YAML text that a pattern matches first, counted from 1."""
    return next(i for i, row in enumerate(text.splitlines(), 1) if re.search(pattern, row))


def told(text: str, mark: Any, key: str, *more: str) -> tuple[str, ...]:
    """What the error must hold: the line of `mark` with the key, and further words."""
    row = line_of(text, mark)
    return rf"^r\.yaml:{row}:\d+: {re.escape(key)}: expected ", *more


def unknown_keys(stage: str, draw: random.Random) -> Iterator[Broken]:
    """A key that does not exist at every level of a stage."""
    for block in dict.fromkeys(key.rpartition(".")[0] for key, _, _ in keys(stage)):
        values = next(copy.deepcopy(v) for key, _, v in keys(stage) if key.rpartition(".")[0] == block)
        name = draw.choice(("zzzz", "qq_xx", "Ünïcode", "x" * 200, "<<", "7x"))
        key = f"{block}.{name}" if block else name
        put(values, key, draw.choice((1, "a", None, [1], {"a": 1})))
        text = to_yaml(values)
        row = line_of(text, rf"(^|[ '?-]){re.escape(name)}")
        yield Broken("unknown key", stage, text.encode(), says=(rf"^r\.yaml:{row}:\d+: .*expected a known key",))


def misspelt_keys(stage: str, draw: random.Random) -> Iterator[Broken]:
    """Every key misspelt; the right one is offered."""
    every = {key for key, _, _ in walk(RECIPES[stage])}
    for key, _, values in shuffled(stage, draw):
        block, _, name = key.rpartition(".")
        if name in ("kind", "name") and shape_at(RECIPES[stage], block.split("."), values).tag:  # type: ignore[union-attr]
            continue  # without its tag a block is not known
        wrong = misspelt(name, draw)
        wrong_key = f"{block}.{wrong}" if block else wrong
        if wrong_key in every or wrong in ("from", "path"):
            continue
        put(values, wrong_key, 1)
        text = to_yaml(values)
        hint = rf"(^|[ ,]){re.escape(key)}([?, ]|$)"
        yield Broken("misspelt key", stage, text.encode(), says=told(text, rf"^[ -]*{wrong}: 1", wrong_key, hint))


def wrong_types(stage: str, draw: random.Random) -> Iterator[Broken]:
    """Every key with a value of another type."""
    for key, option, values in shuffled(stage, draw):
        put(values, key, draw.choice(wrong_values(option)))
        text = to_yaml(values)
        name = key.rpartition(".")[2]
        at = nth_line(text, key)
        yield Broken("wrong type", stage, text.encode(), says=(rf"^r\.yaml:{at}:\d+: {re.escape(key)}[:.]", name))


def nth_line(text: str, key: str) -> str:
    """The lines at which a key of this name stands, as an alternative of a pattern."""
    name = key.rpartition(".")[2]
    rows = [i for i, row in enumerate(text.splitlines(), 1) if re.match(rf"[ -]*{re.escape(name)}:", row)]
    assert rows, (key, text)
    return f"({'|'.join(map(str, rows))})"


def ranges(stage: str, draw: random.Random) -> Iterator[Broken]:
    """Every bounded number beyond its bounds, infinite, not a number, and too large for the machine."""
    for key, option, values in shuffled(stage, draw):
        if not option.shape.words.startswith(("a number", "a whole number")):
            continue
        wild = [float("inf"), float("nan"), -float("inf")] + [10**30] * option.shape.words.startswith("a whole")
        for value in (*out_of_range(option), draw.choice(wild)):
            broken = copy.deepcopy(values)
            put(broken, key, value)
            text = to_yaml(broken)
            yield Broken(
                "out of range", stage, text.encode(), says=(rf"^r\.yaml:{nth_line(text, key)}:\d+: {re.escape(key)}: ",)
            )


def choices(stage: str, draw: random.Random) -> Iterator[Broken]:
    """Every named choice misspelt; the nearest is offered where one is near."""
    model = RECIPES[stage]
    for key, option, values in shuffled(stage, draw):
        names = [str(name) for name in option.shape.allowed if isinstance(name, str)]
        block = key.rpartition(".")[0]
        above = shape_at(model, block.split("."), values) if block else None
        is_tag = above is not None and above.tag == key.rpartition(".")[2]
        if is_tag:
            names = list(tags(above))  # type: ignore[arg-type]
        if not names:
            continue
        name = draw.choice(names)
        wrong = misspelt(name, draw)
        if wrong in names or len(name) < 4:
            wrong = "no_such_choice"
        put(values, key, wrong)
        text = to_yaml(values)
        hint = (r"did you mean |write ",) if wrong != "no_such_choice" else ()
        at = nth_line(text, key)
        yield Broken("unknown choice", stage, text.encode(), says=(rf"^r\.yaml:{at}:\d+: {re.escape(key)}: ", *hint))


def duplicates(stage: str, draw: random.Random) -> Iterator[Broken]:
    """A key that is written twice, at the top and in a block."""
    text = to_yaml(minimal(stage))
    first = text.split(":")[0]
    last = len(text.splitlines())
    yield Broken(
        "duplicate key",
        stage,
        f"{text}{first}: {{from: x}}\n".encode(),
        says=(rf"^r\.yaml:{last + 1}:1: {first}: expected every key once",),
    )
    block, key = (
        ("log", "samples") if stage in ("sft", "ppo", "grpo", "dpo") else ("base" if stage == "merge" else "log", "x")
    )
    if block == "base":
        text = text.replace("base:\n", "base:\n  path: y\n")
        yield Broken(
            "duplicate key",
            stage,
            text.replace("path: y\n", "path: y\n  path: z\n").encode(),
            says=(r"^r\.yaml:3:3: base\.path: expected every key once",),
        )
        return
    text += f"{block}:\n  {key}: 1\n  {key}: 2\n"
    yield Broken(
        "duplicate key",
        stage,
        text.encode(),
        says=(rf"^r\.yaml:{last + 3}:3: {block}\.{key}: expected every key once",),
    )


def overrides(stage: str, draw: random.Random) -> Iterator[Broken]:
    """Mistakes on the command line, which stand at their own place."""
    text = to_yaml(minimal(stage)).encode()
    every = [(key, option, values) for key, option, values in keys(stage) if values == minimal(stage)]
    for key, option, _ in every:
        block, _, name = key.rpartition(".")
        if option.shape.blocks or option.shape.is_text or option.shape.is_either or name in ("kind", "name"):
            continue
        value = to_yaml(draw.choice(wrong_values(option)), one_line=True)
        where = re.escape(f"--set {key}={value}")
        yield Broken("--set", stage, text, (f"{key}={value}",), says=(f"^{where}: {re.escape(key)}",))
        wrong = f"{block}.{name}{name[-1]}q" if block else f"{name}{name[-1]}q"
        yield Broken(
            "--set", stage, text, (f"{wrong}=1",), says=(rf"^--set {re.escape(wrong)}=1: .*expected a known key",)
        )
    odd = (
        "train",
        "=1",
        "train..lr=1",
        "",
        "seed=[",
        "a=!!python/object:x {}",
        "x=\x07",
        "data.²=1",
        "a=&a [*a]",
        "data.sources.٣.path=x",
        f"data.sources.{'9' * 5000}.path=x",
        f"x={'[' * 5000}",
        "a.b.c.d.e=1",
        "x=\ud800",
    )
    for each in odd:
        yield Broken("--set", stage, text, (each,), says=(r"^--set ",))


KINDS: tuple[Callable[[str, random.Random], Iterator[Broken]], ...] = (
    unknown_keys,
    misspelt_keys,
    wrong_types,
    ranges,
    choices,
    duplicates,
    overrides,
)


# --- answers ------------------------------------------------------------------------------------------------------


def loaded_or_told(broken: Broken) -> None:
    """Load what lies in r.yaml and hold the answer against what must be said."""
    started = time.process_time()
    try:
        if broken.stage == "run":
            load_pipeline("r.yaml")
        else:
            load_recipe("r.yaml", broken.stage, broken.overrides, world_size=broken.devices)
    except RecipeError as error:
        assert broken.says, f"refused: {error}"
        judge(str(error), broken.says)
    else:
        assert not broken.says, "it was loaded"
    assert (seconds := time.process_time() - started) < IN_TIME, f"took {seconds:.1f} s"


def judge(text: str, says: tuple[str, ...]) -> None:
    """Every pattern stands in some line; problems take two lines each, and no line goes on forever."""
    lines = text.split("\n")
    for pattern in says:
        assert any(re.search(pattern, line) for line in lines), f"no {pattern!r} in:\n{text[:1500]}"
    problems = sum(not line.startswith("  ") for line in lines)
    assert len(lines) <= min(5 * problems, 41), f"{len(lines)} lines for {problems} problems:\n{text[:1500]}"
    assert max(map(len, lines)) < LONGEST, f"a line of {max(map(len, lines)):,} characters: {text[:500]}"
    assert text.isprintable() or all(line.isprintable() for line in lines), f"control characters: {text[:1500]!r}"
