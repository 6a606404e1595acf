"""scripts/slurm.sh on a machine without SLURM: a stand-in for `scontrol`, the real `rlhf`."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def submit(tmp_path):
    """`submit(nodes, gpus, *arguments)` starts the script in an allocation of nodes with so many GPUs each."""
    tools = tmp_path / "bin"
    tools.mkdir()
    executable(tools / "scontrol", 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "scontrol $*"; fi')
    executable(tools / "rlhf", f'exec {sys.executable} -m rlhf "$@"')
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "sft.yaml").write_text("model: {init: {layers: 1}}\ndata: {path: rows.jsonl}\n")

    def start(nodes: int, gpus: int, *arguments: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_JOB_NODELIST": "node[1-2]"}
        return subprocess.Popen(
            ["bash", str(SCRIPT), "sft", "sft.yaml", "--run", "run", *arguments],
            env={**env, "SLURM_GPUS_ON_NODE": str(gpus)},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize(("nodes", "devices"), [(1, 8), (2, 16)])
def test_the_allocation_becomes_the_world(submit, tmp_path, nodes, devices):
    job = submit(nodes, 8, "--dry-run")
    out, err = job.communicate(timeout=60)
    assert job.returncode == 0, err
    assert f"on each of {devices} devices" in out
    assert not list(tmp_path.glob("hosts.*")), "the host file was left behind"


def test_the_exit_code_is_passed_on(submit):
    job = submit(1, 8, "--dry-run", "--set", "train.batch_size=3")
    out, err = job.communicate(timeout=60)
    assert job.returncode == 2 and "multiple of the 8 devices" in err
    assert "requeue" not in out


@pytest.mark.pipeline
def test_the_time_limits_warning_stops_the_stage_and_queues_it_again(submit, tmp_path):
    job = submit(1, 1, "--set", "train.steps=100000", "--set", "log.samples=0", "--set", "model.init.hidden=8")
    metrics = tmp_path / "run" / "sft" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 75, err
    assert "scontrol requeue 7" in out
    assert list((tmp_path / "run" / "sft" / "checkpoints").glob("step-*"))
