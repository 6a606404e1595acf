"""Fixtures for tests that use the command line."""

from __future__ import annotations

import functools
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.data.demo import DemoSizes, write_demo_data

ROOT = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Signals as in a terminal: in a background job SIGINT and SIGHUP are ignored, also by the commands it starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@functools.cache
def scope(nodeid: str) -> str:
    """Which tests stay together under `pytest -n`: those of a file, since they share what is made once.

    All files with tests that start two ranks are one scope, `ranks`, so that no two such tests run at once.
    """
    file = nodeid.partition("::")[0]
    return "ranks" if "mark.distributed" in (ROOT / file).read_text(encoding="utf-8") else file


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `pytest -n` the scope `ranks` begins first, since it is the longest."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: scope(item.nodeid) != "ranks")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out whole scopes, in the order of the tests."""
    from xdist.scheduler import LoadScopeScheduling  # only with -n

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope(nodeid)

    return ByScope(config, log)


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str
    torch: bool  # whether the command imported it


@contextmanager
def server(*arguments: str) -> Iterator[Callable[..., Done]]:
    """Commands in forks of a process that waits for them, see warm_server.py."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "warm_server.py"), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=ROOT,
    )
    assert process.stdin and process.stdout and process.stdout.readline().strip() == "ready"

    def run(*words: str | Path) -> Done:
        print(json.dumps([str(word) for word in words]), file=process.stdin, flush=True)
        return Done(**json.loads(process.stdout.readline()))

    yield run
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture(scope="session")
def cli() -> Iterator[Callable[..., Done]]:
    """`cli("sft", "recipe.yaml", "--run", "runs/x")` runs the command in a fork of a warm process, from the root."""
    with server() as run:
        yield run


@pytest.fixture(scope="session")
def cold_cli() -> Iterator[Callable[..., Done]]:
    """The same without torch in memory: `.torch` of the answer says whether the command asked for it."""
    with server("cold") as run:
        yield run


def environment() -> dict[str, str]:
    """For commands: no network, wide lines, one thread per process."""
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed}


@dataclass(frozen=True)
class TinyRun:
    """A run directory with finished `sft` and `rm` stages of a tiny model, their data, and a recipe for every stage."""

    root: Path
    recipes: Path
    data: Path

    def command(self, stage: str, *options: str | Path) -> list[str | Path]:
        """The words of a stage's command in this run directory."""
        return [stage, self.recipes / f"{stage}.yaml", "--run", self.root, *options]

    def launched(self, stage: str, *options: str | Path) -> Done:
        """A stage on two ranks, through the deepspeed launcher."""
        command = [sys.executable, "-m", "rlhf", *map(str, self.command(stage, "--gpus", "2", *options))]
        done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300)
        return Done(done.returncode, done.stdout, done.stderr, torch=True)

    def rows(self, name: str, file: str = "metrics.jsonl") -> list[dict]:
        """The rows of a stage's log."""
        return [json.loads(line) for line in (self.root / name / file).read_text().splitlines()]

    def files(self) -> dict[str, int]:
        """Every file with its time; locks come and go with the commands that look at a stage."""
        found = [path for path in self.root.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
        return {str(path.relative_to(self.root)): path.stat().st_mtime_ns for path in found}


def tiny_recipes(data: Path, context: int = 128) -> dict[str, dict]:
    """A recipe per stage that runs in a second."""
    init = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "vocab": 400, "context": context}
    offline = {"steps": 2, "batch_size": 8, "micro_batch": 4, "lr": 1e-3}
    online = {"rollouts": 2, "prompts": 8, "micro_batch": 4, "minibatches": 2, "inner_epochs": 2, "lr": 1e-4}

    def rows(name: str, held_out: int) -> dict:
        return {"path": str(data / f"{name}.jsonl"), "eval_rows": held_out, "max_length": 96}

    policy = {"model": {"from": "sft"}, "sampling": {"max_new_tokens": 12}}
    sampled = {**policy, "data": rows("prompts", 0)}
    return {
        "sft": {**policy, "model": {"init": init}, "data": rows("sft", 8), "train": offline},
        "rm": {"model": {"from": "sft"}, "data": rows("pairs", 8), "train": offline},
        "dpo": {**policy, "data": rows("pairs", 8), "train": offline},
        "ppo": {**sampled, "train": online, "critic": {"lr": 1e-4}},
        "grpo": {**sampled, "train": {**online, "answers": 4}},
        "label": {
            **sampled,
            "rewards": [{"kind": "model", "from": "rm"}],
            "label": {"batch": 16, "rollout_batch": 16, "micro_batch": 4, "unfinished": "keep"},
        },
    }


@pytest.fixture(scope="session")
def tiny(cli: Callable[..., Done], tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Made once; tests give further stages names of their own."""
    folder = tmp_path_factory.mktemp("tiny")
    run = TinyRun(folder / "run", folder / "recipes", folder / "data")
    run.recipes.mkdir()
    write_demo_data(
        run.data, 0, DemoSizes(sft=60, pairs=60, prompts=40, eval_prompts=8, eval_pairs=8, lists=60, eval_lists=8)
    )
    for stage, recipe in tiny_recipes(run.data).items():
        (run.recipes / f"{stage}.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("sft", "rm"):
        done = cli(*run.command(stage))
        assert done.code == 0, done.err
    return run


@pytest.fixture
def forked() -> Callable[[Callable[[], object]], None]:
    """`forked(body)` runs `body()` in a child that is a group of one rank: DeepSpeed keeps a group for good."""
    return in_child


def in_child(body: Callable[[], object]) -> None:
    """Run a function in a fork; its traceback is this process's failure."""
    # Imported here, since most tests need none of it, and before the fork, since every child would pay for it.
    import deepspeed.runtime.zero.muon.muon_optimizer
    import deepspeed.runtime.zero.stage3
    import torch._dynamo

    from rlhf.engine import dist

    assert deepspeed.ops.__compatible_ops__  # found out once

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        failure = ""
        try:
            os.close(read)
            torch.set_num_threads(1)  # threads of the parent's pool are not there
            dist.start()
            body()
        except BaseException:
            failure = traceback.format_exc()
        with os.fdopen(write, "w") as pipe:
            pipe.write(failure)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        failure = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert not failure and code == 0, failure or f"the child ended with {code}"


@pytest.fixture
def two_ranks() -> Callable[[Callable[[int], Any]], list[Any]]:
    """`two_ranks(body)` runs `body(rank)` in two children that are a group, and gives back what they return."""
    return in_two_children


def in_two_children(body: Callable[[int], Any]) -> list[Any]:
    """As the launcher would start them, without its seconds. A traceback of either is this process's failure."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    children = [fork_rank(body, rank, port) for rank in range(2)]
    found = []
    for child, read in children:
        with os.fdopen(read, "rb") as pipe:
            found.append(pickle.loads(pipe.read() or pickle.dumps(("it was killed", None))))
        os.waitpid(child, 0)
    assert not any(failure for failure, _ in found), "\n".join(str(failure) for failure, _ in found)
    return [value for _, value in found]


def fork_rank(body: Callable[[int], Any], rank: int, port: str) -> tuple[int, int]:
    """(pid, where it writes its failure and what it returns)."""
    import torch  # most tests need none of it

    from rlhf.engine import dist

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        answer: tuple[str, Any] = ("", None)
        try:
            os.close(read)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            torch.set_num_threads(1)
            dist.start()
            answer = ("", body(rank))
            dist.finish()
        except BaseException:
            answer = (traceback.format_exc(), None)
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    return child, read
