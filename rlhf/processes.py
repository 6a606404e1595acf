"""The processes of a job that was started in a session of its own: which are ranks, how they fail, their end."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rlhf.pulse import Pulses

STOPPED = 75
SCAN_S = 1.0
KILL_S = 10.0


@dataclass(frozen=True)
class Process:
    """What the kernel says of a process."""

    pid: int
    state: str
    parent: int
    session: int
    start: int  # clock ticks since boot; with the pid, an identity
    status: int  # as from wait(), once the process has ended

    @property
    def ended(self) -> bool:
        """Whether it runs no more; its parent may not have heard of it yet."""
        return self.state in "ZX"


GONE = Process(pid=0, state="X", parent=0, session=0, start=0, status=0)


def stat(pid: int) -> Process:
    """A process as it is now; GONE where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return GONE
    return Process(pid, fields[0], int(fields[1]), int(fields[3]), int(fields[19]), int(fields[49]))


def environment_of(pid: int) -> dict[str, str]:
    """The environment that a process was started with; empty where that cannot be seen."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


class Session:
    """The processes of the session that the runner leads. The runner is reaped last: until then its pid stays ours."""

    def __init__(self, leader: int, pulses: Pulses) -> None:
        self._leader, self._pulses = leader, pulses
        self._ranks: dict[str, int] = {}  # rank -> pid
        self._expected = float("inf")
        self._next_scan = 0.0
        self._told: set[int] = set()
        self.failures: dict[str, int] = {}  # the first ranks that failed -> exit code, negative: signal

    def members(self) -> list[Process]:
        """The processes that are still running."""
        found = [stat(int(name)) for name in os.listdir("/proc") if name.isdecimal()]
        return sorted((p for p in found if p.session == self._leader and not p.ended), key=lambda p: p.pid)

    def is_alive(self) -> bool:
        """Whether the runner, or any other process of the session, is still running."""
        return not stat(self._leader).ended or bool(self.members())

    def observe(self) -> None:
        """Find the ranks that have started, and note how the first of them failed: the launcher tells of one only."""
        if len(self._ranks) < self._expected and time.monotonic() >= self._next_scan:
            self._scan()
        if not self.failures:
            ended = {rank: process for rank, pid in self._ranks.items() if (process := stat(pid)).ended}
            codes = {rank: os.waitstatus_to_exitcode(process.status) for rank, process in ended.items()}
            self.failures = {rank: code for rank, code in codes.items() if code}

    def frozen(self, after_s: float) -> dict[str, float]:
        """Running ranks that have given no sign of life for so long -> seconds. To be asked at every look."""
        silent = self._pulses.silence([rank for rank, pid in self._ranks.items() if not stat(pid).ended])
        return {rank: seconds for rank, seconds in silent.items() if seconds > after_s}

    def doing(self) -> dict[str, str]:
        """What every rank has told last."""
        return {rank: told for rank in self._ranks if (told := self._pulses.doing(rank))}

    def _scan(self) -> None:
        self._next_scan = time.monotonic() + SCAN_S
        for process in self.members():
            environment = environment_of(process.pid)
            if {"RANK", "LOCAL_SIZE"} <= environment.keys() and "RANK" not in environment_of(process.parent):
                self._ranks.setdefault(environment["RANK"], process.pid)
                self._expected = int(environment["LOCAL_SIZE"])

    def has_lost(self) -> bool:
        """Whether a rank has failed, or the runner is gone while others are still running."""
        return any(code != STOPPED for code in self.failures.values()) or stat(self._leader).ended

    def has_ended(self) -> bool:
        """Whether all ranks have ended, however; then the launcher has a second's work left."""
        return len(self._ranks) == self._expected and all(stat(pid).ended for pid in self._ranks.values())

    def ask_to_stop(self) -> None:
        """Send SIGTERM once to every rank, or to the launcher as long as it has started none."""
        self._scan()
        for pid in list(self._ranks.values()) or [p.pid for p in self.members()]:
            if pid not in self._told:
                self._told.add(pid)
                send(pid, signal.SIGTERM)

    def kill(self) -> int:
        """Kill whatever is still running. Returns how many processes that was."""
        killed: set[int] = set()
        deadline = time.monotonic() + KILL_S
        while (members := self.members()) and time.monotonic() < deadline:
            for process in members:
                killed.add(process.pid)
                send(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        return len(killed)


def send(pid: int, number: int) -> None:
    """A signal to a process that may be gone."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)
