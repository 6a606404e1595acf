"""A stage on two ranks as its user meets it: one message, the right exit code, stop and resume, nothing left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.distributed


def members(session_of: str) -> dict[int, dict[str, str]]:
    """pid -> environment of every process whose command line has these words."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            if entry.name.isdecimal() and session_of in (entry / "cmdline").read_bytes().decode():
                words = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
                found[int(entry.name)] = dict(word.split("=", 1) for word in words if "=" in word)
    return found


def ranks(session_of: str) -> dict[str, int]:
    """RANK -> pid of the processes whose command line has these words."""
    return {env["RANK"]: pid for pid, env in members(session_of).items() if "RANK" in env}


@contextmanager
def started(tiny, stage: str, name: str, *options: str) -> Iterator[subprocess.Popen]:
    """A stage on two ranks that the test acts on; whatever happens, nothing is left of it."""
    words = map(str, tiny.command(stage, "--name", name, "--gpus", "2", *options))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *words], env=env, cwd=ROOT, **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        for pid in members(str(tiny.root / name)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def until(process: subprocess.Popen, condition: Callable[[], bool]) -> None:
    """Wait while the process runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)


def test_an_error_of_all_ranks_is_told_once(tiny):
    before = tiny.files()
    done = tiny.launched("sft", "--name", "new", "--set", "data.max_length=8")
    assert done.code == 3 and done.out == "", done.err
    assert done.err.count("found none among 60: 60 longer than max_length") == 1
    assert done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert "deepspeed.launcher.runner" in done.err  # the command is shown
    assert tiny.files() == before
    assert not members(str(tiny.root))


def test_a_killed_rank_is_named_and_nothing_is_left(tiny):
    with started(tiny, "sft", "killed", "--set", "train.steps=100000") as process:
        until(process, (tiny.root / "killed" / "metrics.jsonl").exists)
        until(process, lambda: "1" in ranks("--name\0killed"))
        os.kill(ranks("--name\0killed")["1"], signal.SIGKILL)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 10 and out == ""
        assert "rank 1 was killed (SIGKILL, often for want of memory)" in err and "log.txt" in err
        assert err.count("error: ") == 1 and "Traceback" not in err, err
        assert not members("--name\0killed")
        assert json.loads((tiny.root / "killed" / "status.json").read_text())["state"] == "failed"


def test_a_stopped_job_resumes_where_it_was(cli, cold_cli, tiny):
    options = ["--set", "train.steps=300", "--set", "train.schedule=constant"]
    done = cli(*tiny.command("sft", "--name", "straight", *options))
    assert done.code == 0, done.err
    with started(tiny, "sft", "stopped", *options) as process:
        until(process, (tiny.root / "stopped" / "metrics.jsonl").exists)
        busy = cold_cli(*tiny.command("sft", "--name", "stopped", *options))
        assert busy.code == 6 and f"held by process {process.pid}" in busy.err
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75 and out == "", err
        assert err.count("The same command resumes.") == 1 and "Traceback" not in err
        assert not members("--name\0stopped")
    status = json.loads((tiny.root / "stopped" / "status.json").read_text())
    assert status["state"] == "stopped" and 0 < status["step"] < 300
    assert [path.name for path in (tiny.root / "stopped" / "checkpoints").iterdir()] == [f"step-{status['step']:06d}"]
    for one in (cold_cli, cli):
        refused = one(*tiny.command("sft", "--name", "stopped", *options))
        assert refused.code == 4 and "expected devices 2, found 1" in refused.err
        assert f"step-{status['step']:06d}" in refused.err and "the same number of devices" in refused.err
        assert one is cli or not refused.torch, "told before anything is loaded"
    done = tiny.launched("sft", "--name", "stopped", *options)
    assert done.code == 0, done.err
    assert done.out.startswith("sft finished")
    one, two = tiny.rows("straight"), tiny.rows("stopped")
    assert [row["step"] for row in two] == list(range(1, 301))
    for expected, found in zip(one, two, strict=True):
        assert found["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-4), expected["step"]


def test_a_request_while_starting_stops_at_once_and_leaves_nothing(tiny):
    before = tiny.files()
    with started(tiny, "sft", "early") as process:
        until(process, lambda: any("RANK" in env for env in members("--name\0early").values()))
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 75 and out == "" and "Traceback" not in err, err
        assert time.monotonic() - began < 15
        assert not members("--name\0early")
    assert tiny.files() == before
