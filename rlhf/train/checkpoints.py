"""Checkpoints of a running stage: every trained engine, and the facts that the next start compares."""

from __future__ import annotations

import logging
from pathlib import Path

from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import CheckpointError
from rlhf.run import commit
from rlhf.run.stage import StageDir

logger = logging.getLogger("rlhf.checkpoint")


def save_checkpoint(folder: StageDir, engines: dict[str, Engine], step: int, keep: int) -> None:
    """Write the state after `step` finished steps; every rank must call it. It appears under its name when complete."""
    final = folder.checkpoint(step)
    temporary = Path(dist.from_main(str(commit.fresh_temporary(final)) if dist.is_main() else None))
    for name, engine in engines.items():
        engine.save(temporary / name)
    dist.barrier()
    if dist.is_main():
        commit.commit_dir(temporary, final, {"step": step, **_layout(engines)})
        commit.rotate(folder.checkpoints, keep)
        logger.info("checkpoint after step %d: %s", step, final)
    dist.barrier()


def load_checkpoint(path: Path, engines: dict[str, Engine]) -> int:
    """Read a complete checkpoint into the engines. Returns the number of finished steps."""
    manifest = commit.read_json(path / commit.MANIFEST)
    now = _layout(engines)
    for key, value in now.items():
        if manifest[key] != value:
            raise CheckpointError(
                f"expected {key} {manifest[key]}, found {value}: optimizer state is cut for one layout",
                where=str(path),
                fix="Resume with the same number of devices and the same zero.stage, or begin again with --restart.",
            )
    for name, engine in engines.items():
        engine.load(path / name)
    return int(manifest["step"])


def _layout(engines: dict[str, Engine]) -> dict[str, object]:
    return {"devices": dist.world_size(), "zero_stages": {name: engine.zero.stage for name, engine in engines.items()}}
