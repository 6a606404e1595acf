"""The proof on this machine that nothing is lost: tiny runs are killed in the middle of a step and run again.

For each stage one run goes straight through and another is killed with SIGKILL; the same command, given again, must end
with the same bytes: published weights, the last checkpoint with its optimizer state, and every metric that
no clock measures. On the CPU, where equal runs are equal to the last bit; one thread per rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.demo import DemoSizes, write_demo_data
from rlhf.doctor.finding import Finding
from rlhf.doctor.machine import RANK_NAMES
from rlhf.errors import WorkerLostError
from rlhf.recipe.document import to_yaml
from rlhf.run.commit import MANIFEST

SIZES = DemoSizes(
    sft=80, pairs=8, prompts=40, eval_prompts=8, eval_pairs=8, lists=8, eval_lists=8, judgements=8, eval_judgements=8
)
STEPS, EVERY, KILLED_AT = 12, 4, 6  # killed in the step after KILLED_AT, which is after a checkpoint
_LIMIT_S = 240.0  # for one command
_MEASURED = ("time", "speed/")  # what a clock says differs from run to run
_END_S = 20.0  # for one that is told to end
_CLOSE = 1e-4  # relative difference of a loss between one rank and two


class Unequal(Exception):
    """A run did not end as it must; the message is for the user."""


def recipes(data: Path) -> dict[str, dict[str, Any]]:
    """A model of 32 hidden units: SFT from scratch, then PPO with a critic against a rule."""
    init = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 64, "vocab": 400, "context": 128}
    common = {"checkpoint": {"every": EVERY}, "sampling": {"max_new_tokens": 12}, "log": {"samples": 0}}
    offline = {"steps": STEPS, "batch_size": 8, "micro_batch": 4, "lr": 1e-3}
    online = {"rollouts": STEPS, "prompts": 8, "micro_batch": 4, "minibatches": 2, "lr": 1e-3}

    def rows(name: str, held_out: int) -> dict[str, Any]:
        return {"path": str(data / f"{name}.jsonl"), "eval_rows": held_out, "max_length": 96}

    return {
        "sft": {**common, "model": {"init": init}, "data": rows("sft", 8), "train": offline},
        "ppo": {
            **common,
            "model": {"from": "sft"},
            "critic": {"from": "sft", "lr": 1e-3},
            "rewards": [{"kind": "length", "target": 8, "scale": 8}],
            "data": rows("prompts", 0),
            "train": online,
        },
    }


def selftest() -> Iterator[Finding]:
    """One finding per proof, as soon as it is made."""
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    with tempfile.TemporaryDirectory(prefix="rlhf-doctor-") as folder, Place(Path(folder)) as place:
        proofs: list[tuple[str, Callable[[Place], str]]] = [
            ("sft, killed", lambda place: one_rank(place, "sft", "sft")),
            ("ppo, killed", lambda place: one_rank(place, "ppo", "ppo")),
        ]
        if gpus:
            proofs.append((f"{min(gpus, 2)} GPUs", lambda place: on_gpus(place, min(gpus, 2))))
        elif len(os.sched_getaffinity(0)) > 1:
            proofs.append(("2 ranks, killed", two_ranks))
        for name, proof in proofs:
            started = time.monotonic()
            try:
                found = proof(place)
            except Unequal as error:
                fix = "Do not trust what is resumed here before this is mended: versions, memory and disk first."
                yield Finding.of(name, str(error), failed=fix)
                if name.startswith("sft"):
                    return  # the others start from it
            else:
                yield Finding.of(name, f"{found} ({time.monotonic() - started:.0f} s)")


# ---- the proofs ------------------------------------------------------------------------------------------------------


def one_rank(place: Place, stage: str, name: str) -> str:
    """A straight run beside one that is killed, which then goes on."""
    straight = place.start(stage, name)
    other = place.start(stage, f"{name}-killed")
    kill(place.wait_for_step(other), other.process.pid)
    place.ended(straight, 0)
    place.ended(other, -signal.SIGKILL)
    return went_on(place, stage, name, f"{name}-killed")


def two_ranks(place: Place) -> str:
    """The same through the launcher, with one of two ranks killed; the command itself must end, and say so."""
    words = ("--gpus", "2")
    place.ended(place.start("sft", "two", *words), 0)
    other = place.start("sft", "two-killed", *words)
    place.wait_for_step(other)
    kill(other, rank_of(other, 1))
    place.ended(other, WorkerLostError.exit_code)
    told = went_on(place, "sft", "two", "two-killed", *words)
    one, two = (place.losses(name) for name in ("sft", "two"))
    apart = max(abs(a - b) / abs(b) for a, b in zip(two, one, strict=True))
    if apart > _CLOSE:
        raise Unequal(f"two ranks learn something else than one: losses differ by {apart:.1e}")
    return f"{told}; losses as on one rank to {apart:.0e}"


def on_gpus(place: Place, count: int) -> str:
    """A run on real devices ends well. Its last bits may differ from run to run, so they are not compared."""
    place.ended(place.start("sft", "gpus", "--gpus", str(count), gpu=True), 0)
    losses = place.losses("gpus")
    apart = max(abs(a - b) / abs(b) for a, b in zip(losses, place.losses("sft"), strict=True))
    return f"{len(losses)} steps; losses as on the CPU to {apart:.0e}"


def went_on(place: Place, stage: str, straight: str, name: str, *words: str) -> str:
    """Run a killed stage to its end and compare. Returns what was compared."""
    folder = place.run / name
    if (folder / MANIFEST).exists():
        raise Unequal("the run was over before it could be killed")
    reached = len(place.rows(name))
    err = place.ended(place.start(stage, name, *words), 0)
    said = re.search(r"goes on after step (\d+)", err)
    if said is None:
        raise Unequal(f"killed after step {reached}, it did not go on from its checkpoint")
    one, two = digest(place.run / straight), digest(folder)
    different = sorted(part for part in one.keys() | two.keys() if one.get(part) != two.get(part))
    if different:
        raise Unequal(f"killed after step {reached}, resumed after step {said[1]}: {', '.join(different)} differ")
    return (
        f"SIGKILL in step {reached + 1} of {STEPS}, resumed after step {said[1]}: {len(one) - 1} files of weights and"
        f" state and {len(place.rows(name))} rows of metrics equal, every bit"
    )


def digest(stage: Path) -> dict[str, str]:
    """SHA-256 of what must be equal, by name."""
    parts = [path for part in ("model", "critic") for path in (stage / part).glob("*.safetensors")]
    newest = max((stage / "checkpoints").glob("step-*"))
    kept = [path for path in newest.rglob("*") if path.is_file() and path.name != MANIFEST]
    found = {str(path.relative_to(stage)): path.read_bytes() for path in parts + kept}
    found["metrics.jsonl"] = json.dumps(comparable(stage / "metrics.jsonl"), sort_keys=True).encode()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def comparable(log: Path) -> list[dict[str, Any]]:
    """The rows of a log without what a clock says."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(_MEASURED)} for row in rows]


