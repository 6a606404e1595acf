"""Stopping on request: SIGTERM or Ctrl-C finish the step and write a checkpoint, a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Remembers that somebody asked this process to stop. No torch: it listens before anything heavy is imported."""

    def __init__(self) -> None:
        self.requested = False
        self.after_step = False  # while there is no step to finish, a request ends the process at once

    def listen(self) -> StopRequest:
        """Take over SIGTERM and SIGINT."""
        signal.signal(signal.SIGTERM, self._ask)
        signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        is_first, self.requested = not self.requested, True
        if (is_first and not self.after_step) or (not is_first and number == signal.SIGINT):
            raise KeyboardInterrupt
