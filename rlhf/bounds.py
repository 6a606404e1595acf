"""Limits on time and memory for what others have written: chat templates, patterns, reward functions.

Python code is interrupted, waiting included. A single call into compiled code that does not return (a tensor operation,
an extension) is not: what takes too long there is told when it comes back.
"""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_STATM = Path("/proc/self/statm")  # its first number: pages of address space


class OutOfTimeError(BaseException):
    """Not an Exception: code that catches those must not swallow it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError inside after `seconds`; timer and handler are as before afterwards.

    Only the main thread gets signals; elsewhere nothing is interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        timer = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, *timer)
    finally:
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Inside, this process gets at most `extra` bytes of address space more than it has; then a MemoryError.

    Where the system does not tell how much that is, nothing is limited.
    """
    if not _STATM.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = int(_STATM.read_bytes().split()[0]) * resource.getpagesize() + extra
    least = min([wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
