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
from rlhf.run.commit import disk, read_json
from rlhf.run.disk import PRIVATE_FILE, make_private


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
            for pause in (0.02, 0.05, 0.0):  # `holder` of another process may have it for an instant
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(pause)
            else:
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
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return self._read()
        finally:
            os.close(handle)

    def _read(self) -> dict[str, Any]:
        try:
            owner = read_json(self.path)
        except CheckpointError:  # between the lock and the note
            owner = {}
        return {key: owner.get(key) for key in ("pid", "host", "since")}


def describe_holder(owner: dict[str, Any]) -> str:
    """One phrase: which process, where, since when."""
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
