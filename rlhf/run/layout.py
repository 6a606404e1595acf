"""How a checkpoint is cut into the parts of its ranks. It is read by as many ranks, under the same ZeRO stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf.errors import CheckpointError
from rlhf.run import commit


def refuse_other_layout(checkpoint: Path, found: Mapping[str, object]) -> None:
    """Raise CheckpointError where a checkpoint was written under another layout.

    found: `devices`, the number of ranks, which is known before anything is loaded; `zero_stages`, engine -> stage.
    """
    manifest = commit.read_json(checkpoint / commit.MANIFEST)
    for key, value in found.items():
        if manifest[key] != value:
            raise CheckpointError(
                f"expected {key} {manifest[key]}, found {value}: optimizer state is cut for one layout",
                where=str(checkpoint),
                fix="Resume with the same number of devices and the same zero.stage, or begin again with --restart.",
            )
