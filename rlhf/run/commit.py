"""How anything lands on disk: whole or not at all.

A file: written under a temporary name in the same folder, fsynced, renamed, folder fsynced.
A folder: filled under a temporary name, every file hashed and fsynced, MANIFEST.json written last, renamed, parent
fsynced. So a manifest's existence means that all it lists was complete, and no reader ever sees half of anything.
Logs are append-only; a resumed run cuts them back to its checkpoint.

No file points at the newest checkpoint: it is the one with the highest step whose manifest verifies. So
nothing can point at anything else than what is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError, UnsafeError
from rlhf.run.content import READERS, check_hashes, hash_file, list_files
from rlhf.run.disk import PRIVATE_FILE, PRIVATE_FOLDER, disk, tree_bytes

MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"
SMALL_FILE = 32 * 2**20  # bytes; up to here a quick check hashes, beyond it only compares sizes
_SEAL = "seal"
_DAMAGED = "damaged-"
_STEP = re.compile(r"step-(\d{6,})")


# ---- files -----------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Replace a file as a whole: readers see the old content or the new one, also after a crash.

    durable=False leaves out the fsyncs: safe against a killed process, not against power loss. For heartbeats.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(TEMPORARY + secrets.token_hex(4))
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with disk(path, len(content)):
        try:
            handle = os.open(temporary, flags, PRIVATE_FILE)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(handle)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if durable:
            fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to the disk, where the file system has a way to."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no fsync of folders
            raise
    finally:
        os.close(handle)


def plain(value: Any) -> Any:
    """A value as strict JSON can hold it: tuples become lists, paths text, NaN and infinities None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def write_json(path: Path, value: Any, *, durable: bool = True) -> None:
    """Write a value as indented strict JSON, atomically."""
    write_atomic(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n", durable=durable)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; anything else is a CheckpointError that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError("expected a file, found nothing", where=str(path)) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"expected JSON, found a damaged file ({error})", where=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"expected a JSON object, found {type(value).__name__}", where=str(path))
    return value


# ---- logs ------------------------------------------------------------------------------------------------------------


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a log, in a single write; a full disk leaves the log as it was."""
    line = json.dumps(plain(record), allow_nan=False).encode() + b"\n"
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with disk(path, len(line)):
        handle = os.open(path, flags, PRIVATE_FILE)
        try:
            end = os.fstat(handle).st_size
            if os.write(handle, line) != len(line):
                os.ftruncate(handle, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, [] where there is none yet. A last line cut short by a crash is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is an unfinished write
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            fix = "Delete that line, or begin again with --restart."
            raise CheckpointError("expected a JSON object, found a damaged line", where=f"{path}:{number}", fix=fix)
        rows.append(row)
    return rows


def cut_jsonl(path: Path, step: int) -> None:
    """Keep the rows of the first `step` finished steps (record["step"] <= step): a resumed run has each row once."""
    rows = read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row.get("step"), int):
            raise CheckpointError("expected a row with its step, found none", where=f"{path}:{number}")
    kept = [row for row in rows if row["step"] <= step]
    if path.exists():
        write_atomic(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


# ---- folders ---------------------------------------------------------------------------------------------------------


def seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Force every file of a folder to the disk. Returns name -> {size, sha256}. Several files are read at a time."""
    with disk(folder, tree_bytes(folder)), ThreadPoolExecutor(max_workers=READERS) as pool:
        names = list_files(folder)
        table = dict(zip(names, pool.map(lambda name: seal_file(folder / name), names), strict=True))
        for parent in {(folder / name).parent for name in names} | {folder}:
            fsync_path(parent)
    return table


def seal_file(path: Path) -> dict[str, Any]:
    """Force a file to the disk. Returns its {size, sha256}."""
    fsync_path(path)
    return {"size": path.stat().st_size, "sha256": hash_file(path)}


def fresh_temporary(final: Path) -> Path:
    """An empty folder `.tmp-<name>` beside the place where `commit_dir` will put it; old leftovers are removed."""
    temporary = final.with_name(TEMPORARY + final.name)
    with disk(temporary):
        final.parent.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)  # not its parents: a stage that was removed stays away
        _remove(temporary)
        temporary.mkdir(mode=PRIVATE_FOLDER)  # follows no link, and fails where anything is
    return temporary


def _remove(path: Path) -> None:
    """Delete a folder, a file or a link; of a link, what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def commit_dir(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """Make a filled temporary folder visible under its final name, with a manifest of `facts` and every file's hash.

    A complete folder of that name stays: the same step of the same run was saved before. A damaged one is replaced.
    """
    files = seal(temporary)
    write_json(temporary / MANIFEST, sealed({**facts, "files": files}))
    with disk(final, tree_bytes(temporary)):
        if final.exists():
            try:
                verify(final, hash_limit=None)
                return remove_dir(temporary)
            except CheckpointError:
                remove_dir(final)
        os.rename(temporary, final)
        fsync_path(final.parent)


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of all that it says: a bit that flips in it is found like one in a file."""
    found = plain(manifest)
    return {**found, _SEAL: _digest(found)}


