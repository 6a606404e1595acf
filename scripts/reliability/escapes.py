"""Nothing leads out of the run directory, and nothing secret is left behind: names, links, values, connections."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf.run.commit import MANIFEST
from scripts.reliability.lab import STAGES, Lab
from scripts.reliability.refusals import SAFE, shuffled
from scripts.reliability.row import Tally, row

# --- S10 --------------------------------------------------------------------------------------------------------------


@row(
    "S10",
    "names of stages, parents, run directories, weight files and manifests that lead elsewhere; links and pipes",
    expected="exit 9; nothing outside is read for weights, written or deleted",
    asked="each kind",
    quick=8,
    full=35,
)
def names_that_lead_elsewhere(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: of all ways."""
    outside = lab.work / "outside"
    shutil.copytree(lab.root / "sft", outside)
    before = {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]}
    for what, prepare in shuffled(list(ways_out(lab, outside)), seed)[:tries]:
        with tally.attempt(what):
            done = lab.run(prepare())
            assert done.code == SAFE and "Traceback" not in done.err, f"exit {done.code}: {done.err[-500:]}"
            assert {path: path.stat().st_mtime_ns for path in [outside, *outside.rglob("*")]} == before
        for name in ("s10", "s10-linked"):
            path = lab.root / name
            path.unlink() if path.is_symlink() else lab.clear(name)
    shutil.rmtree(outside)
    (lab.work / "linked").unlink(missing_ok=True)
    shutil.rmtree(lab.work / "s10-model", ignore_errors=True)


Way = tuple[str, Callable[[], list[str]]]  # what it is; what prepares it and gives the command


def ways_out(lab: Lab, outside: Path) -> Iterator[Way]:
    """Names that are typed, links that are planted, names that stand in files."""
    yield from typed(lab, outside)
    yield from linked(lab, outside)
    yield from listed(lab)


def typed(lab: Lab, outside: Path) -> Iterator[Way]:
    """On the command line, and as a parent in a recipe."""
    for name in ("../outside", str(outside), "a/b", "~", "~/x", ".", "..", "", "-\n", "a b", "\u202e", "x" * 300):
        yield f"--name {name[:20]!r}", lambda name=name: lab.command("sft", f"--name={name}")
    for name in ("..", "../outside/..", "a\\0b", "sft/../..", "/"):
        options = ("--name", "s10", "--set", f'model={{from: "{name}"}}')
        yield f"model.from {name!r}", lambda options=options: lab.command("dpo", *options)


def child(lab: Lab, parent: str) -> list[str]:
    """A stage that starts from another."""
    return lab.command("dpo", "--name", "s10-linked", "--set", f"model={{from: {parent}}}")


def linked(lab: Lab, outside: Path) -> Iterator[Way]:
    """Symbolic links in the place of a run directory, a stage, and what a stage consists of."""

    def stage(words: list[str]) -> list[str]:
        (lab.root / "s10").symlink_to(outside)
        return words

    def run() -> list[str]:
        if not (lab.work / "linked").exists():
            (lab.work / "linked").symlink_to(outside)
        return lab.command("sft", "--name", "s10", root=lab.work / "linked")

    def part(name: str) -> list[str]:
        shutil.copytree(lab.root / "sft", lab.root / "s10")
        target = lab.root / "s10" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
        target.symlink_to(outside / name)
        return child(lab, "s10") if name == "model" else lab.command("sft", "--name", "s10")

    yield "a stage that is a link", lambda: stage(lab.command("sft", "--name", "s10"))
    yield "a parent that is a link", lambda: stage(child(lab, "s10"))
    yield "a run directory that is a link", run
    for name in ("model", "checkpoints", "log.txt", "metrics.jsonl", "status.json"):
        yield f"{name} that is a link", lambda name=name: part(name)


def listed(lab: Lab) -> Iterator[Way]:
    """In the manifest of a stage, and in the index of a model's weights."""

    def manifest(name: str) -> list[str]:
        shutil.copytree(lab.root / "sft", lab.root / "s10")
        found = json.loads((lab.root / "s10" / MANIFEST).read_text())
        found["files"][name] = {"size": 1, "sha256": "0" * 64}
        (lab.root / "s10" / MANIFEST).write_text(json.dumps(found))
        return child(lab, "s10")

    def weights(name: str, *, pipe: bool = False) -> list[str]:
        folder = lab.work / "s10-model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(lab.root / "sft" / "model", folder)
        index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        if pipe:
            os.mkfifo(folder / name)
        return lab.command("dpo", "--name", "s10", "--set", f"model={{path: {folder}}}")

    for name in ("../sft/model/config.json", "/etc/passwd", "model/../../sft/status.json", "a\0b"):
        yield f"manifest name {name!r}", lambda name=name: manifest(name)
    for name in ("../sft.safetensors", "/etc/passwd", "sub/a.safetensors", "..", ""):
        yield f"weight_map {name!r}", lambda name=name: weights(name)
    yield "weight_map with a pipe", lambda: weights("pipe.safetensors", pipe=True)


