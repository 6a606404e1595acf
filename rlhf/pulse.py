"""Signs of life of ranks, for the command that started them: is one frozen, and what was each doing last?

Every rank has a file in a private folder of the job. A thread touches it once a second (`beat`), which a frozen process
does not; the training writes into it what it has begun (`doing`). A rank that beats and yet makes no progress is not
frozen: the others, which wait for it in a collective, tell of it when their patience ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

WATCHDOG_S = 300  # seconds without a sign of life after which a rank is taken for frozen
RANK_TIMEOUT_S = 1800  # seconds that a rank waits for the others in a collective
BEAT_S = 1.0
FOLDER = "RLHF_JOB_FOLDER"  # in the environment of ranks that are all on this machine
RENDEZVOUS = "rendezvous"  # a file of the folder


def rendezvous() -> Path | None:
    """For a rank: the file by which it finds the others, where all of them are on this machine."""
    return Path(os.environ[FOLDER]) / RENDEZVOUS if FOLDER in os.environ else None


def beat() -> None:
    """Give a sign of life, which takes no room on the disk."""
    if (file := _own()) is not None:
        with suppress(OSError):
            file.touch(mode=0o600)


def clear() -> None:
    """Remove what this rank has in the folder, and the folder where it is the last: its owner is gone."""
    for file in (_own(), rendezvous()):
        with suppress(OSError):
            if file is not None:
                file.unlink()
                file.parent.rmdir()


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Tell what this rank does inside. Where it fails, that stays written."""
    file = _own()
    before = _read(file)
    _write(file, what)
    yield
    _write(file, before)


class Pulses:
    """How long ranks have been silent, as the command that started them sees it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: dict[str, int] = {}
        self._silent: dict[str, float] = {}
        self._looked = time.monotonic()

    def silence(self, ranks: Sequence[str]) -> dict[str, float]:
        """Seconds since the last sign of life of each, to be asked often.

        Time in which this process itself did not run is not counted: the ranks may have stood still with it. Where
        somebody has removed the folder nothing is known of them, and none is called silent.
        """
        now = time.monotonic()
        waited, self._looked = min(now - self._looked, BEAT_S), now
        is_there = self._folder.is_dir()
        for rank in ranks:
            beat = _time(file_of(self._folder, rank))
            is_new = rank not in self._seen or self._seen[rank] != beat
            self._seen[rank] = beat
            self._silent[rank] = 0.0 if is_new or not is_there else self._silent[rank] + waited
        return {rank: self._silent[rank] for rank in ranks}

    def doing(self, rank: str) -> str:
        """What a rank has told last; empty where it has told nothing."""
        return _read(file_of(self._folder, rank))


def file_of(folder: Path, rank: str) -> Path:
    """Where a rank gives its signs of life."""
    return folder / f"rank-{rank}"


def _own() -> Path | None:
    return file_of(Path(os.environ[FOLDER]), os.environ["RANK"]) if FOLDER in os.environ else None


def _read(file: Path | None) -> str:
    try:
        return file.read_text(errors="replace").partition("\n")[0] if file is not None else ""
    except OSError:
        return ""


def _write(file: Path | None, text: str) -> None:
    """Put one line over what is there, at one stroke: a rank may freeze at any moment, and leaves a whole line."""
    with suppress(OSError):  # a full disk: the training must not fail for want of a sign
        if file is not None:
            number = os.open(file, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.pwrite(number, f"{text}\n".encode(), 0)
            finally:
                os.close(number)


def _time(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
