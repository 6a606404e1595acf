"""Every way a run can fail for a reason the user can act on.

    UserError                    exit 1   our fault unless a subclass says otherwise
    |- RecipeError               exit 2   the recipe or the command line
    |- DataError                 exit 3   a data file, a row, or nothing left to train on
    |- CheckpointError           exit 4   a parent stage, model folder or checkpoint: missing, unfinished, wrong kind
    |- NumericsError             exit 5   a loss, gradient or invariant that must not be trained on
    |  `- NotFiniteError         exit 5   a rollout with a number that is not finite
    |- BusyError                 exit 6   another process holds the stage folder
    |- ResourceError             exit 7   disk or memory
    |  |- NoRoomError                     a full disk or an exhausted quota
    |  `- FailingDiskError                a disk that answers with an input/output error
    |- ServiceError              exit 8   something outside (a reward server, the hub)
    |- UnsafeError               exit 9   refused because it would run code or leave the run directory
    |- WorkerLostError           exit 10  a rank died
    `- StoppedError              exit 75  stopped on request; the same command resumes

`str(error)` is what the user reads: `where: what was expected, what was found`, then one line that says what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType


class UserError(Exception):
    """A failure with a place, a reason and a remedy; shown without a traceback."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\n  {self.fix}" if self.fix else head


class RecipeError(UserError):
    """One or several problems of a recipe, all reported at once."""

    exit_code = 2


class DataError(UserError):
    """A data file, row or field that cannot be used."""

    exit_code = 3


class CheckpointError(UserError):
    """A parent stage, published model or checkpoint that is missing, unfinished or of the wrong kind."""

    exit_code = 4


class NumericsError(UserError):
    """A non-finite number or a broken invariant."""

    exit_code = 5


class NotFiniteError(NumericsError):
    """A rollout with a number that is not finite: its step is left out, and the run ends where that goes on.

    found: what is not finite -> a value of it. rows: the answers that hold it, by their places in the rollout.
    """

    def __init__(
        self,
        what: str,
        *,
        found: Mapping[str, str] = MappingProxyType({}),
        rows: Sequence[int] = (),
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.found, self.rows = dict(found), list(rows)


class BusyError(UserError):
    """Another process works in the same stage folder."""

    exit_code = 6


class ResourceError(UserError):
    """Out of disk or memory."""

    exit_code = 7


class NoRoomError(ResourceError):
    """A disk is full, or a quota is used up."""


class FailingDiskError(ResourceError):
    """A disk, or the way to it, fails."""


class ServiceError(UserError):
    """A service outside this process failed for good."""

    exit_code = 8


class UnsafeError(UserError):
    """Refused: it would run code from data or write outside the run directory."""

    exit_code = 9


class WorkerLostError(UserError):
    """A rank died; the others were ended."""

    exit_code = 10


class StoppedError(UserError):
    """Stopped on request with a checkpoint written; the same command resumes."""

    exit_code = 75
