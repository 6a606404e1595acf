"""What a disk may answer, in words; whether there is room on it; and who may read what we put there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlhf.errors import FailingDiskError, NoRoomError, ResourceError, UnsafeError, UserError

PRIVATE_FILE, PRIVATE_FOLDER, PRIVATE_MASK = 0o600, 0o700, 0o077  # runs hold data, samples and weights of their owner
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GONE = {errno.ENOENT, errno.ESTALE}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOLCK, errno.ENAMETOOLONG, errno.ENOTDIR}


@contextmanager
def disk(path: Path, needs: int = 0) -> Iterator[None]:
    """Turn what a disk may answer (full, failing, read-only, a planted link) into an error with path and remedy.

    needs: bytes that were to be written; 0 where only a name changes.
    """
    try:
        yield
    except OSError as error:
        answer = told(error, path, needs)
        if answer is None:
            raise
        raise answer from error


def told(error: OSError, path: Path, needs: int = 0) -> UserError | None:
    """A disk's answer in words; None for what is no answer of a disk."""
    where, said = str(path), error.strerror
    if error.errno == errno.ELOOP:
        fix = "Remove the link; nothing is written through links."
        return UnsafeError("expected a plain file, found a symbolic link", where=where, fix=fix)
    if error.errno in _NO_ROOM:
        return no_room(path, needs, str(said))
    if error.errno == errno.EIO:
        fix = (
            "The disk, or the way to it, is failing (see `dmesg`): save what is on it, then run the same command again."
        )
        return FailingDiskError(f"the disk does not take it in: {said}; {_amounts(path, needs)}", where=where, fix=fix)
    if error.errno in _GONE:
        fix = "Put the run directory back, or begin again: nothing is written to a folder that was taken away."
        return ResourceError("cannot be written: the folder was removed meanwhile", where=where, fix=fix)
    if error.errno in _NO_ACCESS:
        fix = "Choose a --run folder that this user can write to."
        return ResourceError(f"cannot be written: {said}", where=where, fix=fix)
    return None


def no_room(path: Path, needs: int, said: str) -> NoRoomError:
    """The error of a full disk."""
    fix = "Free some space on this disk; the same command resumes."
    return NoRoomError(f"cannot be written: {said}; {_amounts(path, needs)}", where=str(path), fix=fix)


def require_room(path: Path, needs: int) -> None:
    """Raise NoRoomError where fewer than `needs` bytes are free on the disk of a path, existing or not."""
    if free_bytes(path) < needs:
        raise no_room(path, needs, os.strerror(errno.ENOSPC))


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write to the disk of a path, existing or not."""
    found = os.statvfs(_nearest(path))
    return found.f_bavail * found.f_frsize


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what goes away meanwhile counts nothing."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total


def refuse_foreign(path: Path) -> None:
    """Raise UnsafeError where a folder that exists belongs to another user: its content may be made to harm."""
    try:
        owner = os.lstat(path).st_uid
    except OSError:
        return
    if owner != os.geteuid():
        what = f"expected a folder of this user ({os.geteuid()}), found one of user {owner}"
        fix = "Choose another --run; or, if you trust that user, add --allow-foreign."
        raise UnsafeError(what, where=str(path), fix=fix)


def make_private(path: Path) -> None:
    """Make a folder that only its owner can enter, with its parents; an existing one stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)


def _amounts(path: Path, needs: int) -> str:
    """A name alone may need a block of a folder."""
    block = os.statvfs(_nearest(path)).f_frsize
    return f"{needs or block:,} bytes needed, {free_bytes(path):,} free"


def _nearest(path: Path) -> Path:
    return next(p for p in (path, *path.absolute().parents) if p.exists())
