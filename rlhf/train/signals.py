"""Stopping on request: a signal, a file named STOP, or time that has run out.

While a stage starts, a request ends the process at once. Later it is a flag: the loop looks at it after every step, and
what takes long inside a step (sampling, scoring, evaluating) calls `check`, which leaves by an exception. A second
Ctrl-C ends the process wherever it is.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rlhf.errors import StoppedError

_LOOKS_EVERY_S = 0.5


class StopRequest:
    """Remembers that somebody asked this process to stop. No torch: it listens before anything heavy is imported."""

    def __init__(self) -> None:
        self.requested = False
        self.after_step = False  # while there is no step to finish, a request ends the process at once
        self.why = "on request"
        self._started = time.monotonic()

    def listen(self) -> StopRequest:
        """Take over SIGTERM, SIGINT and SIGHUP; those that are ignored, as under nohup, stay ignored."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)
        return self

    @contextmanager
    def watching(self, file: Path, minutes: float | None) -> Iterator[None]:
        """Inside, a file of that name is a request too, and so are `minutes` since this object was made."""
        left = threading.Event()
        threading.Thread(target=self._watch, args=(file, minutes, left), name="stop", daemon=True).start()
        try:
            yield
        finally:
            left.set()

    def check(self) -> None:
        """Raise StoppedError where a request has come."""
        if self.requested:
            raise self.error()

    def error(self, when: str = "") -> StoppedError:
        """What the user is told. when: how far the stage has come."""
        return StoppedError(f"stopped {self.why}{when}", fix="The same command resumes.")

    def _watch(self, file: Path, minutes: float | None, left: threading.Event) -> None:
        while not left.wait(_LOOKS_EVERY_S):
            is_over = minutes is not None and time.monotonic() - self._started > 60 * minutes
            if is_over or file.is_file():
                self.why = f"after max_minutes = {minutes:g}" if is_over else f"on request, as {file} says"
                os.kill(os.getpid(), signal.SIGTERM)  # ends what is starting, as any other request does
                return

    def _ask(self, number: int, frame: FrameType | None) -> None:
        is_first, self.requested = not self.requested, True
        if (is_first and not self.after_step) or (not is_first and number == signal.SIGINT):
            raise KeyboardInterrupt
