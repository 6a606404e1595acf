"""Checkpoints of a running stage: every trained engine, and the facts that the next start compares."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import FailingDiskError, NoRoomError, UserError
from rlhf.run import commit
from rlhf.run.disk import require_room, tree_bytes
from rlhf.run.layout import refuse_other_layout
from rlhf.run.stage import StageDir
from rlhf.train.guards import check_weights
from rlhf.train.pool import Budget
from rlhf.train.skips import Skips
from rlhf.train.standing import Standing
from rlhf.train.writing import library_writes

logger = logging.getLogger("rlhf.checkpoint")


_STATE, _STANDING = "state.json", "loop.json"


class Kept(Protocol):
    """Something with tensors of its own in a checkpoint: an engine, or an average of one."""

    def bad_state(self) -> dict[str, str]:
        """name -> value of this rank's tensors that are not finite."""

    def save(self, folder: Path) -> None:
        """Write it; every rank must call it, and where the disk refuses, say so after the last meeting of the ranks."""

    def bytes_to_save(self) -> int:
        """About what `save` writes, over all ranks."""

    def load(self, folder: Path) -> None:
        """Read it back; every rank must call it."""


class Remembered(Protocol):
    """Small numbers in a checkpoint, the same on every rank."""

    def as_json(self) -> dict[str, Any]:
        """Everything that the next step depends on."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Take it over."""


@dataclass(frozen=True)
class Running:
    """Everything of a running stage that its next step depends on."""

    engines: dict[str, Engine]
    others: dict[str, Kept] = field(default_factory=dict)
    state: Remembered | None = None
    budget: Budget | None = None
    standing: Standing = field(default_factory=Standing)
    skips: Skips | None = None

    def kept(self) -> dict[str, Kept]:
        """All tensors, by the name of their folder in a checkpoint."""
        return {**self.engines, **self.others}

    def updates(self) -> int:
        """Optimizer steps taken in this process: while it stays, so do the weights."""
        return sum(engine.updates for engine in self.engines.values())


