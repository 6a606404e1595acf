"""The file system of a run directory: does it keep the promises that checkpoints rest on?"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rlhf.doctor.finding import Finding, mebibytes
from rlhf.errors import UserError
from rlhf.run.commit import (
    MANIFEST,
    TEMPORARY,
    append_jsonl,
    commit_dir,
    fresh_temporary,
    read_jsonl,
    verify,
    write_atomic,
)
from rlhf.run.lock import Lock

_FREE_ENOUGH = 2**30
_SLOW_S = 1.0
_PROBE = 4 * 2**20
_HOLD = "import sys; from rlhf.run.lock import Lock; from pathlib import Path; Lock(Path(sys.argv[1])).acquire()"


def check_disk(run: Path) -> Iterator[Finding]:
    """Room, whole files and folders, logs, and locks, tried in a folder of its own that is removed again."""
    place = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not place.is_dir():
        yield Finding.of("run directory", f"{place} is a file", failed="Name a folder with --run.")
        return
    told = str(run) if place == run else f"{run}, to be made in {place}"
    if not os.access(place, os.W_OK | os.X_OK):
        yield Finding.of("run directory", f"{told}: not writable", failed="Name a folder that this user can write to.")
        return
    yield check_room(place, told)
    probe = place / f"{TEMPORARY}doctor-{secrets.token_hex(4)}"
    try:
        probe.mkdir()
        yield check_commit(probe)
        yield check_lock(probe)
    except (UserError, OSError) as error:
        fix = "Choose a --run folder on another file system."
        yield Finding.of("commit", " ".join(str(error).split()), failed=fix)
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def check_room(place: Path, told: str) -> Finding:
    """Free bytes and free names."""
    free = shutil.disk_usage(place).free
    names = os.statvfs(place)
    fix = "Free some space: a checkpoint of AdamW takes 12 bytes per parameter, and two are kept while one is written."
    if names.f_files and names.f_favail < 1000:
        return Finding.of("run directory", f"{told}: only {names.f_favail} more files can be made", failed=fix)
    found = f"{told}: {mebibytes(free)} free"
    return Finding.of("run directory", found, warning=fix if free < _FREE_ENOUGH else None)


def check_commit(probe: Path) -> Finding:
    """A file, a log and a folder with its manifest are written as a checkpoint is, and read again."""
    started = time.monotonic()
    content = secrets.token_bytes(_PROBE)
    write_atomic(probe / "file", b"before")
    write_atomic(probe / "file", content)
    rows = [{"step": step} for step in (1, 2)]
    for row in rows:
        append_jsonl(probe / "log.jsonl", row)
    temporary = fresh_temporary(probe / "step-000001")
    write_atomic(temporary / "weights", content)
    commit_dir(temporary, probe / "step-000001", {"step": 1})
    verify(probe / "step-000001", hash_limit=None)
    names = sorted(path.name for path in probe.iterdir())
    expected = ["file", "log.jsonl", "step-000001"]
    whole = (probe / "file").read_bytes() == content and (probe / "step-000001" / MANIFEST).is_file()
    if not whole or names != expected or read_jsonl(probe / "log.jsonl") != rows:
        fix = "Choose a --run folder on a file system that keeps what is written."
        return Finding.of("commit", f"expected {', '.join(expected)} as written, found {', '.join(names)}", failed=fix)
    seconds = time.monotonic() - started
    fix = "Every checkpoint waits for it: choose a faster disk, or a larger checkpoint.every."
    found = f"write, fsync, rename and read again in {1000 * seconds:.0f} ms"
    return Finding.of("commit", found, warning=fix if seconds > _SLOW_S else None)


def check_lock(probe: Path) -> Finding:
    """A lock of this process keeps another process out, and is free once it is given back."""
    lock = Lock(probe / "lock")
    lock.acquire()
    try:
        kept_out = hold(lock.path) != 0
    finally:
        lock.release()
    if kept_out and hold(lock.path) == 0:
        return Finding.of("locks", "flock keeps a second process out")
    what = "cannot be taken again" if kept_out else "do not keep a second process out"
    fix = (
        "Two commands could write one stage: choose a --run folder on a file system with flock (nfs: local_lock=none)."
    )
    return Finding.of("locks", f"locks {what}", failed=fix)


def hold(path: Path) -> int:
    """The exit code of another process that takes the lock."""
    return subprocess.run([sys.executable, "-c", _HOLD, str(path)], capture_output=True).returncode
