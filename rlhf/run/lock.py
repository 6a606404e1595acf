"""A lock that one process holds, and that is gone with it."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from rlhf.errors import BusyError, CheckpointError
from rlhf.run.commit import read_json
from rlhf.run.disk import PRIVATE_FILE, disk, make_private

_AT_LEAST = 3  # tries: `holder` of another process may have the lock for an instant
_PAUSES = (0.02, 0.05, *[0.1] * 9)  # seconds between tries, as long as the note tells of no living process


class Lock:
    """An advisory lock on a file, held by one process and gone with it. The file tells others who holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock at once, or raise BusyError naming the holder's pid, host and start."""
        with disk(self.path):
            make_private(self.path.parent)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(self.path, flags, PRIVATE_FILE)
            if not self._try(handle, fcntl.LOCK_EX, _AT_LEAST):
                os.close(handle)
                raise BusyError(f"held by {describe_holder(self._read())}", where=str(self.path))
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(owner).encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Give the lock back; harmless where it is not held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def holder(self) -> dict[str, Any] | None:
        """Who holds the lock now ({pid, host, since}), or None."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            return None if self._try(handle, fcntl.LOCK_SH, at_least=1) else self._read()
        finally:
            os.close(handle)

    def _try(self, handle: int, kind: int, at_least: int) -> bool:
        """Take it, shared or not, unless a living process has it.

        Between the lock and the note stands what an earlier holder wrote, or nothing: whoever comes then waits for the
        note, so that nobody is told of a process that is gone.
        """
        for number, pause in enumerate((*_PAUSES, 0.0), 1):
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if number >= at_least and _is_alive(self._read()):
                    return False
            time.sleep(pause)
        return False

    def _read(self) -> dict[str, Any]:
        try:
            owner = read_json(self.path)
        except CheckpointError:  # between the lock and the note
            owner = {}
        return {key: owner.get(key) for key in ("pid", "host", "since")}


def describe_holder(owner: dict[str, Any]) -> str:
    """One phrase: which process, where, since when."""
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"


def _is_alive(owner: dict[str, Any]) -> bool:
    """Whether a note may be that of the holder: of another machine nothing is known."""
    if owner["host"] != socket.gethostname():
        return owner["pid"] is not None
    return isinstance(owner["pid"], int) and Path(f"/proc/{owner['pid']}").exists()