def _digest(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != _SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def verify(folder: Path, *, hash_limit: int | None = SMALL_FILE, parts: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """The manifest of a folder whose files are as they were written, else a CheckpointError that names the file.

    Sizes are always compared, hashes of files up to `hash_limit` bytes (None: of all). `parts` are the sub-folders that
    may hold listed files only ("" is the whole folder; names that start with a dot are overlooked).
    """
    try:
        return _verified(folder, hash_limit, parts)
    except OSError as error:
        where = str(error.filename or folder)
        raise CheckpointError(f"cannot be read: {error.strerror}", where=where) from error


def _verified(folder: Path, hash_limit: int | None, parts: tuple[str, ...]) -> dict[str, Any]:
    manifest = read_json(folder / MANIFEST)
    files = manifest_files(folder, manifest)
    if _SEAL in manifest and manifest[_SEAL] != _digest(manifest):
        raise CheckpointError("expected what was written, found a changed manifest", where=str(folder / MANIFEST))
    for name, entry in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError("expected a file, found none", where=str(path))
        if (size := path.stat().st_size) != entry["size"]:
            raise CheckpointError(f"expected {entry['size']} bytes, found {size}", where=str(path))
    for part in parts:
        if (folder / part).is_symlink():
            what = "expected a folder, found a symbolic link"
            raise UnsafeError(what, where=str(folder / part), fix="Put the folder itself there.")
        for name in list_files(folder / part):
            path = folder / part / name
            if path.relative_to(folder).as_posix() not in {*files, MANIFEST} and not path.name.startswith("."):
                raise CheckpointError("expected only files of the manifest, found another", where=str(path))
    check_hashes(folder, {n: e for n, e in files.items() if hash_limit is None or e["size"] <= hash_limit})
    return manifest


def manifest_files(folder: Path, manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The file table of a manifest, its form checked: a damaged or hostile one must not lead anywhere else."""
    where, files = str(folder / MANIFEST), manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError("expected a table of files, found none", where=where)
    for name, entry in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UnsafeError(f"expected file names inside the folder, found {name!r}", where=where)
        if not (isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("sha256"), str)):
            raise CheckpointError(f"expected size and sha256 of {name}, found a damaged entry", where=where)
    return files


def remove_dir(folder: Path) -> None:
    """Delete a folder so that no half of it is ever visible under its own name."""
    temporary = folder.with_name(f"{TEMPORARY}{secrets.token_hex(4)}-removed")
    with disk(folder):
        os.rename(folder, temporary)
        fsync_path(folder.parent)  # first the name: else a power cut may bring it back without its files
        shutil.rmtree(temporary)


def remove_temporaries(folder: Path) -> None:
    """Delete what interrupted writers left in a folder. Only for the holder of the folder's lock."""
    for path in folder.glob(TEMPORARY + "*"):
        with disk(path):
            _remove(path)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def step_name(step: int) -> str:
    """The folder name of a checkpoint after `step` finished steps."""
    return f"step-{step:06d}"


def step_number(checkpoint: Path) -> int:
    """The number of finished steps that a checkpoint's folder name states."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def checkpoint_dirs(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest step first, complete or not."""
    try:
        return _listed(folder)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(folder)) from error


def _listed(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)  # a glob takes a folder that cannot be read for an empty one
    except FileNotFoundError:
        return []
    return sorted((folder / name for name in names if _STEP.fullmatch(name)), key=step_number)


def newest_checkpoint(folder: Path, *, hash_limit: int | None = SMALL_FILE) -> Path | None:
    """The newest checkpoint that verifies; None where there never was one.

    Checkpoints that exist but are all damaged are an error: starting again at step 0 would bury what they held.
    """
    problems = []
    for path in reversed(checkpoint_dirs(folder)):
        try:
            verify(path, hash_limit=hash_limit)
            return path
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        what = f"expected a complete checkpoint, found {len(problems)} damaged: {problems[0]}"
        raise CheckpointError(what, where=str(folder), fix="Restore one of them, or begin again with --restart.")
    return None


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it counts as none from now on. Returns where it is."""
    damaged = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}-{secrets.token_hex(2)}")
    with disk(checkpoint):
        os.rename(checkpoint, damaged)
        fsync_path(checkpoint.parent)
    return damaged


def rotate(folder: Path, keep: int, also: Collection[Path] = ()) -> None:
    """Delete checkpoints older than the newest `keep` complete ones, except `also`: those that something else needs.

    Call it after a commit, never before. The newest complete one stays whatever `keep` is.
    """
    with disk(folder):
        found = _listed(folder)
    complete = []
    for path in reversed(found):
        try:
            verify(path, hash_limit=0)
            complete.append(path)
        except CheckpointError:
            continue
    if complete:
        oldest_kept = step_number(complete[: max(keep, 1)][-1])
        spared = {path.name for path in also if path.resolve().parent == folder.resolve()}
        for path in found:
            if step_number(path) < oldest_kept and path.name not in spared:
                remove_dir(path)


def make_room(folder: Path, also: Collection[Path] = ()) -> list[str]:
    """Delete all in a folder of checkpoints that a resumed run can do without; returns the names of what went.

    What interrupted writers left, damaged checkpoints, and all but the newest complete one and `also`.
    """
    if not folder.is_dir():
        return []
    with disk(folder):
        before = set(os.listdir(folder))
        for name in before:
            if name.startswith(_DAMAGED):
                _remove(folder / name)
        remove_temporaries(folder)
        rotate(folder, 1, also)
        return sorted(before - set(os.listdir(folder)))
