"""How anything lands on disk: whole or not at all.

A file: written under a temporary name in the same folder, fsynced, renamed, folder fsynced.
A folder: filled under a temporary name, every file hashed and fsynced, MANIFEST.json written last, renamed, parent
fsynced. So a manifest's existence means that all it lists was complete, and no reader ever sees half of anything.
Logs are append-only; a resumed run cuts them back to its checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.errors import BusyError, CheckpointError, ResourceError, UnsafeError

MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"
SMALL_FILE = 32 * 2**20  # bytes; up to here a quick check hashes, beyond it only compares sizes
_CHUNK = 4 * 2**20
_STEP = re.compile(r"step-(\d{6,})")
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_ACCESS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOLCK, errno.ENAMETOOLONG, errno.ENOTDIR}


# ---- files -----------------------------------------------------------------------------------------------------------


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what a disk may answer (full, read-only, a planted link) into an error that names the path and a remedy."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ELOOP:
            fix = "Remove the link; nothing is written through links."
            raise UnsafeError("expected a plain file, found a symbolic link", where=str(path), fix=fix) from error
        if error.errno in _NO_ROOM:
            fix = f"Free some space on this disk ({_free(path)} left); the same command resumes."
            raise ResourceError(f"cannot be written: {error.strerror}", where=str(path), fix=fix) from error
        if error.errno in _NO_ACCESS:
            fix = "Choose a --run folder that this user can write to."
            raise ResourceError(f"cannot be written: {error.strerror}", where=str(path), fix=fix) from error
        raise


def _free(path: Path) -> str:
    folder = next(p for p in (path, *path.parents) if p.is_dir())
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"


def write_atomic(path: Path, data: bytes | str, *, durable: bool = True) -> None:
    """Replace a file as a whole: readers see the old content or the new one, also after a crash.

    durable=False leaves out the fsyncs: safe against a killed process, not against power loss. For heartbeats.
    """
    content = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(TEMPORARY + secrets.token_hex(4))
    with disk(path):
        try:
            handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
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
    with disk(path):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            end = os.fstat(handle).st_size
            if os.write(handle, line) != len(line):
                os.ftruncate(handle, end)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(handle)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, [] where there is none yet. A last line cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
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


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(folder: Path) -> list[str]:
    """Relative names of all files below a folder, sorted. Links and special files are refused: they lead elsewhere."""
    names = []
    for parent, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(parent, name)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                what = "expected plain files and folders, found a link or special file"
                raise UnsafeError(what, where=str(path), fix="Put the file itself there.")
            if path.is_file():
                names.append(path.relative_to(folder).as_posix())
    return sorted(names)


def seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Force every file of a folder to the disk. Returns name -> {size, sha256}. Several files are read at a time."""
    names = list_files(folder)
    with disk(folder), ThreadPoolExecutor(max_workers=4) as pool:
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
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    return temporary


def commit_dir(temporary: Path, final: Path, facts: dict[str, Any]) -> None:
    """Make a filled temporary folder visible under its final name, with a manifest of `facts` and every file's hash.

    A complete folder of that name stays: the same step of the same run was saved before. A damaged one is replaced.
    """
    files = seal(temporary)
    write_json(temporary / MANIFEST, {**facts, "files": files})
    with disk(final):
        if final.exists():
            try:
                verify(final, hash_limit=None)
                return remove_dir(temporary)
            except CheckpointError:
                remove_dir(final)
        os.rename(temporary, final)
        fsync_path(final.parent)


def verify(folder: Path, *, hash_limit: int | None = SMALL_FILE, parts: tuple[str, ...] = ("",)) -> dict[str, Any]:
    """The manifest of a folder whose files are as they were written, else a CheckpointError that names the file.

    Sizes are always compared, hashes of files up to `hash_limit` bytes (None: of all). `parts` are the sub-folders that
    may hold listed files only ("" is the whole folder; names that start with a dot are overlooked).
    """
    manifest = read_json(folder / MANIFEST)
    for name, entry in manifest_files(folder, manifest).items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError("expected a file, found none", where=str(path))
        size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(f"expected {entry['size']} bytes, found {size}", where=str(path))
        if (hash_limit is None or size <= hash_limit) and hash_file(path) != entry["sha256"]:
            raise CheckpointError("expected the content that was written, found a changed file", where=str(path))
    listed = manifest["files"].keys() | {MANIFEST}
    for part in parts:
        if (folder / part).is_symlink():
            what = "expected a folder, found a symbolic link"
            raise UnsafeError(what, where=str(folder / part), fix="Put the folder itself there.")
        for name in list_files(folder / part):
            if Path(part, name).as_posix() not in listed and not Path(name).name.startswith("."):
                raise CheckpointError(
                    "expected only files of the manifest, found another", where=f"{folder / part / name}"
                )
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
        shutil.rmtree(temporary)


def remove_temporaries(folder: Path) -> None:
    """Delete what interrupted writers left in a folder. Only for the holder of the folder's lock."""
    for path in folder.glob(TEMPORARY + "*"):
        with disk(path):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(found, key=step_number)


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


def rotate(folder: Path, keep: int) -> None:
    """Delete checkpoints older than the newest `keep` complete ones. Call it after a commit, never before."""
    complete = []
    for path in reversed(checkpoint_dirs(folder)):
        try:
            verify(path, hash_limit=0)
            complete.append(path)
        except CheckpointError:
            continue
    if complete:
        oldest_kept = step_number(complete[: max(keep, 1)][-1])
        for path in checkpoint_dirs(folder):
            if step_number(path) < oldest_kept:
                remove_dir(path)


# ---- lock ------------------------------------------------------------------------------------------------------------


class Lock:
    """An advisory lock on a file, held by one process and gone with it. The file tells others who holds it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def acquire(self) -> None:
        """Take the lock at once, or raise BusyError naming the holder's pid, host and start."""
        with disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            handle = os.open(self.path, flags, 0o666)
            for pause in (0.02, 0.05, 0.0):  # `holder` of another process may have it for an instant
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(pause)
            else:
                os.close(handle)
                raise BusyError(f"held by {describe_holder(self._read())}", where=str(self.path))
            owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(owner).encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Give the lock back; harmless where it is not held."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def holder(self) -> dict[str, Any] | None:
        """Who holds the lock now ({pid, host, since}), or None."""
        try:
            handle = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            return self._read()
        finally:
            os.close(handle)

    def _read(self) -> dict[str, Any]:
        try:
            owner = read_json(self.path)
        except CheckpointError:  # between the lock and the note
            owner = {}
        return {key: owner.get(key) for key in ("pid", "host", "since")}


def describe_holder(owner: dict[str, Any]) -> str:
    """One phrase: which process, where, since when."""
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
