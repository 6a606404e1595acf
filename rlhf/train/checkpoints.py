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
from rlhf.errors import CheckpointError
from rlhf.run import commit
from rlhf.run.stage import StageDir
from rlhf.train.guards import check_weights
from rlhf.train.pool import Budget
from rlhf.train.skips import Skips

logger = logging.getLogger("rlhf.checkpoint")


_STATE = "state.json"


class Kept(Protocol):
    """Something with tensors of its own in a checkpoint: an engine, or an average of one."""

    def bad_state(self) -> dict[str, str]:
        """name -> value of this rank's tensors that are not finite."""

    def save(self, folder: Path) -> None:
        """Write it; every rank must call it."""

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
    skips: Skips | None = None

    def kept(self) -> dict[str, Kept]:
        """All tensors, by the name of their folder in a checkpoint."""
        return {**self.engines, **self.others}


class Checkpoints:
    """Writes a running stage's checkpoints, and lets training go on while the disk takes one in.

    Files are written by `save`, on every rank, since they hold what the next step changes. Then a thread of rank 0
    hashes them, forces them to the disk and gives the folder its name; it meets no other rank. One checkpoint at a time
    is in flight: whoever needs it there calls `settle`, which the next `save` does too. Until a checkpoint has its name
    the older ones stay, so a crash on the way costs the steps since the newest of them and no more.
    """

    def __init__(self, folder: StageDir, running: Running, keep: int) -> None:
        self._folder, self._running, self._keep = folder, running, keep
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._in_flight: Future[None] | None = None  # on rank 0

    def save(self, step: int) -> None:
        """Write the state after `step` finished steps; every rank must call it. The caller may go on training."""
        self.settle()
        running, final = self._running, self._folder.checkpoint(step)
        dist.agreed(lambda: self._refuse_not_finite(step))
        temporary = Path(dist.from_main(str(commit.fresh_temporary(final)) if dist.is_main() else None))
        for name, kept in running.kept().items():
            kept.save(temporary / name)
        dist.barrier()
        if dist.is_main():
            if running.state is not None:
                commit.write_json(temporary / _STATE, running.state.as_json())
            budget = running.budget
            found: dict[str, Any] = {"micro_tokens": budget.tokens} if budget is not None and budget.is_found else {}
            if running.skips is not None:
                found["skips"] = running.skips.as_json()
            facts = {"step": step, **found, **_layout(running.engines)}
            self._in_flight = self._thread.submit(self._complete, temporary, final, facts)

    def _refuse_not_finite(self, step: int) -> None:
        for name, kept in self._running.kept().items():
            check_weights(
                kept.bad_state(),
                f"{name} after step {step}",
                f"It is not written: the newest checkpoint in {self._folder.checkpoints} stays. Lower train.lr.",
            )

    def settle(self) -> None:
        """Wait until the last checkpoint is complete under its name; where it failed, every rank raises why."""
        dist.agreed(self._wait)

    def _wait(self) -> None:
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is not None:
            in_flight.result()

    def _complete(self, temporary: Path, final: Path, facts: dict[str, Any]) -> None:
        commit.commit_dir(temporary, final, facts)
        commit.rotate(self._folder.checkpoints, self._keep)
        logger.info("checkpoint after step %d: %s", facts["step"], final)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let the thread end what it has begun, whatever became of the training; other ranks may be gone by now."""
        self._thread.shutdown(wait=True)
        if self._in_flight is not None and (failure := self._in_flight.exception()) is not None:
            logger.warning("the last checkpoint was not written: %s", failure)


def load_checkpoint(path: Path, running: Running) -> int:
    """Read a complete checkpoint into what `Checkpoints` was given. Returns the number of finished steps."""
    manifest = commit.read_json(path / commit.MANIFEST)
    now = _layout(running.engines)
    for key, value in now.items():
        if manifest[key] != value:
            raise CheckpointError(
                f"expected {key} {manifest[key]}, found {value}: optimizer state is cut for one layout",
                where=str(path),
                fix="Resume with the same number of devices and the same zero.stage, or begin again with --restart.",
            )
    for name, kept in running.kept().items():
        kept.load(path / name)
    if running.state is not None:
        running.state.restore(commit.read_json(path / _STATE))
    if running.budget is not None and "micro_tokens" in manifest:
        running.budget.settle(int(manifest["micro_tokens"]))
    if running.skips is not None and "skips" in manifest:
        running.skips.restore(manifest["skips"])
    return int(manifest["step"])


def _layout(engines: dict[str, Engine]) -> dict[str, object]:
    return {"devices": dist.world_size(), "zero_stages": {name: engine.zero.stage for name, engine in engines.items()}}
