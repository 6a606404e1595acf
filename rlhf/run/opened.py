"""A stage folder while a process works in it: how it ends is recorded, and a false start leaves nothing behind."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from rlhf.errors import (
    CheckpointError,
    DataError,
    RecipeError,
    ResourceError,
    ServiceError,
    StoppedError,
    UnsafeError,
)
from rlhf.run import commit
from rlhf.run.disk import disk
from rlhf.run.lock import Lock

if TYPE_CHECKING:  # the folder opens itself: at run time only it knows this file
    from rlhf.run.stage import StageDir

Mode = Literal["new", "resume", "finished"]
# A mistake to mend, or a request to stop: before the first step the stage has never begun, and leaves nothing behind.
_FALSE_STARTS = (RecipeError, DataError, CheckpointError, ResourceError, ServiceError, UnsafeError, StoppedError)


class Opened:
    """A stage that this process may write to. Leaving the context records an error and gives the lock back.

    After a mistake or a request to stop before the first step, everything is as it was before the opening.
    """

    def __init__(
        self,
        stage: StageDir,
        mode: Mode,
        checkpoint: Path | None,
        lock: Lock,
        *,
        is_new: bool,
        aside: Path | None,
        was_asked: bool,
    ) -> None:
        self.stage, self.mode, self.checkpoint = stage, mode, checkpoint
        self.was_asked = was_asked  # an old request to stop was found here, and removed
        self._lock, self._is_new, self._aside = lock, is_new, aside

    def __enter__(self) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None or self.stage.is_finished():  # a result that is there stays, whatever came after it
                return
            undone = _is_false_start(error) and self._undo()
            if not undone and self._is_running():
                state, reason = _ending(error)
                with suppress(ResourceError):  # the first error is the one to report
                    self.stage.write_status(state=state, ended=now(), exit_reason=reason)
        finally:
            self.close()

    def _undo(self) -> bool:
        """Remove the folder if this opening made it and no step was finished since; --restart gives the old one back.

        Returns whether it did. Where a file STOP asked for it, whoever wrote it finds it there.
        """
        if (
            not self._is_new
            or self.stage.stop.exists()
            or self.stage.read_status()["step"]
            or self.stage.checkpoints.exists()
        ):
            return False
        with suppress(ResourceError), disk(self.stage.path):
            commit.remove_dir(self.stage.path)
            if self._aside is not None:
                self._aside.rename(self.stage.path)
        return True

    def _is_running(self) -> bool:
        return self.mode != "finished" and self.stage.read_status()["state"] == "running"

    def close(self) -> None:
        """Give the lock back."""
        self._lock.release()


def _is_false_start(error: BaseException | None) -> bool:
    """Told by an error or, where ranks have told it, by the exit code that is passed on."""
    if isinstance(error, SystemExit):
        return error.code in [kind.exit_code for kind in _FALSE_STARTS]
    return isinstance(error, (*_FALSE_STARTS, KeyboardInterrupt))


def _ending(error: BaseException) -> tuple[str, str]:
    """(state, reason) for the status of a stage that ended with this."""
    if isinstance(error, SystemExit):
        return "stopped" if error.code == StoppedError.exit_code else "failed", f"exit code {error.code}"
    state = "stopped" if isinstance(error, (StoppedError, KeyboardInterrupt)) else "failed"
    return state, (str(error) or type(error).__name__).splitlines()[0]


def now() -> float:
    """Seconds since 1970, to the millisecond."""
    return round(time.time(), 3)