# ---- commands --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Running:
    """A command that runs, with its streams in files."""

    name: str
    process: subprocess.Popen[bytes]
    err: Path

    def last_words(self) -> str:
        """The end of what it said, on one line."""
        return " ".join(" ".join(self.err.read_text(errors="replace").splitlines()[-3:]).split())[-400:] or "nothing"


class Place:
    """A folder with generated data, recipes, and the runs that are made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        self._started: list[subprocess.Popen[bytes]] = []
        write_demo_data(folder / "data", 0, SIZES)
        for stage, recipe in recipes(folder / "data").items():
            (folder / f"{stage}.yaml").write_text(to_yaml(recipe))

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *failure: object) -> None:
        """Nothing that was started outlives this."""
        for process in self._started:
            process.terminate()
        for process in self._started:
            try:
                process.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self, stage: str, name: str, *words: str, gpu: bool = False) -> Running:
        """Start `rlhf STAGE` under a name. Its ranks see no GPU unless `gpu` says so."""
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        inherited = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
        command = [sys.executable, "-m", "rlhf", stage, str(self.folder / f"{stage}.yaml"), "--run", str(self.run)]
        err = self.folder / f"{name}.err"
        with err.open("wb") as stream:
            process = subprocess.Popen(
                [*command, "--name", name, *words],
                env={**inherited, **fixed, **hidden},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )
        self._started.append(process)
        return Running(name, process, err)

    def wait_for_step(self, running: Running) -> Running:
        """Wait until so many steps are in its log that it must be killed now."""
        deadline = time.monotonic() + _LIMIT_S
        while len(self.rows(running.name)) < KILLED_AT:
            if running.process.poll() is not None:
                raise Unequal(f"{running.name} ended with {running.process.returncode}: {running.last_words()}")
            if time.monotonic() > deadline:
                running.process.terminate()
                raise Unequal(f"{running.name} took more than {_LIMIT_S:.0f} s to step {KILLED_AT}")
            time.sleep(0.001)
        return running

    def ended(self, running: Running, code: int) -> str:
        """Wait for its end, which must have this code. Returns what it said."""
        try:
            found = running.process.wait(timeout=_LIMIT_S)
        except subprocess.TimeoutExpired:
            running.process.kill()
            running.process.wait()
            raise Unequal(f"{running.name} took more than {_LIMIT_S:.0f} s") from None
        if found != code:
            raise Unequal(f"{running.name}: expected exit code {code}, found {found}: {running.last_words()}")
        return running.err.read_text(errors="replace")

    def rows(self, name: str) -> list[bytes]:
        """The whole lines of a run's metrics."""
        log = self.run / name / "metrics.jsonl"
        return log.read_bytes().split(b"\n")[:-1] if log.exists() else []

    def losses(self, name: str) -> list[float]:
        """Its training losses."""
        return [json.loads(row)["train/loss"] for row in self.rows(name)]


def kill(running: Running, pid: int) -> None:
    """SIGKILL, unless it has just ended by itself, which `went_on` finds out."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def rank_of(running: Running, rank: int) -> int:
    """The process of a rank of a command."""
    wanted = f"--name\0{running.name}\0".encode()
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and wanted in (entry / "cmdline").read_bytes():
                variables = (entry / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables and b"-m\0rlhf" in (entry / "cmdline").read_bytes():
                    return int(entry.name)
    raise Unequal(f"{running.name}: no process is rank {rank}: {running.last_words()}")