# --- S11, S13 ---------------------------------------------------------------------------------------------------------

VARIABLES = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "MY_PASSWORD")


@row(
    "S11",
    "every stage, a crash and refusals with known values in the environment, addresses and recipes",
    expected="none of the values in the run directory, the streams or a command line",
    asked="each stage incl. a crash",
    quick=2,
    full=16,
)
def canaries(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: commands."""
    canary = "cAnArY" + hashlib.sha256(str(seed).encode()).hexdigest()[:30]
    env = {name: f"{canary}{index}" for index, name in enumerate(VARIABLES)}
    crash = ["--set", "train.lr=1e30", "--set", "train.schedule=constant"]
    secret = f"https://me:{canary}@127.0.0.1:9/score"
    ways: list[tuple[str, list[str], tuple[int, ...]]] = [
        ("grpo", ["--set", f"rewards=[{{kind: http, url: '{secret}'}}]"], (2,)),
        ("sft", crash, (1, 5)),
        *((stage, [], (0,)) for stage in STAGES),
        ("sft", ["--set", f"hf_token={canary}"], (2,)),
        ("sft", ["--set", f"log.wandb=hf_{canary}"], (2,)),
        ("grpo", ["--set", f"rewards=[{{kind: http, url: 'http://127.0.0.1:9/?api_key={canary}'}}]"], (2,)),
        ("grpo", ["--set", "rewards=[{kind: http, url: 'http://127.0.0.1:9/', api_key_env: HF_TOKEN}]"], (8,)),
        ("sft", ["--set", f"data.path={secret}"], (2,)),
        *((stage, crash, (1, 5)) for stage in STAGES[1:]),
    ]
    for stage, options, codes in ways[:tries]:
        with tally.attempt(f"{stage} {' '.join(options).replace(canary, '...')}"):
            child = lab.start(lab.command(stage, "--name", "s11", *options), env=env)
            seen = b""
            while child.is_running():
                seen += commandline(child.pids[0]) if codes != (2,) else b""  # there the user has typed it
            done = child.wait()
            assert done.code in codes, f"exit {done.code}: {done.err[-500:]}"
            places = {"stdout": done.out.encode(), "stderr": done.err.encode(), "command line": seen}
            files = [path for path in lab.root.rglob("*") if path.is_file()]
            places |= {str(path): path.read_bytes() for path in files}
            hits = [where for where, content in places.items() if canary.encode() in content]
            assert not hits, hits
        lab.clear("s11")


def commandline(pid: int) -> bytes:
    """What others can see of a process's command; nothing once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def only_loopback() -> None:
    """In a command: a connection, or the look-up of a name, beyond this machine ends it with 99."""
    connect, lookup = socket.socket.connect, socket.getaddrinfo

    def is_here(host: object) -> bool:
        return str(host).startswith("127.") or host in ("localhost", "::1", None, "", socket.gethostname())

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not is_here(address[0]):
            os.write(2, f"connects to {address}\n".encode())
            os._exit(99)
        return connect(self, address)

    def guarded_lookup(host: Any, *rest: Any, **more: Any) -> Any:
        if not is_here(host):
            os.write(2, f"looks up {host}\n".encode())
            os._exit(99)
        return lookup(host, *rest, **more)

    os.environ.pop("HF_HUB_OFFLINE", None)
    socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_lookup  # type: ignore[method-assign]


def leave_network() -> bool:
    """Give this process, which has one thread, a network that has nothing but loopback. Returns whether it could."""
    new_user, new_net, set_flags, up = 0x10000000, 0x40000000, 0x8914, 0x1
    if ctypes.CDLL(None, use_errno=True).unshare(new_user | new_net):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, set_flags, struct.pack("16sh14x", b"lo", up))
    return True


def without_network() -> None:
    """In a command: no network where the system allows that, and an end with 99 for whoever looks for one."""
    only_loopback()
    leave_network()


def can_leave_network() -> bool:
    """Tried in a fork."""
    pid = os.fork()
    if pid == 0:
        os._exit(0 if leave_network() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@row(
    "S13",
    "every stage with local inputs and no network beyond loopback; the hub is not told to be offline",
    expected="exit 0; not one connection or look-up beyond this machine",
    asked="all stages",
    quick=1,
    full=10,
)
def no_network(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: stages, each in turn; from the second round on as an adapter."""
    if not can_leave_network():
        tally.remark("no network namespaces here: connections were watched, not made impossible")
    for index in range(tries):
        stage, lora = STAGES[index % len(STAGES)], index >= len(STAGES)
        options = ["--set", "model.lora={rank: 4}"] if lora else []
        with tally.attempt(f"{stage} {' '.join(options)}"):
            done = lab.run(lab.command(stage, "--name", "s13", *options), before=without_network)
            assert done.code == 0, f"exit {done.code}: {done.err[-500:]}"
        lab.clear("s13")
