"""Data files with mistakes in them: each is told at its line and field before a model loads, or counted as dropped."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.examples import load_examples
from rlhf.data.records import check_records
from rlhf.data.sources import check_sources
from rlhf.errors import UserError
from rlhf.recipe.document import to_yaml
from rlhf.recipe.schema import DataBlock
from scripts.reliability.broken_data import SHAPES, BadData, all_bad, found_in, long_lines
from scripts.reliability.lab import Lab
from scripts.reliability.row import Tally, row

IN_TIME = 30  # seconds for a file, lines of 50 MB too
MOST_MEMORY = 1000  # MB more than before, for a line of 50 MB
STAGES = {"tokens": "sft", "pairs": "rm", "answers": "dpo", "lists": "dpo", "prompts": "grpo"}
LOSSES = {"answers": "kto", "lists": "pl_dpo"}


@row(
    "R11",
    "malformed data files in every format: cut, broken and mistyped rows at any place, other encodings and kinds of"
    " file, damaged archives, pipes and devices, lines of 50 MB",
    expected="exit 3 with file:line and field before a model loads, or dropped with exact counts; no hang, no crash, at"
    f" most {MOST_MEMORY} MB for a line of 50 MB",
    asked="600",
    quick=60,
    full=900,
)
def malformed_data(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: files that are read; every twelfth goes through `rlhf STAGE`, `show` and `data` too."""
    folder = lab.work / "malformed-data"
    tokenizer = AutoTokenizer.from_pretrained(lab.root / "sft" / "model")
    commands = 0
    for number, bad in enumerate(itertools.islice(all_bad(seed), tries)):
        path = fresh(folder, bad)
        with tally.attempt(f"{bad.kind} {number}: {bad.shape} in {bad.name}"):
            hold(bad, path, apart(lambda bad=bad, path=path: read(bad, path, tokenizer)))
        if number % 12 == 0:
            for command in ("stage", "show", "data"):
                commands += 1
                with tally.attempt(f"rlhf {command}, {bad.kind} {number}: {bad.shape} in {bad.name}"):
                    hold_command(lab, bad, path, command)
    tally.remark(f"{commands} of them through commands")
    if tries >= 600:  # these take their time
        most = 0
        for bad in long_lines():
            path = fresh(folder, bad)
            with tally.attempt(f"{bad.kind} in {bad.name}"):
                answer = apart(lambda bad=bad, path=path: read(bad, path, tokenizer))
                hold(bad, path, answer)
                most = max(most, answer["megabytes"])
                assert answer["megabytes"] < MOST_MEMORY, f"{answer['megabytes']} MB more than before"
        tally.remark(f"{most} MB at most for a line of 50 MB")
    shutil.rmtree(folder, ignore_errors=True)


def fresh(folder: Path, bad: BadData) -> Path:
    """The file of a case, alone in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    bad.make(folder / bad.name)
    return folder / bad.name


def data_block(bad: BadData, path: Path) -> dict[str, Any]:
    """What a recipe says of it. Formats that look like others are named."""
    named = {"format": bad.shape} if bad.shape in ("labelled", "scored", "alpaca", "text") else {}
    return {"path": str(path), "max_length": 96, **named, **bad.options}


def read(bad: BadData, path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Check and load the file as a stage does: what was said, or what was dropped."""
    kind: Any = SHAPES[bad.shape][0]
    try:
        data = DataBlock(**data_block(bad, path))
        check_sources(data, kind)
        check_records(data, kind)
        loaded = load_examples(data, tokenizer, kind, 0, max_new_tokens=12)
    except UserError as error:
        return {"code": error.exit_code, "said": str(error)}
    return {"code": 0, "dropped": dict(loaded.report.sources[0].dropped), "rows": len(loaded.train)}


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of a child that may crash, hang or take memory, with the megabytes that it took."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(IN_TIME)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            answer = work()
        except BaseException as error:  # noqa: BLE001  a traceback is what is looked for
            answer = {"code": 1, "said": f"{type(error).__name__}: {error}"[:500]}
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(theirs, json.dumps({**answer, "megabytes": grown // 1024})[:60_000].encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as stream:
        text = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0 and text, f"the reading process ended with {code}"
    answer: dict[str, Any] = json.loads(text)
    return answer


def hold(bad: BadData, path: Path, answer: dict[str, Any]) -> None:
    """Hold an answer against what must come."""
    if bad.may_load and answer["code"] == 0:
        return
    if bad.says:
        assert answer["code"] == 3, f"expected a DataError, found {answer}"
        assert found_in(answer["said"], bad, path), f"no {bad.says!r} in: {answer['said']}"
        lines = answer["said"].split("\n")
        assert len(lines) <= 5 + path.name.count("\n") and len(answer["said"]) < 2000, answer["said"]
    else:
        assert answer["code"] == 0, f"expected rows, found {answer}"
        assert answer["dropped"] == bad.dropped, f"expected {bad.dropped} dropped, found {answer['dropped']}"


def hold_command(lab: Lab, bad: BadData, path: Path, command: str) -> None:
    """The same through a command: `rlhf STAGE`, `rlhf show` or `rlhf data`."""
    kind = SHAPES[bad.shape][0]
    stage = STAGES[kind]
    recipe = lab.work / f"malformed-{stage}.yaml"
    values: dict[str, Any] = {"model": {"from": "sft"}, "data": data_block(bad, path)}
    values |= {"loss": {"name": LOSSES[kind]}} if kind in LOSSES else {}
    values |= {"rewards": [{"kind": "length"}], "sampling": {"max_new_tokens": 12}} if stage == "grpo" else {}
    recipe.write_text(to_yaml(values))
    words = [command, recipe, "--stage", stage, "--run", lab.root]
    if command == "stage":
        words = [stage, recipe, "--run", lab.root, "--name", "malformed"]
        words += ["--dry-run"] if not bad.says or bad.may_load else []  # nothing keeps the stage from its work
    lab.clear("malformed")
    started = time.monotonic()
    done = lab.run(words, timeout=IN_TIME)
    seconds = time.monotonic() - started
    assert "Traceback" not in done.err, done.err[-2000:]
    if bad.says and not bad.may_load:
        assert not (lab.root / "malformed").exists(), "something was written"
        # `show` reads no further than the rows that it shows.
        is_seen = command != "show" or done.code != 0
        assert done.code == 3 or not is_seen, f"exit {done.code} after {seconds:.1f} s: {done.err[-1500:]}"
        assert not is_seen or found_in(done.err.replace("error: ", "", 1), bad, path), done.err[-1500:]
        assert "parameters" not in done.err, "a model was loaded"
    else:
        assert done.code == 0 or bad.may_load and done.code == 3, f"exit {done.code}: {done.err[-1500:]}"
