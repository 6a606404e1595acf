"""Recipes and data files with mistakes in them: each is refused at its place, before anything heavy is loaded."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rlhf.recipe.stages import RECIPES
from scripts.reliability.broken_recipes import IN_TIME, KINDS, Broken, judge, loaded_or_told
from scripts.reliability.hostile_recipes import conflicts, hostile, pipelines
from scripts.reliability.lab import ENVIRONMENT, ROOT, Lab
from scripts.reliability.row import Tally, row

FEWEST_COMMANDS = 20


@row(
    "R10",
    "malformed recipes, pipelines and `--set`: unknown and misspelt keys at every level, wrong types, ranges, choices,"
    " duplicates, tags, bombs, bytes that are no text, values that contradict each other",
    expected="exit 2 in < 2 s of a processor, with file:line and key, a misspelt name with the right one; no torch, no"
    " traceback",
    asked="3,000",
    quick=300,
    full=8300,
)
def malformed_recipes(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: recipes that are loaded; every sixteenth, at least twenty, goes through the whole command too."""
    folder = lab.work / "malformed"
    folder.mkdir(exist_ok=True)
    (folder / "good.yaml").write_text("model: {from: sft}\n")
    every = list(itertools.islice(all_broken(seed), tries))
    with chdir(folder):
        for number, broken in enumerate(every):
            with tally.attempt(
                f"{broken.kind} {number}: {broken.stage} {broken.content[:300]!r} {broken.overrides}"[:600]
            ):
                Path("r.yaml").write_bytes(broken.content)
                loaded_or_told(broken)
    refused = [broken for broken in every if broken.says]
    step = max(1, min(16, len(refused) // FEWEST_COMMANDS))
    commands = 0
    with cold() as run:
        for number, broken in enumerate(refused[::step]):
            commands += 1
            with tally.attempt(f"command, {broken.kind} {number}: {broken.content[:300]!r} {broken.overrides}"[:600]):
                refused_by_command(broken, folder / "r.yaml", run)
    tally.remark(f"{commands} of them through the command")


def all_broken(seed: int) -> Iterator[Broken]:
    """Without end: one stage's hostile texts and the pipelines, then every kind for every stage in turn, and again."""
    for again in itertools.count():
        draw = random.Random(f"{seed}/{again}")
        yield from hostile(draw.choice(list(RECIPES)), draw)
        yield from pipelines(draw)
        running = [kind(stage, draw) for kind in (*KINDS, hostile, conflicts) for stage in RECIPES]
        while running:
            for cases in list(running):
                broken = next(cases, None)
                if broken is None:
                    running.remove(cases)
                else:
                    yield broken


def refused_by_command(broken: Broken, path: Path, run: Callable[..., Answer]) -> None:
    """The same through `rlhf STAGE`."""
    path.write_bytes(broken.content)
    options = [word for text in broken.overrides for word in ("--set", text)]
    options += ["--gpus", str(broken.devices)] if broken.devices else []
    done = run(broken.stage, str(path), "--run", str(path.parent / "run"), *options)
    assert done.code == 2, f"exit {done.code}: {done.err[-1500:]}"
    assert "Traceback" not in done.err and done.out == "", done.err[-1500:] + done.out[-500:]
    assert not done.torch, "torch was imported"
    assert done.seconds < IN_TIME, f"took {done.seconds:.1f} s"
    assert not (path.parent / "run").exists(), "something was written"
    judge(done.err.rstrip("\n").replace(str(path), "r.yaml").removeprefix("error: "), broken.says)


@dataclass(frozen=True)
class Answer:
    """A command that has ended. torch: whether it imported it; seconds: of a processor."""

    code: int
    out: str
    err: str
    torch: bool
    seconds: float


@contextmanager
def cold() -> Iterator[Callable[..., Answer]]:
    """`rlhf` commands as forks of a process without torch, which notices who asks for it."""
    command = [sys.executable, str(ROOT / "tests" / "warm_server.py"), "cold"]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT) as process:
        assert process.stdin and process.stdout and process.stdout.readline().strip() == "ready"

        def run(*words: str) -> Answer:
            before = seconds_of_children(process.pid)
            print(json.dumps(words), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())  # type: ignore[union-attr]
            return Answer(**answer, seconds=seconds_of_children(process.pid) - before)

        yield run
        process.stdin.close()


def seconds_of_children(pid: int) -> float:
    """Seconds that a process's ended children have computed: other processes of the machine do not count."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
