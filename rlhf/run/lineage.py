"""What a stage was made from: parents and their hashes, recorded inputs, code, versions, devices."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError
from rlhf.run.commit import MANIFEST, manifest_files, plain, read_json
from rlhf.run.content import hash_file, list_files

PROVENANCE = "provenance.json"
_PACKAGES = (
    "rlhf",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "deepspeed",
    "datasets",
    "safetensors",
    "numpy",
    "pydantic",
)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_ABSENT = object()


def hash_tree(folder: Path) -> str:
    """SHA-256 over the names and contents of all files below a folder: the identity of a model that no stage made."""
    digest = hashlib.sha256()
    for name in list_files(folder):
        digest.update(f"{name}\0{hash_file(folder / name)}\n".encode())
    return digest.hexdigest()


def content_hash(manifest: dict[str, Any]) -> str:
    """The identity of a published stage: SHA-256 over its kind and its manifest's file hashes. No file is read."""
    digest = hashlib.sha256(f"{manifest['kind']}\n".encode())
    for name, entry in sorted(manifest["files"].items()):
        digest.update(f"{name}\0{entry['sha256']}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Parent:
    """A finished stage that another one starts from."""

    path: Path  # the stage folder
    manifest: dict[str, Any]
    content_hash: str

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.path.name

    @property
    def kind(self) -> str:
        """What the stage published: policy, reward, value, data."""
        return str(self.manifest["kind"])

    @property
    def model(self) -> Path:
        """The published model folder."""
        return self.path / "model"

    def labelled(self, output: str) -> Path:
        """One of the published files of a label stage: pairs, best or lists."""
        return self.path / f"{output}.jsonl"

    @property
    def critic(self) -> Path:
        """The published critic folder, where there is one."""
        return self.path / "critic"

    def record(self, root: Path) -> dict[str, str]:
        """What provenance.json keeps of it. A stage of the same run directory stays right when the run is moved."""
        path, root = self.path.resolve(), root.resolve()
        where = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        return {"stage": self.name, "path": where, "kind": self.kind, "content_hash": self.content_hash}


def recorded_parents(stage: Path) -> list[dict[str, str]]:
    """The parents that a stage folder's provenance names; [] where it has none or none is recorded yet."""
    try:
        parents = read_json(stage / PROVENANCE).get("parents")
    except CheckpointError:
        return []
    if not isinstance(parents, list):
        return []
    return [p for p in parents if isinstance(p, dict) and {"stage", "path", "content_hash"} <= p.keys()]


def graph(stages: Sequence[Path]) -> dict[str, list[str]]:
    """Stage name -> names of its parents, in the given order. Parents in other runs are named by their path."""
    return {
        stage.name: [p["stage"] if p["path"] == p["stage"] else p["path"] for p in recorded_parents(stage)]
        for stage in stages
    }


def stale_parents(stage: Path) -> list[str]:
    """The parents that are no longer what the stage was made from: published again since, or gone."""
    stale = []
    for parent in recorded_parents(stage):
        folder = stage.parent / parent["path"]  # an absolute path stays itself
        try:
            manifest = read_json(folder / MANIFEST)
            manifest_files(folder, manifest)
            same = content_hash(manifest) == parent["content_hash"]
        except (CheckpointError, KeyError):
            same = False
        if not same:
            stale.append(parent["stage"])
    return stale


# ---- recorded inputs -------------------------------------------------------------------------------------------------


def without_credentials(value: Any) -> Any:
    """The same plain value; user names and passwords inside addresses are masked: they are never written down."""
    if isinstance(value, dict):
        return {key: without_credentials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_credentials(item) for item in value]
    return _CREDENTIALS.sub("***@", value) if isinstance(value, str) else value


def recordable(value: Any) -> Any:
    """A value in the form in which it is recorded, and compared with what was recorded before."""
    return without_credentials(plain(value))


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line per leaf that differs: `train.lr: 1e-06 before, 1e-05 now`. Keys of the recipe come without a prefix."""
    before, after = dict(_leaves(recorded)), dict(_leaves(recordable(now)))
    lines = []
    for key in [*before, *(key for key in after if key not in before)]:
        old = before[key] if key in before else _ABSENT
        new = after[key] if key in after else _ABSENT
        if old != new or isinstance(old, bool) != isinstance(new, bool):
            lines.append(f"{key.removeprefix('recipe.')}: {_shown(old)} before, {_shown(new)} now")
    return lines


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{key}[{index}]")
    else:
        yield key, value


def _shown(value: Any) -> str:
    text = "not set" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- this process ----------------------------------------------------------------------------------------------------


def invocation(devices: Sequence[str]) -> dict[str, Any]:
    """How and with what the stage is being made. Never the environment: it may hold tokens."""
    return {
        "argv": recordable(sys.argv),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git": git_revision(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "devices": list(devices),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path) -> dict[str, Any] | None:
    """{revision, changed: tracked files differ from it} of the repository around a folder; None without git or one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        revision = git("rev-parse", "HEAD")
        return {"revision": revision, "changed": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None
