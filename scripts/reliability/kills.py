"""Killed at a random moment and started again: the end is the same, to the last bit."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

from scripts.reliability.lab import STAGES, Lab, differing, digest
from scripts.reliability.row import Tally, row

LORA = {stage: ("--set", "model.lora={rank: 4}") for stage in STAGES}
LORA["sft"] = ("--set", "model.lora={rank: 4, dropout: 0.1}", "--set", "model.dropout=true")  # elsewhere it must be off


@row(
    "R4",
    "kill -9 at a random moment of every stage, whole and LoRA, then the same command again",
    expected="bit-identical end; at most one interval between checkpoints done again",
    asked="20 per stage",
    quick=2,
    full=20,
)
def killed_once(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: per stage; every second one trains an adapter."""
    for stage in STAGES:
        for lora in (False, True):
            killed(
                lab,
                tally,
                stage,
                LORA[stage] if lora else (),
                (tries + (not lora)) // 2,
                random.Random(f"{seed}{stage}"),
            )


def killed(lab: Lab, tally: Tally, stage: str, options: tuple[str, ...], tries: int, draw: random.Random) -> None:
    """One straight run, then `tries` that are killed once."""
    name = f"r4-{stage}{'-lora' if options else ''}"
    words = lab.command(stage, "--name", name, *options)
    straight = lab.run(words)
    assert straight.code == 0, straight.err
    wanted = digest(lab.root / name)
    for _ in range(tries):
        lab.clear(name)
        moment = draw.uniform(0, straight.seconds)
        with tally.attempt(f"{name} killed after {moment:.3f} s"):
            child = lab.start(words)
            time.sleep(moment)
            child.kill()
            child.wait()
            before = progress(lab.root / name)
            done = lab.run(words)
            assert done.code == 0, done.err
            assert not (different := differing(digest(lab.root / name), wanted)), different
            assert before - resumed_from(done.err) <= 1, f"went on from {resumed_from(done.err)}, was at {before}"
    lab.clear(name)


def progress(stage: Path) -> int:
    """The last step in the log of a stage, 0 where there is none."""
    log = stage / "metrics.jsonl"
    whole = [line for line in log.read_text().split("\n")[:-1]] if log.exists() else []
    return json.loads(whole[-1])["step"] if whole else 0


def resumed_from(err: str) -> int:
    """The step that a command says it goes on from, 0 where it begins."""
    lines = [line for line in err.splitlines() if "goes on after step" in line]
    return int(lines[-1].split("after step ")[1].split()[0]) if lines else 0
