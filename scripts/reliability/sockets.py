"""Who could talk to a run from outside: every socket that its processes listen on."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from scripts.reliability.lab import STAGES, Child, Lab
from scripts.reliability.row import Tally, row

LISTENS = "0A"  # the state in /proc/net/tcp
LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|::1|::ffff:127\.\d+\.\d+\.\d+")
MOST = 120.0


@row(
    "S12",
    "every stage on one rank and on two through the launcher: the sockets that any of its processes listens on",
    expected="none beyond the loopback interface",
    asked="each stage",
    quick=1,
    full=10,
    alone=True,
)
def listening(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: starts, on two ranks first."""
    for ranks, stage in [(ranks, stage) for ranks in (2, 1) for stage in STAGES][:tries]:
        name = f"s12-{stage}-{ranks}"
        with tally.attempt(name):
            found = watched(lab.start(lab.command(stage, "--name", name, "--gpus", str(ranks))), lab.root / name)
            assert found, "saw no socket at all: ranks listen on the loopback interface"
            assert not (open_ones := sorted(a for a in found if not LOOPBACK.fullmatch(a))), open_ones
        lab.clear(name)


def watched(child: Child, stage: Path) -> set[str]:
    """The addresses that a command and all that it starts listen on, looked at until it ends."""
    found: set[str] = set()
    deadline = time.monotonic() + MOST
    while child.is_running():
        assert time.monotonic() < deadline, child.text("err")
        found |= listened(lambda pid: pid in child.pids or str(stage.name) in words(pid))
        time.sleep(0.02)
    assert child.codes[child.pids[0]] == 0, child.text("err")
    return found


def words(pid: int) -> list[str]:
    """The command line of a process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    return []


def listened(is_ours: Callable[[int], bool]) -> set[str]:
    """The addresses of all TCP sockets that processes listen on."""
    held = set()
    for name in os.listdir("/proc"):
        if name.isdecimal() and is_ours(int(name)):
            with suppress(OSError):
                for entry in os.scandir(f"/proc/{name}/fd"):
                    with suppress(OSError):
                        held.add(os.readlink(entry.path))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in held:
                found.add(address(fields[1]))
    return found


def address(text: str) -> str:
    """As /proc/net/tcp has it (words of four bytes in the order of the machine, `:port`), for people."""
    packed = bytes.fromhex(text.partition(":")[0])
    swapped = b"".join(packed[i : i + 4][::-1] for i in range(0, len(packed), 4))
    return socket.inet_ntop(socket.AF_INET6 if len(packed) == 16 else socket.AF_INET, swapped)
