"""Where scenarios run: tiny models and data, and `rlhf` commands as forks of this process, which has imported all.

A command starts in a tenth of a second and can be killed, frozen or watched like any other process. One thread each:
bytes are compared.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(ENVIRONMENT)

import torch  # noqa: E402  after the number of its threads is set

import rlhf.train.worker  # noqa: E402, F401  what a stage needs
from rlhf.cli.app import main  # noqa: E402
from rlhf.data.demo import DemoSizes, write_demo_data  # noqa: E402
from rlhf.launch import free_port  # noqa: E402
from rlhf.recipe.document import to_yaml  # noqa: E402

STAGES = ("sft", "rm", "ppo", "grpo", "dpo")
SIZES = DemoSizes(sft=60, pairs=60, prompts=40, eval_prompts=8, eval_pairs=8, lists=60, eval_lists=8)
_MEASURED = ("time", "speed/")  # what a clock says differs from run to run
_FIRST = 60.0  # seconds that a command may take unless said otherwise


@dataclass(frozen=True)
class Done:
    """A command that has ended. code: of the process; negative: the signal that ended it."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass
class Child:
    """A command that runs, or several of its ranks."""

    words: list[str]
    pids: list[int]
    folder: Path
    started: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to all ranks, or to one."""
        for index, pid in enumerate(self.pids):
            if pid not in self.codes and rank in (None, index):
                os.kill(pid, number)

    def is_running(self) -> bool:
        """Whether any process of it is left."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def wait(self, timeout: float = _FIRST) -> Done:
        """Wait for its end; what takes longer is killed and fails. The code is the first rank's."""
        deadline = time.monotonic() + timeout
        while self.is_running():
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"{' '.join(self.words)}: still running after {timeout:.0f} s\n{self.text('err')}")
            time.sleep(0.005)
        seconds = time.monotonic() - self.started
        return Done(self.codes[self.pids[0]], self.text("out"), self.text("err"), seconds)

    def until(self, condition: Callable[[], bool], timeout: float = _FIRST) -> bool:
        """Wait for something while it runs. Returns False where it ended before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.is_running():
                return False
            assert time.monotonic() < deadline, f"{' '.join(self.words)}: waited {timeout:.0f} s in vain"
            time.sleep(0.002)
        return True

    def text(self, stream: str) -> str:
        """What it has written so far, of the first rank."""
        return (self.folder / f"{stream}0").read_text(errors="replace")


class Lab:
    """A folder with data, recipes and a run directory whose `sft` and `rm` are finished. Made by `Lab.made`."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.data, self.recipes, self.root = work / "data", work / "recipes", work / "run"
        self._streams = work / "streams"
        self._number = 0

    @classmethod
    def made(cls, work: Path) -> Lab:
        """A new one below an empty or missing folder."""
        lab = cls(work)
        for folder in (lab.recipes, lab._streams):
            folder.mkdir(parents=True)
        torch.set_num_threads(1)
        write_demo_data(lab.data, 0, SIZES)
        for stage, recipe in recipes(lab.data).items():
            (lab.recipes / f"{stage}.yaml").write_text(to_yaml(recipe))
        for stage in ("sft", "rm"):
            done = lab.run(lab.command(stage))
            assert done.code == 0, done.err
        return lab

    def command(self, stage: str, *options: str | Path, root: Path | None = None) -> list[str]:
        """The words of a stage's command, in this lab's run directory or another."""
        words = [stage, self.recipes / f"{stage}.yaml", "--run", root or self.root, *options]
        return [str(word) for word in words]

    def start(
        self,
        words: Iterable[str | Path],
        *,
        ranks: int = 1,
        env: dict[str, str] | None = None,
        before: Callable[[], object] = lambda: None,
    ) -> Child:
        """Start `rlhf WORDS` in a fork; with several ranks as a launcher would. before: runs in the child first."""
        self._number += 1
        folder = self._streams / f"{self._number:05d}"
        folder.mkdir()
        child = Child([str(word) for word in words], [], folder)
        port = str(free_port()) if ranks > 1 else ""
        sys.stdout.flush()
        sys.stderr.flush()
        for rank in range(ranks):
            pid = os.fork()
            if pid == 0:
                group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_SIZE": ranks}
                place = {**group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
                os.environ.update({**{key: str(value) for key, value in place.items()}, **(env or {})})
                _become(child.words, folder, rank, before)
            child.pids.append(pid)
        return child

    def run(self, words: Iterable[str | Path], *, timeout: float = _FIRST, **options: Any) -> Done:
        """Run a command to its end."""
        return self.start(words, **options).wait(timeout)

    def clear(self, name: str, root: Path | None = None) -> None:
        """Forget a stage."""
        shutil.rmtree((root or self.root) / name, ignore_errors=True)


def _become(words: list[str], folder: Path, rank: int, before: Callable[[], object]) -> None:
    """In the child: the command, its streams in files. Never returns."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        # The parent's streams need not be 1 and 2: a test runner puts others in their place.
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        os.chdir(ROOT)
        sys.argv = ["rlhf", *words]
        gc.freeze()
        before()
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                pass
        os._exit(code)


def recipes(data: Path) -> dict[str, dict[str, Any]]:
    """A recipe per stage that runs in a second: every step a checkpoint, rows shuffled."""
    init = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "vocab": 400, "context": 128}
    often = {"checkpoint": {"every": 1}, "log": {"samples_every": 3}}
    judged = {"eval": {"every": 2}}
    offline = {"steps": 6, "batch_size": 8, "micro_batch": 4, "lr": 1e-3}
    online = {"rollouts": 4, "prompts": 8, "micro_batch": 4, "minibatches": 2, "inner_epochs": 2, "lr": 1e-3}

    def rows(name: str, held_out: int) -> dict[str, Any]:
        return {"path": str(data / f"{name}.jsonl"), "eval_rows": held_out, "max_length": 96}

    short = {"sampling": {"max_new_tokens": 12}}
    trained = {"model": {"from": "sft"}, **often}
    sampled = {**trained, **short, "data": rows("prompts", 0)}
    return {
        "sft": {**often, **judged, **short, "model": {"init": init}, "data": rows("sft", 8), "train": offline},
        "rm": {**trained, **judged, "log": {}, "data": rows("pairs", 8), "train": offline},
        "dpo": {**trained, **judged, **short, "data": rows("pairs", 8), "train": offline},
        "ppo": {**sampled, "train": online, "critic": {"lr": 1e-3}, "rewards": [{"kind": "model", "from": "rm"}]},
        "grpo": {**sampled, "train": {**online, "answers": 4}, "rewards": [{"kind": "model", "from": "rm"}]},
    }


def digest(stage: Path) -> dict[str, str]:
    """What must be equal after an interrupted run and a straight one: name -> SHA-256.

    The published weights, every file of the newest checkpoint (weights, optimizer, state), and the logs without what a
    clock says.
    """
    parts = [path for part in ("model", "critic", "ema") for path in sorted((stage / part).glob("*.safetensors"))]
    newest = sorted((stage / "checkpoints").glob("step-*"))[-1:]
    kept = [path for folder in newest for path in sorted(folder.rglob("*")) if path.is_file()]
    found = {str(p.relative_to(stage)): p.read_bytes() for p in parts + kept if p.name != "MANIFEST.json"}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (stage / name).exists():
            lines = (stage / name).read_text().splitlines()
            rows = [{k: v for k, v in json.loads(line).items() if not k.startswith(_MEASURED)} for line in lines]
            found[name] = json.dumps(rows, sort_keys=True).encode()
    assert any(name.endswith(".safetensors") for name in found), f"{stage}: nothing was published"
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The names whose contents differ, or that one side lacks."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