class Checkpoints:
    """Writes a running stage's checkpoints, and lets training go on while the disk takes one in.

    Files are written by `save`, on every rank, since they hold what the next step changes. Then a thread of rank 0
    hashes them, forces them to the disk and gives the folder its name; it meets no other rank. One checkpoint at a time
    is in flight: whoever needs it there calls `settle`, which the next `save` does too. Until a checkpoint has its name
    the older ones stay, so a crash on the way costs the steps since the newest of them and no more.

    A save that finds a full or failing disk is tried once more, after everything was deleted that can be done without;
    for a failing disk that is its own leftovers only, since an older checkpoint may be the one that can be read. Where
    training has gone on meanwhile, the next save is the second try.
    """

    def __init__(self, folder: StageDir, running: Running, keep: int) -> None:
        self._folder, self._running, self._keep = folder, running, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None  # on rank 0
        self._begun = (0, 0)  # steps, and updates of the weights, at the last save
        self._has_failed = False  # the last try has

    def save(self, step: int) -> None:
        """Write the state after `step` finished steps; every rank must call it. The caller may go on training."""
        if (failure := self._ended()) is not None:
            self._clear(failure)
        self._begin(step)

    def _refuse_not_finite(self, step: int) -> None:
        for name, kept in self._running.kept().items():
            check_weights(
                kept.bad_state(),
                f"{name} after step {step}",
                f"It is not written: the newest checkpoint in {self._folder.checkpoints} stays. Lower train.lr.",
            )

    def settle(self) -> None:
        """Wait until the last checkpoint is complete under its name; where it failed, every rank raises why."""
        while (failure := self._ended()) is not None:
            step, updates = self._begun
            if updates != self._running.updates():
                raise failure
            self._clear(failure)
            self._begin(step)

    def _begin(self, step: int) -> None:
        """Write the files, on every rank; the thread does the rest."""
        dist.agreed(lambda: self._refuse_not_finite(step))
        self._begun = step, self._running.updates()
        temporary = None
        while temporary is None:
            try:
                temporary = self._written(step)
            except (NoRoomError, FailingDiskError) as failure:
                self._clear(failure)
        if dist.is_main():
            budget = self._running.budget
            found: dict[str, Any] = {"micro_tokens": budget.tokens} if budget is not None and budget.is_found else {}
            if self._running.skips is not None:
                found["skips"] = self._running.skips.as_json()
            facts = {"step": step, **found, **_layout(self._running.engines)}
            self._in_flight = self._thread.submit(
                self._complete, temporary, self._folder.checkpoint(step), facts, self._best()
            )

    def _written(self, step: int) -> Path:
        """A temporary folder with all files of a checkpoint."""
        needs = self._needs()
        final = self._folder.checkpoint(step)
        made = dist.agreed(lambda: str(_prepared(final, needs)) if dist.is_main() else None)
        temporary = Path(dist.from_main(made))
        for name, kept in self._running.kept().items():
            dist.agreed(lambda name=name, kept=kept: _put(kept, temporary / name, needs))  # type: ignore[misc]
        numbers = {_STANDING: self._running.standing.as_json()}
        if self._running.state is not None:
            numbers[_STATE] = self._running.state.as_json()
        dist.agreed(lambda: _write_numbers(temporary, numbers) if dist.is_main() else None)
        return temporary

    def _needs(self) -> int:
        """Bytes of the next checkpoint: as many as the last one has, or an estimate."""
        older = commit.checkpoint_dirs(self._folder.checkpoints)
        return tree_bytes(older[-1]) if older else sum(kept.bytes_to_save() for kept in self._running.kept().values())

    def _ended(self) -> UserError | None:
        """Wait for the thread. Returns, on every rank, why the disk did not take the last checkpoint in, if so."""
        in_flight, self._in_flight = self._in_flight, None
        failure: UserError | None = None
        try:
            if in_flight is not None:
                in_flight.result()
        except UserError as error:
            failure = error
        was_in_flight, told = dist.from_main((in_flight is not None, failure))
        failure = failure or told
        if was_in_flight and failure is None:
            self._has_failed = False
        if failure is not None and not isinstance(failure, (NoRoomError, FailingDiskError)):
            raise failure
        return failure

    def _clear(self, failure: UserError) -> None:
        """Delete what can be done without; raise where that was done for the try before."""
        if self._has_failed:
            raise failure
        self._has_failed = True
        dist.agreed(lambda: self._delete(failure) if dist.is_main() else None)

    def _delete(self, failure: UserError) -> None:
        folder = self._folder.checkpoints
        if isinstance(failure, NoRoomError):
            gone = commit.make_room(folder, self._best())
        else:
            gone = []
            commit.remove_temporaries(folder)
        logger.warning("%s\ntried once more; deleted before: %s", failure, ", ".join(gone) or "nothing")

    def _best(self) -> list[Path]:
        return best_checkpoint(self._folder, self._running.standing)

    def _complete(self, temporary: Path, final: Path, facts: dict[str, Any], best: list[Path]) -> None:
        commit.commit_dir(temporary, final, facts)
        commit.rotate(self._folder.checkpoints, self._keep, also=best)
        logger.info("checkpoint after step %d: %s", facts["step"], final)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the thread end what it has begun, whatever became of the training; other ranks may be gone by now."""
        self._thread.shutdown(wait=True)
        if self._in_flight is not None and (failure := self._in_flight.exception()) is not None:
            logger.warning("the last checkpoint was not written: %s", failure)


def _prepared(final: Path, needs: int) -> Path:
    require_room(final, needs)
    return commit.fresh_temporary(final)


def _put(kept: Kept, folder: Path, needs: int) -> None:
    with library_writes(folder, needs):
        kept.save(folder)


def _write_numbers(folder: Path, numbers: dict[str, dict[str, Any]]) -> None:
    for name, values in numbers.items():
        commit.write_json(folder / name, values, durable=False)  # as yet: the thread forces all files to the disk


def best_checkpoint(folder: StageDir, standing: Standing) -> list[Path]:
    """The checkpoint of the best step so far, which is not deleted; [] where none is watched for."""
    return [] if standing.best is None else [folder.checkpoint(standing.best.step)]


def load_checkpoint(path: Path, running: Running) -> int:
    """Read a complete checkpoint into what `Checkpoints` was given. Returns the number of finished steps."""
    manifest = commit.read_json(path / commit.MANIFEST)
    refuse_other_layout(path, _layout(running.engines))
    for name, kept in running.kept().items():
        kept.load(path / name)
    if running.state is not None:
        running.state.restore(commit.read_json(path / _STATE))
    running.standing.restore(commit.read_json(path / _STANDING))
    if running.budget is not None and "micro_tokens" in manifest:
        running.budget.settle(int(manifest["micro_tokens"]))
    if running.skips is not None and "skips" in manifest:
        running.skips.restore(manifest["skips"])
    return int(manifest["step"])


def _layout(engines: dict[str, Engine]) -> dict[str, object]:
    return {"devices": dist.world_size(), "zero_stages": {name: engine.zero.stage for name, engine in engines.items()}}
