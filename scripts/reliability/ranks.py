"""Two ranks that are killed, frozen or fail, and started again: the end is the same, to the last bit."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scripts.reliability.kills import progress, resumed_from
from scripts.reliability.lab import ROOT, STAGES, Lab, differing, digest
from scripts.reliability.row import Tally, row

MOST = 120.0  # seconds that two ranks may take


def options(stage: str, zero: int) -> list[str]:
    """Every model of a stage under a ZeRO stage; even the smallest weight is divided."""
    block = f"{{stage: {zero}, persistence_threshold: 0}}"
    keys = ["zero", *(["critic.zero"] if stage == "ppo" else [])]
    if zero == 3 and stage in ("ppo", "grpo", "dpo"):
        keys.append("reference.zero")
    return [word for key in keys for word in ("--set", f"{key}={block}")]


COMBINATIONS = [(stage, zero) for zero in (3, 2, 1, 0) for stage in STAGES]


@row(
    "R6",
    "kill -9 of both of two ranks at a random moment, every stage under ZeRO 0 to 3, then the same command again",
    expected="bit-identical end; at most one interval between checkpoints done again",
    asked="5 per stage and ZeRO stage",
    quick=1,
    full=5 * len(COMBINATIONS),
    alone=True,
)
def both_killed(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: in all, dealt to the combinations."""
    draw = random.Random(f"{seed} both")
    for place, (stage, zero) in enumerate(COMBINATIONS[:tries]):
        name = f"r6-{stage}-{zero}"
        words = lab.command(stage, "--name", name, *options(stage, zero))
        straight = lab.run(words, ranks=2, timeout=MOST)
        assert straight.code == 0, straight.err
        wanted = digest(lab.root / name)
        for _ in range(tries // len(COMBINATIONS) + (place < tries % len(COMBINATIONS))):
            lab.clear(name)
            moment = draw.uniform(0, straight.seconds)
            with tally.attempt(f"{name} killed after {moment:.3f} s"):
                child = lab.start(words, ranks=2)
                time.sleep(moment)
                child.kill()
                child.wait()
                resumed(lab, words, name, wanted)
        lab.clear(name)


@dataclass(frozen=True)
class Fault:
    """What happens to one of two ranks, and how the command that started them ends."""

    name: str
    signal: int
    code: int
    said: str  # pattern; {rank} stands for its number
    within_s: float = 15.0


WATCHDOG_S = 4
FAULTS = [
    Fault("frozen", signal.SIGSTOP, 10, r"rank {rank} gave no sign of life for \d+ s", WATCHDOG_S + 15.0),
    Fault("killed", signal.SIGKILL, 10, r"rank {rank} was killed \(SIGKILL, often for want of memory\)"),
    Fault("raises", signal.SIGUSR1, 10, r"rank {rank} exited with code 1"),
    Fault("out of memory", signal.SIGUSR2, 7, r"out of memory in .*, on rank {rank}"),
]
# Python reads this at the start of every process: a signal becomes an error wherever the rank is just then.
FAULTY = """
import os, signal
def fails(number, frame): raise RuntimeError("a fault of this rank")
def has_no_memory(number, frame): raise MemoryError
if "RANK" in os.environ:
    signal.signal(signal.SIGUSR1, fails)
    signal.signal(signal.SIGUSR2, has_no_memory)
"""
LONGER = {"sft": ("--set", "train.steps=60"), "ppo": ("--set", "train.rollouts=20")}


@row(
    "R13",
    "one of two ranks is frozen, killed, raises an error or has no memory; then the same command again",
    expected="all processes gone in 15 s (frozen: 15 s after the watchdog), exit code 10 (7) naming the rank;"
    " bit-identical end",
    asked="40",
    quick=1,
    full=40,
    alone=True,
)
def one_lost(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: starts of the launcher; the ways of failing take turns, and so do the ranks and two stages."""
    draw = random.Random(f"{seed} one")
    faulty = lab.work / "faulty"
    faulty.mkdir(exist_ok=True)
    (faulty / "sitecustomize.py").write_text(FAULTY)
    for stage in ("sft", "ppo"):
        mine = [i for i in range(tries) if ("sft", "ppo")[i // len(FAULTS) % 2] == stage]
        if not mine:
            continue
        name = f"r13-{stage}"
        words = lab.command(stage, "--name", name, *LONGER[stage])
        straight = lab.run(words, ranks=2, timeout=MOST)
        assert straight.code == 0, straight.err
        wanted = digest(lab.root / name)
        for i in mine:
            lab.clear(name)
            fault, rank = FAULTS[i % len(FAULTS)], draw.randrange(2)
            with tally.attempt(f"{name}, rank {rank} {fault.name}"):
                lose(lab, words, name, fault, rank, draw)
                resumed(lab, words, name, wanted)
        lab.clear(name)


def lose(lab: Lab, words: list[str], name: str, fault: Fault, rank: int, draw: random.Random) -> None:
    """Start the job through its launcher, let one rank fail on the way, and look at what is left."""
    paths = os.pathsep.join([str(lab.work / "faulty"), str(ROOT)])
    child = lab.start([*words, "--gpus", "2", "--watchdog", str(WATCHDOG_S)], env={"PYTHONPATH": paths})
    least = draw.randint(1, 5)
    assert child.until(lambda: progress(lab.root / name) >= least, timeout=MOST), child.text("err")
    time.sleep(draw.uniform(0, 0.3))
    os.kill(ranks_of(name)[str(rank)], fault.signal)
    began = time.monotonic()
    done = child.wait(timeout=MOST)
    seconds = time.monotonic() - began
    assert done.code == fault.code, f"exit code {done.code}\n{done.err}"
    assert re.search(fault.said.format(rank=rank), done.err), f"not said: {fault.said}\n{done.err}"
    assert done.err.count("error: ") == 1, f"not one error\n{done.err}"
    assert seconds < fault.within_s, f"took {seconds:.0f} s"
    assert not (left := ranks_of(name)), f"still there: {left}"


def ranks_of(name: str) -> dict[str, int]:
    """RANK -> pid of the processes of a stage by its name."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and name in (entry / "cmdline").read_text(errors="replace").split("\0"):
                environment = (entry / "environ").read_text(errors="replace").split("\0")
                found |= {word[5:]: int(entry.name) for word in environment if word.startswith("RANK=")}
    return found


def resumed(lab: Lab, words: list[str], name: str, wanted: dict[str, str]) -> None:
    """The same command on two ranks again, to an end that must be the wanted one."""
    before, was_finished = progress(lab.root / name), (lab.root / name / "MANIFEST.json").exists()
    done = lab.run(words, ranks=2, timeout=MOST)
    assert done.code == 0, done.err
    assert not (different := differing(digest(lab.root / name), wanted)), different
    redone = 0 if was_finished else before - resumed_from(done.err)
    assert redone <= 1, f"went on from {resumed_from(done.err)}, was at {before}"
