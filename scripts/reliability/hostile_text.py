"""Nothing that a run reads as text may run code or never end: templates, recipes, answers."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from rlhf.errors import UserError
from rlhf.recipe.load import load_recipe
from rlhf.rewards import patterns, rules, verdicts
from scripts.reliability.lab import Lab
from scripts.reliability.payloads import ANSWERS, BOMBS, INERT, RECIPES, TEMPLATES
from scripts.reliability.refusals import INTEGRITY, SAFE, refused, shuffled
from scripts.reliability.row import Tally, row

# --- S4 ---------------------------------------------------------------------------------------------------------------


def impatient() -> None:
    """In a command: a template's time is half a second, so that many can be tried."""
    from rlhf.data import chat

    chat._SECONDS = 0.5


@row(
    "S4",
    "templates that break out of a sandbox, loop for ever or want all memory: a tokenizer's, a recipe's, a row's text",
    expected="no call; an end within seconds and in words; text of rows is text",
    asked="30 payloads, three ways",
    quick=4,
    full=70,
)
def hostile_templates(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: payloads, the ways in turn."""
    mark, folder = lab.work / "s4-mark", lab.work / "s4-model"
    shutil.copytree(lab.root / "sft" / "model", folder)
    texts = shuffled([*TEMPLATES, *BOMBS], seed)
    for index in range(tries):
        payload = texts[index % len(texts)].replace("MARK", str(mark))
        around = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}" + payload
        way = ("recipe", "tokenizer", "rows")[index % 3]
        with tally.attempt(f"{way}: {payload[:120]}"):
            options = ["--set", "train.steps=1"]
            if way == "recipe":
                (lab.work / "s4.jinja").write_text(around)
                options += ["--set", f"model.chat_template={lab.work / 's4.jinja'}"]
            elif way == "tokenizer":
                (folder / "chat_template.jinja").write_text(around)
                options += ["--set", f"model={{path: {folder}}}"]
            else:
                rows = [{"prompt": payload, "completion": payload}] * 24
                (lab.work / "s4.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
                options += ["--set", f"data={{path: {lab.work / 's4.jsonl'}, max_length: 128, eval_rows: 4}}"]
            done = lab.run(lab.command("sft", "--name", "s4", *options), before=impatient)
            codes = (0, 3) if way == "rows" else (0, 2, 3, INTEGRITY, SAFE)
            refused(done, mark, codes)
            assert done.seconds < 30, f"{done.seconds:.0f} s"
        lab.clear("s4")
    shutil.rmtree(folder)


# --- S5 ---------------------------------------------------------------------------------------------------------------


@row(
    "S5",
    "recipes with tags, anchors, interpolation, import strings, deep or repeated keys, at every place and by --set",
    expected="refused, exit 2, or plain text; no call, within 2 s",
    asked="each kind",
    quick=60,
    full=300,
)
def hostile_recipes(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: pairs of payload and place."""
    mark, file = lab.work / "s5-mark", lab.work / "s5.yaml"
    base = (lab.recipes / "sft.yaml").read_text()
    places = ("model", "data.path", "train.lr", "train.seed", "log.wandb", "unknown", "--set", "whole", "item")
    pairs = [(payload, place) for payload in RECIPES for place in places]
    for payload, place in shuffled(pairs, seed)[:tries]:
        with tally.attempt(f"{place}: {payload[:80]!r}"):
            value, overrides = payload.replace("MARK", str(mark)), []
            if place == "--set" and "\0" not in value:
                file.write_text(base)
                overrides = [f"train.lr={value}"]
            elif place == "whole":
                file.write_text(value)
            else:
                document = yaml.safe_load(base)
                key = "sampling" if place == "item" else place.split(".")[0]
                document.pop(key, None)
                written = f"{key}: {{{place.split('.')[1]}: {value}}}" if "." in place else f"{key}: {value}"
                written = f"sampling: {{stop: [{value}]}}" if place == "item" else written
                file.write_text(yaml.safe_dump(document) + written + "\n")
            try:
                load_recipe(file, "sft", overrides)
                raise AssertionError("it was accepted")
            except UserError as error:
                assert error.exit_code == 2, error
            assert not mark.exists()
    for text in INERT:
        with tally.attempt(f"inert: {text}"):
            file.write_text(base)
            assert load_recipe(file, "sft", [f"log.wandb='{text}'"]).recipe.log.wandb == text


# --- S7 ---------------------------------------------------------------------------------------------------------------


def judged(answer: str, reference: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every built-in reward, and every reader of a judge's reply, on one answer."""
    rows = [{"answer": reference, "prompt": "the plot was"}]
    yield "exact", lambda: rules.exact(rows, [answer], answer="answer")
    yield "numeric", lambda: rules.numeric(rows, [answer], answer="answer", marker="####", tolerance=1e-6)
    yield "numeric without marker", lambda: rules.numeric(rows, [answer], answer="answer", marker="", tolerance=1e-6)
    yield "format", lambda: rules.format_found(rows, [answer], pattern=r"#### ?-?\d[\d,]*(\.\d+)?\s*$")
    yield "length", lambda: rules.length(rows, [answer], target=50, scale=50)
    yield "demo_gold", lambda: rules.demo_gold(rows, [answer], noise=1.0, seed=0)
    yield "preferred", lambda: verdicts.preference(answer, r"Preferred ?= ?(1|2|tie)")
    yield "points", lambda: verdicts.points(answer, r"Score: ?(\d+(?:\.\d+)?)")


def code_of(*modules: Any) -> str:
    """A hash of the functions that are in use, not of their files."""
    found = [
        (name, value.__code__.co_code, repr(value.__code__.co_consts), value.__defaults__, value.__kwdefaults__)
        for module in modules
        for name, value in sorted(vars(module).items())
        if inspect.isfunction(value)
    ]
    return hashlib.sha256(repr(found).encode()).hexdigest()


@row(
    "S7",
    "answers that would do harm if they were evaluated, through every built-in reward and reader of verdicts",
    expected="a finite score or none within 2 s; no call; the functions are as before",
    asked="200 payloads",
    quick=40,
    full=len(ANSWERS),
)
def hostile_answers(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: answers; each goes through all."""
    mark = lab.work / "s7-mark"
    before = code_of(rules, verdicts, patterns)
    for payload in shuffled(ANSWERS, seed)[:tries]:
        answer = payload.replace("MARK", str(mark))
        with tally.attempt(repr(payload[:80])):
            for name, ask in judged(answer, "72"):
                started = time.monotonic()
                found = ask()
                score = found[0] if isinstance(found, list) else found
                assert score is None or isinstance(score, str) or math.isfinite(score), f"{name}: {score}"
                assert time.monotonic() - started < 2, f"{name}: {time.monotonic() - started:.1f} s"
            assert not mark.exists() and code_of(rules, verdicts, patterns) == before


@row(
    "S7b",
    "patterns whose time doubles with every character of an answer",
    expected="exit 2 that names the pattern, after 5 s",
    asked="time bound",
    quick=1,
    full=4,
)
def slow_patterns(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: patterns."""
    answer = "a" * 40 + "!"
    for pattern in (r"(a+)+$", r"(a|aa)+$", r"(.*a){20}$", r"^(([a-z])+.)+[A-Z]([a-z])+$")[:tries]:
        with tally.attempt(pattern):
            try:
                rules.format_found([{}], [answer], pattern=pattern)
                raise AssertionError("it came to an end")
            except UserError as error:
                assert error.exit_code == 2 and repr(pattern) in str(error), error
