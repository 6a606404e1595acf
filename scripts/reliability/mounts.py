"""Disks of a scenario's own: a small one, or one that can be read only. In a process with mounts of its own."""

from __future__ import annotations

import ctypes
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

from scripts.reliability.row import Tally

_NEW_MOUNTS, _NEW_USER = 0x00020000, 0x10000000
_READ_ONLY, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 32, 4096, 16384, 1 << 18


def apart(tally: Tally, work: Callable[[Tally], None]) -> None:
    """Run a part of a scenario in a fork whose mounts nobody else sees; what it has counted comes back.

    Where the system allows no such thing, that is remarked and nothing is tried.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        own = Tally()
        try:
            os.close(reader)
            try:
                _leave_mounts()
            except OSError as error:
                own.remark(f"not tried: no mounts of one's own here ({error.strerror})")
            else:
                work(own)
        except BaseException:  # noqa: BLE001  told below
            own.violations.append(f"the scenario itself failed: {traceback.format_exc()[-1500:]}")
        finally:
            with os.fdopen(writer, "w") as pipe:
                json.dump(vars(own), pipe)
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = Tally(**json.load(pipe))
    os.waitpid(pid, 0)
    tally.tried += found.tried
    tally.violations += found.violations
    for remark in found.remarks:
        tally.remark(remark)


def can_mount() -> bool:
    """Whether `apart` works here."""
    tally = Tally()
    apart(tally, lambda own: own.remark("works"))
    return tally.remarks == ["works"]


def small_disk(path: Path, size: int) -> None:
    """Put an empty disk of `size` bytes at a path."""
    path.mkdir(parents=True, exist_ok=True)
    _mount(b"none", path, b"tmpfs", 0, f"size={size}".encode())


def resize(path: Path, size: int) -> None:
    """Give a small disk another size."""
    _mount(b"none", path, b"tmpfs", _REMOUNT, f"size={size}".encode())


def read_only(path: Path, wanted: bool = True) -> None:
    """Make all below a folder read-only, or writable again."""
    if not os.path.ismount(path):
        _mount(os.fsencode(path), path, b"none", _BIND, b"")
    _mount(b"none", path, b"none", _REMOUNT | _BIND | (_READ_ONLY if wanted else 0), b"")


def _leave_mounts() -> None:
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _mount(b"none", Path("/"), b"none", _REC | _PRIVATE, b"")


def _mount(source: bytes, target: Path, kind: bytes, flags: int, options: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source, os.fsencode(target), kind, flags, options):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))
