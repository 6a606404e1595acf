"""The run directory: one folder per pipeline, one folder per stage in it, every path named here.

runs/hh/
  sft/
    recipe.yaml  resolved.yaml    as given; with every default written out
    status.json                   running | finished | failed | stopped, step, heartbeat, exit reason
    provenance.json               inputs, command, code, versions, devices, parents with content hashes, data
    metrics.jsonl  samples.jsonl  log.txt
    skipped.jsonl                 updates that were left out because a number is not finite, with their rows
    checkpoints/step-000100/      own MANIFEST.json
    model/  critic/               the published result; of `label`: pairs.jsonl best.jsonl lists.jsonl answers.jsonl
    MANIFEST.json                 last: its existence means that the stage is finished
  .sft.lock  .sft.rank0.lock      who works on it: beside the folder, so that --restart can move the folder
"""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from rlhf.errors import CheckpointError, RecipeError, UnsafeError, UserError
from rlhf.run.lineage import Parent, content_hash
from rlhf.run.stage import SET_ASIDE, StageDir, StageSummary

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
_COMMAND_OF_KIND = {"policy": "sft", "reward": "rm", "value": "ppo", "data": "label"}
_CALLED = {"policy": "policy", "reward": "reward model", "value": "value model", "data": "set of labelled pairs"}
_COMMANDS = ("sft", "rm", "dpo", "ppo", "grpo", "label", "merge")


class RunDir:
    """The folder of one pipeline."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if self.root.is_symlink():  # nothing is written, moved or deleted through a link
            fix = "Name the folder that it leads to."
            raise UnsafeError("expected a folder, found a symbolic link", where=str(self.root), fix=fix)
        if self.root.exists() and not self.root.is_dir():
            raise RecipeError("expected a folder, found a file", where=str(self.root), fix="Choose another --run.")

    def stage(self, name: str) -> StageDir:
        """The stage folder of that name, existing or not. A name that could lead elsewhere is refused (exit 9)."""
        if not _NAME.fullmatch(name):
            what = f"expected a stage name of letters, digits, '.', '_' and '-', found {name!r}"
            raise UnsafeError(what, where=str(self.root), fix="Choose another --name.")
        if (self.root / name).is_symlink():
            fix = "Choose another --name, or remove the link."
            raise UnsafeError("expected a stage folder, found a symbolic link", where=str(self.root / name), fix=fix)
        return StageDir(self.root, name)

    def stages(self) -> list[StageDir]:
        """The stage folders that exist, by name; those set aside by --restart are left out."""
        if not self.root.is_dir():
            return []
        names = sorted(path.name for path in self.root.iterdir() if path.is_dir() and not path.is_symlink())
        stages = [
            StageDir(self.root, name) for name in names if _NAME.fullmatch(name) and not SET_ASIDE.fullmatch(name)
        ]
        return [stage for stage in stages if stage.exists()]

    def describe(self) -> list[StageSummary]:
        """How every stage stands, in the order in which they were started. Never fails on a damaged stage."""
        return sorted((stage.describe() for stage in self.stages()), key=lambda s: (s.started or 0.0, s.name))


def resolve_parent(ref: str, run: RunDir, kinds: tuple[str, ...], key: str, recipe_file: str) -> Parent:
    """The finished stage that `{from: ref}` names: a sibling (`sft`) or a stage of another run (`runs/other/sft`).

    It must be complete, of one of the `kinds`, and as it was published; else a CheckpointError names the recipe's file
    and key, the stage folder, and the command that makes what is missing.
    """
    where = f"{recipe_file}: {key}"
    path = Path(os.path.expanduser(ref))
    home = run if str(path) == path.name else RunDir(path.parent)
    try:
        stage = home.stage(path.name)
    except UnsafeError as error:
        raise UnsafeError(
            error.what, where=where, fix="Name a stage of this run directory, or runs/other/sft."
        ) from None
    wanted = " or ".join(_CALLED[kind] for kind in kinds)
    if found := _unfinished(stage):
        what = f"expected a finished stage with a {wanted}, found {found}"
        raise CheckpointError(what, where=where, fix=_remedy(stage, kinds))
    try:
        manifest = stage.read_manifest()
    except UnsafeError as error:
        what = f"expected {stage.path} as it was published, found in {error.where}: {error.what}"
        raise UnsafeError(what, where=where, fix=error.fix) from error
    except UserError as error:
        what = f"expected {stage.path} as it was published, found a change in {error.where}: {error.what}"
        raise CheckpointError(what, where=where, fix=error.fix) from error
    kind = manifest["kind"]
    if kind not in kinds:
        names = [s.name for s in home.describe() if s.state == "finished" and s.kind in kinds]
        names = names if home is run else [str(home.root / name) for name in names]
        fix = f"Name one of: {', '.join(names)}." if names else _remedy(home.stage(_COMMAND_OF_KIND[kinds[0]]), kinds)
        what = f"expected a {wanted}, found a {_CALLED[kind] if kind in _CALLED else kind} in {stage.path}"
        raise CheckpointError(what, where=where, fix=fix)
    return Parent(stage.path, manifest, content_hash(manifest))


def _unfinished(stage: StageDir) -> str | None:
    if not stage.path.is_dir():
        return f"no folder {stage.path}"
    if not stage.exists():
        return f"{stage.path}, which is no stage folder"
    if stage.is_finished():
        return None
    summary = stage.describe()
    progress = f" at step {summary.step} of {summary.total_steps}" if summary.total_steps else ""
    return f"{stage.path} {summary.state}{progress}" + (f" ({summary.reason})" if summary.reason else "")


def _remedy(stage: StageDir, kinds: tuple[str, ...]) -> str:
    made_by = stage.read_status()["stage"]
    command = made_by or (stage.name if stage.name in _COMMANDS else _COMMAND_OF_KIND[kinds[0]])
    name = "" if stage.name == command else f" --name {stage.name}"
    return f"Make it with: rlhf {command} RECIPE --run {shlex.quote(str(stage.root))}{name}"
