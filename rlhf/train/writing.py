"""Files that libraries write: each says in a way of its own that the disk refuses. Here all say it in ours."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf.run.commit import TEMPORARY
from rlhf.run.disk import disk, told

_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers
_TORCH = ("inline_container", "PytorchStreamWriter")
_PROBE = 2**20  # bytes


@contextmanager
def library_writes(folder: Path, needs: int) -> Iterator[None]:
    """Turn a disk's refusal inside into a UserError. needs: bytes that are to be written into the folder."""
    with disk(folder, needs):
        try:
            yield
        except OSError:
            raise
        except Exception as error:
            number = _number(error, folder)
            answer = None if number is None else told(OSError(number, os.strerror(number)), folder, needs)
            if answer is None:
                raise
            raise answer from error


def _number(error: Exception, folder: Path) -> int | None:
    """The operating system's number of a failure that a library tells of; None where it is none of a disk."""
    text = str(error)
    if match := _OS_ERROR.search(text):
        return int(match[1])
    return _asked(folder) if isinstance(error, RuntimeError) and any(word in text for word in _TORCH) else None


def _asked(folder: Path) -> int:
    """What the disk answers now: torch does not pass it on. A disk that takes more has failed for once."""
    probe = folder / f"{TEMPORARY}{secrets.token_hex(4)}"
    try:
        handle = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if os.write(handle, bytes(_PROBE)) < _PROBE:
                return errno.ENOSPC
            os.fsync(handle)
        finally:
            os.close(handle)
            probe.unlink()
    except OSError as error:
        return error.errno or errno.EIO
    return errno.EIO
