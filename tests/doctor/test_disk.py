"""The probe of a disk finds what a checkpoint would fail on, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.doctor.disk import check_disk, check_lock, hold
from rlhf.run.lock import Lock

ROOT = Path(__file__).parents[2]


def test_a_good_disk_and_a_folder_that_is_not_there_yet(tmp_path):
    run = tmp_path / "runs" / "new"
    found = {finding.check: finding for finding in check_disk(run)}
    assert list(found) == ["run directory", "commit", "locks"] and {f.state for f in found.values()} <= {
        "ok",
        "warning",
    }
    assert f"{run}, to be made in {tmp_path}" in found["run directory"].found
    assert not any(tmp_path.iterdir())


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").touch()
    (found,) = check_disk(tmp_path / "file" / "run")
    assert found.state == "failed" and "is a file" in found.found


def test_a_lock_keeps_another_process_out(tmp_path):
    assert check_lock(tmp_path).state == "ok"
    lock = Lock(tmp_path / "held")
    lock.acquire()
    assert hold(lock.path) != 0
    lock.release()
    assert hold(lock.path) == 0


PROBE = """
import errno, fcntl, os, sys
from pathlib import Path
from rlhf.doctor.disk import check_disk
real = {"flock": fcntl.flock, "fsync": os.fsync, "replace": os.replace}
def fail(*arguments):
    raise OSError(errno.ENOLCK if sys.argv[1] == "flock" else errno.EIO, "broken", "disk")
if sys.argv[1] == "flock":
    fcntl.flock = fail
else:
    setattr(os, sys.argv[1], fail)
print(*[finding.state for finding in check_disk(Path(sys.argv[2]))])
"""


@pytest.mark.parametrize("call", ["fsync", "replace", "flock"])
def test_a_disk_that_cannot_do_what_a_commit_needs_fails(tmp_path, call):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", PROBE, call, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    states = done.stdout.split()
    assert states[0] != "failed" and states[-1] == "failed", done.stdout
    assert not any(tmp_path.iterdir())
