"""What a stage starts from is looked at to the last byte before any weight of it is used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rlhf.engine import dist
from rlhf.errors import CheckpointError
from rlhf.recipe.stages import OnlineRecipe
from rlhf.run import commit
from rlhf.run.content import check_hashes
from rlhf.run.stage import PARTS
from rlhf.train.job import Job
from rlhf.train.layout import plan

logger = logging.getLogger("rlhf.checkpoint")


def sound_checkpoint(folder: Path, newest: Path | None) -> Path | None:
    """The newest checkpoint of which every byte is as it was written; the ranks share the reading, all must call it.

    newest: the one whose names and sizes are right, None where there never was one. Damaged ones above the one that is
    used are told and set aside. Where all are damaged, nothing is changed.
    """
    problems: list[CheckpointError] = []
    older = reversed(commit.checkpoint_dirs(folder)) if newest is not None else []
    for name in dist.from_main([path.name for path in older]):
        try:
            dist.agreed(lambda name=name: _check_share(folder / name))  # type: ignore[misc]
        except CheckpointError as error:
            problems.append(error)
            continue
        if problems:
            dist.agreed(lambda name=name: _set_aside(folder / name, problems) if dist.is_main() else None)  # type: ignore[misc]
        return folder / name
    if problems:
        what = f"expected a complete checkpoint, found {len(problems)} damaged: {problems[0]}"
        raise CheckpointError(what, where=str(folder), fix="Restore one of them, or begin again with --restart.")
    return None


def _set_aside(sound: Path, problems: list[CheckpointError]) -> None:
    for problem in problems:
        logger.warning("a damaged checkpoint is set aside: %s", problem)
    for path in commit.checkpoint_dirs(sound.parent):
        if commit.step_number(path) > commit.step_number(sound):
            commit.set_aside(path)


def _check_share(checkpoint: Path) -> None:
    files = commit.verify(checkpoint, hash_limit=0)["files"]
    check_hashes(checkpoint, my_share(files))


def check_parents(job: Job) -> None:
    """Raise CheckpointError where a stage that this one starts from is not as it was published, to the last byte.

    Small files were looked at before anything was imported; these are the big ones. The ranks share the reading, all
    must call it.
    """
    folders = {parent.path for parent in job.distinct_parents()}
    if isinstance(job.recipe, OnlineRecipe) and job.recipe.share_base:
        base = Path(plan(job).source).parent
        folders |= {base} if (base / commit.MANIFEST).is_file() else set()
    dist.agreed(lambda: [check_published(folder) for folder in sorted(folders)])


def check_published(folder: Path) -> None:
    """Look at this rank's share of a published stage's big files, and at all that is small."""
    files = commit.verify(folder, parts=PARTS)["files"]
    big = {name: entry for name, entry in files.items() if entry["size"] > commit.SMALL_FILE}
    try:
        check_hashes(folder, my_share(big))
    except CheckpointError as error:
        fix = "Restore the file, or make that stage again with --restart."
        raise CheckpointError(error.what, where=error.where, fix=fix) from error


def my_share(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The files of a manifest's table that this rank reads: all ranks together read each once."""
    names = sorted(files, key=lambda name: (-files[name]["size"], name))
    return {name: files[name] for name in names[dist.rank() :: dist.world_size()]}
