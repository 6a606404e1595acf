"""Checkpoints of a running stage: every trained engine, and the facts that the next start compares."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import CheckpointError
from rlhf.run import commit
from rlhf.run.stage import StageDir

logger = logging.getLogger("rlhf.checkpoint")


_STATE = "state.json"


class Kept(Protocol):
    """Something with tensors of its own in a checkpoint: an engine, or an average of one."""

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

    def kept(self) -> dict[str, Kept]:
        """All tensors, by the name of their folder in a checkpoint."""
        return {**self.engines, **self.others}


def save_checkpoint(folder: StageDir, running: Running, step: int, keep: int) -> None:
    """Write the state after `step` finished steps; every rank must call it. It appears under its name when complete."""
    final = folder.checkpoint(step)
    temporary = Path(dist.from_main(str(commit.fresh_temporary(final)) if dist.is_main() else None))
    for name, kept in running.kept().items():
        kept.save(temporary / name)
    dist.barrier()
    if dist.is_main():
        if running.state is not None:
            commit.write_json(temporary / _STATE, running.state.as_json())
        commit.commit_dir(temporary, final, {"step": step, **_layout(running.engines)})
        commit.rotate(folder.checkpoints, keep)
        logger.info("checkpoint after step %d: %s", step, final)
    dist.barrier()


def load_checkpoint(path: Path, running: Running) -> int:
    """Read a complete checkpoint into what `save_checkpoint` was given. Returns the number of finished steps."""
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
    return int(manifest["step"])


def _layout(engines: dict[str, Engine]) -> dict[str, object]:
    return {"devices": dist.world_size(), "zero_stages": {name: engine.zero.stage for name, engine in engines.items()}}
