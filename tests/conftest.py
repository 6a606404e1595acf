"""Fixtures for tests that use the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def cli() -> Iterator[Callable[..., Done]]:
    """`cli("sft", "recipe.yaml", "--run", "runs/x")` runs the command in a fork of a warm process, from the root."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "warm_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
    )
    assert server.stdin and server.stdout and server.stdout.readline().strip() == "ready"

    def run(*arguments: str | Path) -> Done:
        print(json.dumps([str(word) for word in arguments]), file=server.stdin, flush=True)
        answer = json.loads(server.stdout.readline())
        return Done(answer["code"], answer["out"], answer["err"])

    yield run
    server.stdin.close()
    server.wait(timeout=30)
