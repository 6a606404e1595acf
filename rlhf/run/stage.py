"""The folder of one stage: its paths, how it is opened, what it records about itself, how its result is published.

Opening decides what the command does: begin, resume, say "finished", or refuse. The locks lie beside the folder, so
that --restart can move the folder away.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.errors import (
    BusyError,
    CheckpointError,
    RecipeError,
    UnsafeError,
    UserError,
)
from rlhf.run import commit
from rlhf.run.disk import disk, make_private, refuse_foreign
from rlhf.run.lineage import (
    PROVENANCE,
    Parent,
    differences,
    invocation,
    recordable,
    recorded_parents,
    stale_parents,
)
from rlhf.run.lock import Lock, describe_holder
from rlhf.run.logfile import LogFile
from rlhf.run.opened import Mode, Opened, now

PARTS = ("model", "critic", "ema")
SET_ASIDE = re.compile(r"(.+)\.old-(\d+)")
_RESERVED = {"report"}
_STATUS: dict[str, tuple[tuple[type, ...], Any]] = {  # field -> types, value while it is not known
    "state": ((str,), "unknown"),
    "stage": ((str,), None),
    "step": ((int,), 0),
    "total_steps": ((int,), None),
    "heartbeat": ((int, float), None),
    "started": ((int, float), None),
    "ended": ((int, float), None),
    "exit_reason": ((str,), None),
    "key_metric": ((dict,), None),  # {name, value}
    "best": ((dict,), None),  # {metric, step, value} of checkpoint.keep_best
}
_STATES = ("running", "finished", "failed", "stopped")
_MOST_DIFFERENCES = 8
_WAIT = "Wait for it or stop it, or give this one another name with --name."


@dataclass(frozen=True)
class StageSummary:
    """One row of `rlhf status`."""

    name: str
    stage: str | None  # the subcommand: sft, rm, ...
    kind: str | None  # what it published: policy, reward, value, data; None before
    state: str  # running, finished, failed, stopped, interrupted, damaged, unknown
    step: int
    total_steps: int | None
    key_metric: tuple[str, float | None] | None
    parents: list[str]
    stale: list[str]  # parents that changed since
    reason: str | None
    started: float | None
    ended: float | None
    best: dict[str, Any] | None = None  # {metric, step, value} of checkpoint.keep_best


class StageDir:
    """The folder of one stage: its paths, how it is opened, and how its result is published."""

    def __init__(self, root: Path, name: str) -> None:
        self.root, self.name = root, name
        self.path = root / name
        self.recipe = self.path / "recipe.yaml"
        self.resolved = self.path / "resolved.yaml"
        self.status = self.path / "status.json"
        self.provenance = self.path / PROVENANCE
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.skipped = self.path / "skipped.jsonl"
        self.log = self.path / "log.txt"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self.critic = self.path / "critic"
        self.pairs = self.path / "pairs.jsonl"
        self.best = self.path / "best.jsonl"
        self.lists = self.path / "lists.jsonl"
        self.answers = self.path / "answers.jsonl"
        self.stop = self.path / "STOP"  # asks the process that works here to stop
        self.manifest = self.path / commit.MANIFEST
        self.lock = root / f".{name}.lock"
        self.writer_lock = root / f".{name}.rank0.lock"

    def exists(self) -> bool:
        """Whether a stage was ever opened here."""
        return any(path.exists() for path in (self.provenance, self.status, self.manifest))

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint after `step` finished steps is."""
        return self.checkpoints / commit.step_name(step)

    # -- opening

    def open(self, inputs: dict[str, Any], *, restart: bool = False, launcher: int | None = None) -> Opened:
        """Lock the stage and decide what there is to do. Use the result as a context manager.

        inputs: everything the result depends on: {"stage": "ppo", "recipe": {...}, "parents": {...}, "data": {...}}.
        restart: set an existing folder aside as NAME.old-1 and begin again.
        launcher: for rank 0 under `rlhf.launch`: the pid of the command that holds the stage for this job. The rank
            takes a lock of its own, so that nobody begins while ranks of a killed command are still ending.
        """
        if self.name in _RESERVED or SET_ASIDE.fullmatch(self.name):
            what = f"expected a name that is not used for something else, found {self.name}"
            raise RecipeError(what, where=str(self.path), fix="Choose another --name.")
        self._refuse_links()
        lock = self._acquire(launcher)
        aside = None
        try:
            if restart and launcher is None and self.path.exists():
                aside = self._set_aside()
            was_asked = launcher is None and self._forget_request()
            is_new = not self.exists()
            mode, checkpoint = self._create(inputs) if is_new else self._reopen(inputs)
        except BaseException:
            lock.release()
            raise
        return Opened(self, mode, checkpoint, lock, is_new=is_new, aside=aside, was_asked=was_asked)

    def refuse_foreign(self) -> None:
        """Raise UnsafeError where the run directory or the stage belongs to another user."""
        for path in (self.root, self.path):
            refuse_foreign(path)

    def _refuse_links(self) -> None:
        """Nothing of a stage folder lies elsewhere: what is written or deleted there would be."""
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_symlink():
                what = "expected a plain file or folder, found a symbolic link"
                raise UnsafeError(what, where=str(path), fix="Put the file or folder itself there.")

    def refuse_if_held(self) -> None:
        """Raise BusyError where another process works on the stage now; `open` looks again."""
        if (owner := self.holder()) is not None:
            raise BusyError(f"held by {describe_holder(owner)}", where=str(self.path), fix=_WAIT)

    def _acquire(self, launcher: int | None) -> Lock:
        lock = Lock(self.lock if launcher is None else self.writer_lock)
        fix = _WAIT
        try:
            lock.acquire()
        except BusyError as error:
            raise BusyError(error.what, where=str(self.path), fix=fix) from None
        other = Lock(self.writer_lock if launcher is None else self.lock).holder()
        if launcher is None and other is not None:
            lock.release()
            what = f"held by {describe_holder(other)}, which is still ending"
            raise BusyError(what, where=str(self.path), fix=fix)
        if launcher is not None and (other is None or other["pid"] != launcher):
            lock.release()
            who = "nobody" if other is None else describe_holder(other)
            raise BusyError(f"expected to be held by process {launcher}, found {who}", where=str(self.path), fix=fix)
        return lock

    def _forget_request(self) -> bool:
        """Remove a STOP that was meant for an earlier start. Returns whether there was one."""
        was_asked = self.stop.is_file()
        if was_asked:
            with disk(self.stop):
                self.stop.unlink()
        return was_asked

    def _set_aside(self) -> Path:
        taken = [int(m[2]) for p in self.root.iterdir() if (m := SET_ASIDE.fullmatch(p.name)) and m[1] == self.name]
        aside = self.path.with_name(f"{self.name}.old-{max(taken, default=0) + 1}")
        with disk(self.path):
            self.path.rename(aside)
            commit.fsync_path(self.root)
        return aside

    def _create(self, inputs: dict[str, Any]) -> tuple[Mode, None]:
        with disk(self.path):
            make_private(self.path)
            commit.fsync_path(self.path.parent)
        if foreign := [p.name for p in self.path.iterdir() if not p.name.startswith(commit.TEMPORARY)]:
            what = f"expected a stage folder or nothing, found {', '.join(sorted(foreign)[:3])}, which no stage wrote"
            raise CheckpointError(what, where=str(self.path), fix="Choose another --name or another --run.")
        commit.remove_temporaries(self.path)
        commit.write_json(self.provenance, {"inputs": recordable(inputs)})
        self.write_status(state="running", stage=inputs["stage"], started=now())
        return "new", None

    def _reopen(self, inputs: dict[str, Any]) -> tuple[Mode, Path | None]:
        try:
            recorded = commit.read_json(self.provenance)["inputs"]
        except (CheckpointError, KeyError):
            fix = "Begin again with --restart; the old folder is kept under another name."
            raise CheckpointError(
                "expected the recorded inputs, found none", where=str(self.provenance), fix=fix
            ) from None
        if changed := differences(recorded, inputs):
            more = len(changed) - _MOST_DIFFERENCES
            lines = changed[:_MOST_DIFFERENCES] + ([f"and {more} more"] if more > 0 else [])
            what = "made from other inputs, and nothing is overwritten:\n    " + "\n    ".join(lines)
            fix = "Give this run a name of its own with --name, or begin again with --restart (the old folder is kept)."
            raise RecipeError(what, where=str(self.path), fix=fix)
        for folder in (self.path, self.checkpoints):
            commit.remove_temporaries(folder)
        if self.manifest.exists():
            self.read_manifest()
            if self.read_status()["state"] != "finished":  # cut off between the manifest and the status
                self.write_status(state="finished", ended=now(), exit_reason=None)
            return "finished", None
        checkpoint = commit.newest_checkpoint(self.checkpoints, hash_limit=0)
        self.write_status(state="running", ended=None, exit_reason=None)
        return ("resume" if checkpoint else "new"), checkpoint

    def cut_logs(self, step: int, *, redo: bool = False) -> None:
        """Cut metrics, samples and what was left out back to the first `step` finished steps; 0 empties them.

        redo: the last of these steps writes its rows again.
        """
        last = step - 1 if redo or not step else step
        for path in (self.metrics, self.samples):
            commit.cut_jsonl(path, last)
        commit.cut_jsonl(self.skipped, step if step else -1)  # written while a step learns, before it may be cut off

    # -- what a stage writes about itself

    def write_recipe(self, given: str, resolved: str) -> None:
        """Keep the recipe as it was given, and with every default written out."""
        commit.write_atomic(self.recipe, given)
        commit.write_atomic(self.resolved, resolved)

    def write_provenance(
        self, *, devices: Sequence[str], seed: int, parents: Sequence[Parent], data: Sequence[dict[str, Any]]
    ) -> None:
        """Record how the stage is being made; the recorded inputs stay, earlier invocations move to a list.

        data: one entry per dataset with path, fingerprint and row counts.
        """
        before = commit.read_json(self.provenance)
        now = invocation(devices)
        earlier = before["earlier"] if "earlier" in before else []
        if "argv" in before:
            earlier = [*earlier, {key: before[key] for key in now if key in before}]
        facts = {
            **now,
            "seed": seed,
            "parents": [parent.record(self.root) for parent in parents],
            "data": recordable(data),
            "inputs": before["inputs"],
            "earlier": earlier,
        }
        commit.write_json(self.provenance, facts)

    def write_status(self, **fields: Any) -> None:
        """Change fields of status.json: state, stage, step, total_steps, started, ended, exit_reason, key_metric.

        The heartbeat is set to now. A change of state is forced to the disk, a mere heartbeat is not.
        """
        assert fields.keys() <= _STATUS.keys(), fields
        assert "state" not in fields or fields["state"] in _STATES, fields
        status = {**self.read_status(), **fields, "heartbeat": now()}
        commit.write_json(self.status, status, durable="state" in fields)

    def read_status(self) -> dict[str, Any]:
        """All fields of status.json. A missing or damaged file or field reads as not known, state "unknown"."""
        try:
            found = commit.read_json(self.status)
        except CheckpointError:
            found = {}
        status = {
            key: found[key] if isinstance(found.get(key), types) else empty for key, (types, empty) in _STATUS.items()
        }
        if status["state"] not in _STATES:
            status["state"] = "unknown"
        if status["key_metric"] is not None and not {"name", "value"} <= status["key_metric"].keys():
            status["key_metric"] = None
        if status["best"] is not None and not {"metric", "step", "value"} <= status["best"].keys():
            status["best"] = None
        return status

    def log_handler(self) -> logging.FileHandler:
        """A handler that appends to log.txt, tracebacks included."""
        with disk(self.log):
            handler = LogFile(self.log, mode="a", encoding="utf-8", errors="backslashreplace")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        return handler

    # -- publishing

    def export_dir(self, part: str) -> Path:
        """An empty folder to export one of PARTS into; `publish` gives it its name."""
        assert part in PARTS, part
        return commit.fresh_temporary(self.path / part)

    def publish(
        self, kind: str, facts: dict[str, Any], log_end: int, *, plain_files: Sequence[Path] = ()
    ) -> dict[str, Any]:
        """Make the exported folders the stage's result, write the manifest last, and return it.

        kind: policy, reward, value or data. facts: of a model: base, template and tokenizer hashes, EOS and pad ids,
        head; of data: counts. log_end: the last step in metrics.jsonl. plain_files: files of the stage folder itself
        that belong to the result. Everything is hashed and forced to the disk before the manifest exists.
        """
        assert not self.manifest.exists(), self.manifest
        exported = {part: self.path / f"{commit.TEMPORARY}{part}" for part in PARTS}
        exported = {part: folder for part, folder in exported.items() if folder.exists()}
        assert exported or plain_files, "nothing was exported"
        files = {
            f"{part}/{name}": entry for part, folder in exported.items() for name, entry in commit.seal(folder).items()
        }
        with disk(self.path):
            files |= {path.name: commit.seal_file(path) for path in plain_files}
            for part in PARTS:
                if (self.path / part).exists():  # renamed by a publication that was interrupted before its manifest
                    commit.remove_dir(self.path / part)
            for part, folder in exported.items():
                folder.rename(self.path / part)
            commit.fsync_path(self.path)
        manifest = commit.sealed(
            {
                "stage": self.read_status()["stage"],
                "name": self.name,
                "kind": kind,
                "facts": facts,
                "log_end": log_end,
                "published": now(),
                "files": files,
            }
        )
        commit.write_json(self.manifest, manifest)
        self.write_status(state="finished", ended=now(), exit_reason=None)
        return manifest

    def is_finished(self) -> bool:
        """Whether the stage has published its result."""
        return self.manifest.exists()

    def read_manifest(self, *, hash_limit: int | None = commit.SMALL_FILE) -> dict[str, Any]:
        """The manifest of a finished stage whose published files are as they were written, else CheckpointError.

        Sizes of all files and hashes of those up to `hash_limit` bytes are compared; None reads every byte.
        """
        fix = "Restore the file, or make the stage again with --restart."
        try:
            manifest = commit.verify(self.path, hash_limit=hash_limit, parts=PARTS)
        except CheckpointError as error:
            raise CheckpointError(error.what, where=error.where, fix=fix) from error
        if not isinstance(manifest.get("kind"), str):
            raise CheckpointError("expected the kind of the stage, found none", where=str(self.manifest), fix=fix)
        return manifest

    # -- looking at it

    def holder(self) -> dict[str, Any] | None:
        """The process that works on the stage now ({pid, host, since}), or None."""
        return Lock(self.lock).holder() or Lock(self.writer_lock).holder()

    def describe(self) -> StageSummary:
        """How the stage stands; whatever is damaged shows as such."""
        status, kind, reason = self.read_status(), None, None
        state = status["state"]
        if self.manifest.exists():
            try:
                kind, state = commit.verify(self.path, hash_limit=0, parts=PARTS)["kind"], "finished"
            except (UserError, KeyError) as error:
                state, reason = "damaged", str(error).splitlines()[0]
        elif state == "finished":
            state, reason = "damaged", f"{commit.MANIFEST} is missing"
        elif state == "running" and self.holder() is None:
            state, reason = "interrupted", "ended without a word; the same command resumes"
        metric = status["key_metric"]
        return StageSummary(
            name=self.name,
            stage=status["stage"],
            kind=kind,
            state=state,
            step=status["step"],
            total_steps=status["total_steps"],
            key_metric=(metric["name"], metric["value"]) if metric else None,
            parents=[parent["stage"] for parent in recorded_parents(self.path)],
            stale=stale_parents(self.path),
            reason=reason or status["exit_reason"],
            started=status["started"],
            ended=status["ended"],
            best=status["best"],
        )
