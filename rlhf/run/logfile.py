"""log.txt: appended to, private, and no reason to end a run."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from io import TextIOWrapper

from rlhf.run.disk import PRIVATE_FILE


class LogFile(logging.FileHandler):
    """log.txt: private, never through a link; where the disk takes no more, that is said once on the screen."""

    _is_silent = False

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(self.baseFilename, flags, PRIVATE_FILE)
        return os.fdopen(handle, self.mode, encoding=self.encoding, errors=self.errors)  # type: ignore[return-value]

    def close(self) -> None:
        with suppress(OSError):  # of lines that were refused before; told then
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        if not self._is_silent:
            self._is_silent = True
            print(f"{self.baseFilename} takes no more lines: {error.strerror}", file=sys.stderr, flush=True)
