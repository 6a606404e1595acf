"""The commit layer killed, refused or cut off from power at every call that it makes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.run import commit
from scripts.reliability.lab import Lab
from scripts.reliability.lost import Journal
from scripts.reliability.row import Tally, row
from scripts.reliability.saver import NEW, OLD, content, save

SAVER = Path(__file__).with_name("saver.py")
CALLS = "write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,close,unlink,unlinkat,rmdir,ftruncate"
CALLS += ",openat"
SIZES = [
    {"state.json": 60},
    {"policy/model.pt": 5000, "policy/optimizer.pt": 9000, "critic/model.pt": 700, "state.json": 60},
    {"policy/model.pt": 3 * 2**20, "state.json": 60},
]
_MARK = re.compile(r"^getppid\(")
_CALL = re.compile(r"^(\w+)\(")


def can_trace() -> bool:
    """Whether this machine has strace, and lets it watch a process."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0


class Saver:
    """The process whose forks save."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-S", str(SAVER)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self._trace = folder / "trace"

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()

    def run(self, folder: Path, sizes: dict[str, int], inject: str | None = None) -> tuple[dict[str, Any], list[str]]:
        """One save under strace: ({status, and code and text where it could say them}, its calls by name)."""
        source, target = self._process.stdout, self._process.stdin
        assert source is not None and target is not None
        target.write(json.dumps({"folder": str(folder), "sizes": sizes}).encode() + b"\n")
        pid = int(self._read())
        words = ["strace", "-q", "-o", str(self._trace), "-p", str(pid), "-e", f"trace={CALLS},getppid"]
        strace = subprocess.Popen([*words, *(["-e", f"inject={inject}"] if inject else [])], stderr=subprocess.DEVNULL)
        while "TracerPid:\t0" in Path(f"/proc/{pid}/status").read_text():
            assert strace.poll() is None, "strace does not get at the process"
            time.sleep(0.001)
        target.write(b"x")
        said: dict[str, Any] = {}
        while "status" not in said:
            said |= json.loads(self._read())
        strace.wait(10)
        return said, calls(self._trace.read_text().splitlines())

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the saver has ended"
        return bytes(line)


def calls(lines: list[str]) -> list[str]:
    """Names of the calls between the two marks, in order."""
    marks = [number for number, line in enumerate(lines) if _MARK.match(line)]
    part = lines[marks[0] + 1 : marks[1] if len(marks) > 1 else None] if marks else []
    return [match[1] for line in part if (match := _CALL.match(line))]


@contextmanager
def saver(lab: Lab) -> Iterator[Saver]:
    """A saver for a while."""
    found = Saver(lab.work)
    try:
        yield found
    finally:
        found.close()


def sweep(lab: Lab, tally: Tally, sizes: list[dict[str, int]], faults: list[str]) -> None:
    """Every call of a save of every size, with every fault."""
    folder = lab.work / "saves"
    with saver(lab) as server:
        for each in sizes:
            begin(folder, each)
            said, names = server.run(folder, each)
            assert said == {"status": 0, "code": 0, "text": ""} and len(names) > 20, (said, names)
            # A call is the n-th of its name since the watching began: before the mark there is none.
            seen: Counter[str] = Counter()
            for name in names:
                seen[name] += 1
                for fault in faults:
                    begin(folder, each)
                    what = f"{sum(each.values()):,} bytes, {name} {seen[name]}, {fault}"
                    with tally.attempt(what):
                        said, _ = server.run(folder, each, f"{name}:{fault}:when={seen[name]}")
                        check_end(said, folder, fault)
                        check_state(folder, each, said)
            tally.remark(f"{len(names)} calls in a save of {sum(each.values()):,} bytes")
    shutil.rmtree(folder, ignore_errors=True)


def begin(folder: Path, sizes: dict[str, int]) -> None:
    """A folder with one checkpoint in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save(folder, OLD, sizes)


def check_end(said: dict[str, Any], folder: Path, fault: str) -> None:
    """Killed, or the refusal told with what is needed and what is there; what a save survives is well, too."""
    if fault == "signal=KILL":
        assert said["status"] == -9, said
    else:
        assert said["code"] in (0, 7), said
        if said["code"] == 7:
            assert re.search(r"[\d,]+ bytes needed, [\d,]+ free", said["text"]), said["text"]


def check_state(folder: Path, sizes: dict[str, int], said: dict[str, Any]) -> None:
    """The newest checkpoint is the old or the new one, whole; so is all that is visible; the next start cleans up."""
    newest = commit.newest_checkpoint(folder, hash_limit=None)
    assert newest is not None, "no checkpoint is left"
    step = commit.step_number(newest)
    assert step in (OLD, NEW) and ("code" not in said or said["code"] or step == NEW), newest.name
    for path in commit.checkpoint_dirs(folder):
        assert commit.verify(path, hash_limit=None)["step"] == commit.step_number(path)
        for name, size in sizes.items():
            assert (path / name).read_bytes() == content(commit.step_number(path), name, size), name
    commit.remove_temporaries(folder)
    left = sorted(path.name for path in folder.iterdir())
    assert left == sorted(path.name for path in commit.checkpoint_dirs(folder)), left
    save(folder, NEW, sizes)
    assert [path.name for path in folder.iterdir()] == [commit.step_name(NEW)]


def _traced(tally: Tally) -> bool:
    if not can_trace():
        tally.remark("not tried: no strace here")
        return False
    return True


@row(
    "R1",
    "kill -9 at every single call of a save: write, fsync, rename, mkdir, close, unlink, open",
    expected="newest checkpoint the old or the new one, whole; all that is visible valid; leftovers cleaned up",
    asked="every call, 3 sizes",
    quick=1,
    full=3,
)
def killed_at_every_call(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: sizes of a save."""
    if _traced(tally):
        sweep(lab, tally, SIZES[:tries], ["signal=KILL"])


@row(
    "R2",
    "no space, or an input/output error, at every single call of a save",
    expected="the same; exit 7 with the bytes that are needed and free",
    asked="every call, 3 sizes",
    quick=1,
    full=6,
)
def refused_at_every_call(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: sizes of a save, first without space, then with input/output errors."""
    if _traced(tally):
        sweep(lab, tally, SIZES[:tries], ["error=ENOSPC"])
        sweep(lab, tally, SIZES[: max(tries - len(SIZES), 0)], ["error=EIO"])


@row(
    "R3",
    "power cut at a random moment of a save: what was not forced to the disk is lost in part, in any order",
    expected="as R1",
    asked="1,000",
    quick=50,
    full=1000,
)
def power_cut(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: states that a disk may be in afterwards."""
    import random

    draw, folder, rebuilt = random.Random(seed), lab.work / "saves", lab.work / "rebuilt"
    journals = []
    for sizes in SIZES[:2]:
        begin(folder, sizes)
        journals.append((sizes, Journal.recorded(folder, lambda sizes=sizes: save(folder, NEW, sizes))))  # type: ignore[misc]
    tally.remark(f"{sum(len(journal.events) for _, journal in journals)} moments")
    for number in range(tries):
        sizes, journal = journals[number % len(journals)]
        moment = draw.randrange(len(journal.events))
        with tally.attempt(f"cut {number} of seed {seed}, after event {moment}"):
            shutil.rmtree(rebuilt, ignore_errors=True)
            journal.rebuild(rebuilt, moment, draw)
            check_state(rebuilt, sizes, {})
    shutil.rmtree(folder)
