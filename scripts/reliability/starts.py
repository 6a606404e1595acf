"""Several starts of one stage at the same time: one runs, the others say so and touch nothing."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

from scripts.reliability.lab import Child, Done, Lab, differing, digest
from scripts.reliability.row import Tally, row
from scripts.reliability.stops import slowed

BUSY, LIMIT_S, NAME = 6, 2.0, "r14"


@row(
    "R14",
    "two, then eight starts on one run directory: beside a running one, all at once, and over a stale lock",
    expected="one runs, the others exit 6 within 2 s, naming its process and machine; none of its files changes",
    asked="20",
    quick=1,
    full=7,
    alone=True,
)
def started_together(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: of each of three ways, every second one with two starts, the others with eight."""
    words = lab.command("sft", "--name", NAME)
    lab.clear(NAME)
    done = lab.run(words)
    assert done.code == 0, done.err
    wanted = digest(lab.root / NAME)
    for number in range(tries):
        count = 2 if (number + seed) % 2 == 0 else 8
        with tally.attempt(f"{count - 1} starts beside a running one"):
            beside(lab, words, wanted, count - 1)
        with tally.attempt(f"{count} starts at once"):
            lab.clear(NAME)
            at_once(lab, words, wanted, count)
        with tally.attempt(f"{count} starts at once over a stale lock"):
            lab.clear(NAME)
            killed = running(lab, words)
            killed.kill()
            killed.wait()
            at_once(lab, words, wanted, count, dead=killed.pids[0])


def running(lab: Lab, words: list[str]) -> Child:
    """A start that has finished its first step."""
    child = lab.start(words, before=slowed)
    assert child.until((lab.root / NAME / "metrics.jsonl").exists), child.text("err")
    return child


def beside(lab: Lab, words: list[str], wanted: dict[str, str], count: int) -> None:
    """The first is frozen while the others come, so that whatever changes was changed by them."""
    lab.clear(NAME)
    first = running(lab, words)
    first.kill(signal.SIGSTOP)
    time.sleep(0.1)
    before = files(lab.root)
    for other in ended([lab.start(words) for _ in range(count)]):
        refused(other, first.pids[0])
    assert files(lab.root) == before, sorted(
        path for path in before.keys() | files(lab.root).keys() if before.get(path) != files(lab.root).get(path)
    )
    first.kill(signal.SIGCONT)
    done = first.wait()
    assert done.code == 0, done.err
    assert not (different := differing(digest(lab.root / NAME), wanted)), different


def at_once(lab: Lab, words: list[str], wanted: dict[str, str], count: int, dead: int | None = None) -> None:
    """Whoever is first runs to its end. dead: a process whose name the lock still has, which nobody may be told."""
    children = [lab.start(words, before=late_to_sign) for _ in range(count)]
    done = dict(zip([child.pids[0] for child in children], ended(children), strict=True))
    codes = sorted(each.code for each in done.values())
    assert codes == [0] + [BUSY] * (count - 1), codes
    winner = next(pid for pid, each in done.items() if each.code == 0)
    assert winner != dead
    for each in done.values():
        if each.code:
            refused(each, winner)
    assert not (different := differing(digest(lab.root / NAME), wanted)), different


def late_to_sign() -> None:
    """Time between having a lock and saying who one is."""
    original = os.ftruncate

    def late(handle: int, length: int) -> None:
        time.sleep(0.2)
        original(handle, length)

    os.ftruncate = late
    slowed()


def ended(children: list[Child]) -> list[Done]:
    """All of them, each with the time that it has computed: several share a core, and one of them trains."""
    return [replace(child.wait(), seconds=child.own_seconds) for child in children]


def refused(other: Done, holder: int) -> None:
    """It came too late, and said so soon."""
    assert other.code == BUSY, f"exit {other.code}: {other.err}"
    named = re.search(r"held by process (\d+) on (\S+) since", other.err)
    assert named and named.groups() == (str(holder), socket.gethostname()), f"{other.err}, held by {holder}"
    assert other.seconds < LIMIT_S, f"{other.seconds:.1f} s"


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Every file with its size and time."""
    found = [path for path in root.rglob("*") if path.is_file()]
    return {str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}
