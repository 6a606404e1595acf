"""Start a stage on several devices through the `deepspeed` launcher, and leave nothing of it behind.

    rlhf ppo ... --gpus 8          this process: holds the stage folder, waits
    `- deepspeed runner            leader of a session of its own
       `- deepspeed launch         one per node; ends the other ranks where one fails
          |- rank 0                python -m rlhf ppo ..., with RANK and WORLD_SIZE in the environment
          `- rank 1

What the launcher leaves open is closed here. A request to stop (SIGINT, SIGTERM, SIGHUP) goes to the ranks only, which
finish their step, write a checkpoint and exit 75; the runner would die of it and `launch` would give them 30 seconds.
Success is the stage's manifest: a runner whose `launch` was killed exits 0. Whatever is left of the session at the end
is ended, and a rank ends itself when its parents are gone (`die_with_parent`).

On several nodes DeepSpeed carries only those environment variables to the others whose names begin with PYTHON or NCCL;
further ones belong in `.deepspeed_env` (see its documentation).
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from rlhf.errors import RecipeError, WorkerLostError

STOPPED = 75
OWN_CODES = frozenset({2, 3, 4, 5, 6, 7, 8, 9, 10, STOPPED})
GRACE_S = 120.0  # for ranks that were asked to stop: one step and one checkpoint
LOST_GRACE_S = 10.0  # for ranks whose peer or parent is gone: nothing they wait for will come
LAUNCHER = "PYTHON_RLHF_LAUNCHER"  # host:pid:start of this process; the prefix lets it reach other nodes
_POLL_S = 0.1  # `launch` looks once a second and then reaps a dead rank; how it died is seen before
_SCAN_S = 1.0
_KILL_S = 10.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class World:
    """Where the ranks run. `gpus` is per node; None leaves it, and the number of nodes, to the host file."""

    gpus: int | None
    num_nodes: int | None = None
    hostfile: Path | None = None
    cpu: bool = False
    master_port: int | None = None  # None: a free one


def is_worker() -> bool:
    """Whether this process is a rank of somebody's launcher: `deepspeed`, `torchrun` or our own."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launcher_pid() -> int | None:
    """For a rank: the pid of the `launch` that started it, which holds the stage folder; None under other launchers."""
    return int(os.environ[LAUNCHER].split(":")[1]) if LAUNCHER in os.environ else None


def pick_world_size(gpus: int | None, num_nodes: int | None) -> int:
    """The number of ranks: one per device and node; one device per node where the number is not given."""
    for option, value in (("--gpus", gpus), ("--num-nodes", num_nodes)):
        if value is not None and value < 1:
            raise RecipeError(f"expected at least 1, found {value}", where=option)
    return (gpus or 1) * (num_nodes or 1)


# ---- the command -----------------------------------------------------------------------------------------------------


def launch_command(argv: Sequence[str], world: World, module: str = "rlhf") -> list[str]:
    """The `deepspeed` command that runs `python -m MODULE ARGV` once per device."""
    pick_world_size(world.gpus, world.num_nodes)
    if world.num_nodes is not None and world.num_nodes > 1 and world.hostfile is None:
        fix = "Name a file with one `host slots=N` line per node."
        raise RecipeError(f"expected a host file for {world.num_nodes} nodes, found none", where="--hostfile", fix=fix)
    if world.hostfile is not None and not world.hostfile.is_file():
        raise RecipeError(f"expected a host file, found none at {world.hostfile}", where="--hostfile")
    options = {
        "--log_level": "critical",  # below, the launcher repeats in its own words what a rank has already said
        "--master_port": str(world.master_port or free_port()),
        "--hostfile": str(world.hostfile or "/nonexistent"),  # else a /job/hostfile is picked up
        **_devices(world),
    }
    flags = [part for option in options.items() for part in option]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", *flags, "--module", module, *argv]


def _devices(world: World) -> dict[str, str]:
    if world.hostfile is not None:
        wanted = {"--num_nodes": world.num_nodes, "--num_gpus": world.gpus}
        return {option: str(value) for option, value in wanted.items() if value is not None}
    count = pick_world_size(world.gpus, 1)
    if world.cpu or not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return {"--num_gpus": str(count)}
    visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")  # --num_gpus would take others than these
    if len(visible) < count or not all(device.isdecimal() for device in visible[:count]):
        what = f"expected the numbers of at least {count} devices, found {','.join(visible)}"
        raise RecipeError(what, where="CUDA_VISIBLE_DEVICES", fix="Set it to as many device numbers as --gpus says.")
    return {"--include": "localhost:" + ",".join(visible[:count])}


def rank_environment(world: World) -> dict[str, str]:
    """What the ranks need in their environment beside what is there: threads that share the cores, and tools."""
    tools = str(Path(sys.executable).parent)  # ninja, and deepspeed's own scripts
    path = os.environ["PATH"] if "PATH" in os.environ else os.defpath
    added = {} if tools in path.split(os.pathsep) else {"PATH": tools + os.pathsep + path}
    if "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // pick_world_size(world.gpus, 1)))
    return {**added, "DS_ACCELERATOR": "cpu"} if world.cpu else added


def printable(command: Sequence[str], environment: dict[str, str]) -> str:
    """The command with its additions to the environment, as one line for a shell."""
    words = [f"{name}={shlex.quote(value)}" for name, value in environment.items() if name != "PATH"]
    if "PATH" in environment:
        words.append(f'PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    return " ".join([*words, shlex.join(command)])


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


# ---- the job ---------------------------------------------------------------------------------------------------------


def launch(
    argv: Sequence[str],
    world: World,
    *,
    stage: Path,
    succeeded: Callable[[], bool],
    module: str = "rlhf",
    grace_s: float = GRACE_S,
) -> int:
    """Run `python -m MODULE ARGV` on every device, wait, and return the exit code: 0 only if `succeeded()`.

    An exit code of ours (2 to 10, 75) is passed on. Anything else raises WorkerLostError, which names the rank where it
    is known and ends with the last lines of the stage's log.txt. A first SIGINT, SIGTERM or SIGHUP asks the ranks to
    stop; `grace_s` seconds later, or at a further SIGINT, they are killed. In good times only the command is printed.
    """
    command, added = launch_command(argv, world, module), rank_environment(world)
    _say(printable(command, added))
    environment = {**os.environ, **added, LAUNCHER: f"{socket.gethostname()}:{os.getpid()}:{_stat(os.getpid()).start}"}
    if world.hostfile is None:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # said by --include; both at once make the runner complain
    with _StopRequests() as requests:
        runner = subprocess.Popen(command, env=environment, start_new_session=True)
        session = _Session(runner.pid)
        try:
            _wait(session, requests, grace_s)
        finally:
            left = session.kill()
            code = runner.wait()
    if left:
        _say(f"ended {left} processes that the launcher had left")
    return verdict(code, session.failures, bool(requests.received), succeeded(), stage)


def _wait(session: _Session, requests: _StopRequests, grace_s: float) -> None:
    """Return when the session is over, or when what is left of it has had its time."""
    deadline = float("inf")
    while session.is_alive():
        session.observe()
        now = time.monotonic()
        if requests.received:
            session.ask_to_stop()
            if deadline > now + grace_s:
                deadline = now + grace_s
                _say(f"stopping after this step, within {grace_s:.0f} s; Ctrl-C ends it at once")
            if signal.SIGINT in requests.received[1:]:
                return
        elif session.has_lost():
            deadline = min(deadline, now + LOST_GRACE_S)
        if now > deadline:
            return
        time.sleep(_POLL_S)


def verdict(code: int, failures: dict[str, int], stop_requested: bool, done: bool, stage: Path) -> int:
    """The exit code of a job, or WorkerLostError.

    code: the launcher's. failures: rank -> exit code (negative: signal) of the ranks seen to fail first; the launcher
    passes on one code only, which may be that of a peer that died of the first failure.
    """
    own = [c for c in (*failures.values(), code) if c in OWN_CODES]
    if done and not own:
        if code:
            _say(f"{stage} is complete; ranks failed afterwards: {_named(failures, code)}")
        return 0
    lost = any(failure < 0 for failure in failures.values()) or code == 0  # 0: `launch` itself is gone
    if own and not lost:
        return min(own)  # an error before "stopped": the peers of a failed rank are told to stop
    if stop_requested:
        return STOPPED
    fix = f"The same command resumes. The end of {stage / 'log.txt'}:" + "".join(_last_lines(stage / "log.txt"))
    raise WorkerLostError(f"{_named(failures, code)}; the stage has no result", where=str(stage), fix=fix)


def _say(text: str) -> None:
    with suppress(OSError):  # a terminal that was closed must not keep the ranks from their checkpoint
        print(text, file=sys.stderr, flush=True)


def _named(failures: dict[str, int], code: int) -> str:
    if failures:
        return ", ".join(f"rank {rank} {_ending(failure)}" for rank, failure in sorted(failures.items()))
    if code > 128 and 256 - code in list(signal.Signals):  # `launch` exits with a rank's negative code
        return f"a rank {_ending(code - 256)}"
    return f"the launcher {_ending(code)} and no rank said why"


def _ending(code: int) -> str:
    if code >= 0:
        return f"exited with code {code}"
    hint = ", often for want of memory" if code == -signal.SIGKILL else ""
    return f"was killed ({signal.Signals(-code).name}{hint})"


def _last_lines(log: Path) -> Iterator[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4000))
            lines = file.read().decode(errors="replace").splitlines()[-3:]
    except OSError:
        lines = ["(no log yet)"]
    return (f"\n    {line}" for line in lines)


class _StopRequests:
    """Collects the signals that ask this process to stop, while it waits; those that are ignored stay ignored."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> _StopRequests:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        listened = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in listened}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Process:
    pid: int
    state: str
    parent: int
    session: int
    start: int  # clock ticks since boot; with the pid, an identity
    status: int  # as from wait(), once the process has ended

    @property
    def ended(self) -> bool:
        return self.state in "ZX"


_GONE = _Process(pid=0, state="X", parent=0, session=0, start=0, status=0)


def _stat(pid: int) -> _Process:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return _GONE
    return _Process(pid, fields[0], int(fields[1]), int(fields[3]), int(fields[19]), int(fields[49]))


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


class _Session:
    """The processes of the session that the runner leads. The runner is reaped last: until then its pid stays ours."""

    def __init__(self, leader: int) -> None:
        self._leader = leader
        self._ranks: dict[str, int] = {}  # rank -> pid
        self._expected = float("inf")
        self._next_scan = 0.0
        self._told: set[int] = set()
        self.failures: dict[str, int] = {}  # the first ranks that failed -> exit code, negative: signal

    def members(self) -> list[_Process]:
        """The processes that are still running."""
        found = [_stat(int(name)) for name in os.listdir("/proc") if name.isdecimal()]
        return sorted((p for p in found if p.session == self._leader and not p.ended), key=lambda p: p.pid)

    def is_alive(self) -> bool:
        """Whether the runner, or any other process of the session, is still running."""
        return not _stat(self._leader).ended or bool(self.members())

    def observe(self) -> None:
        """Find the ranks that have started, and note how the first of them failed: the launcher tells of one only."""
        if len(self._ranks) < self._expected and time.monotonic() >= self._next_scan:
            self._scan()
        if not self.failures:
            ended = {rank: process for rank, pid in self._ranks.items() if (process := _stat(pid)).ended}
            codes = {rank: os.waitstatus_to_exitcode(process.status) for rank, process in ended.items()}
            self.failures = {rank: code for rank, code in codes.items() if code}

    def _scan(self) -> None:
        self._next_scan = time.monotonic() + _SCAN_S
        for process in self.members():
            environment = _environment(process.pid)
            if {"RANK", "LOCAL_SIZE"} <= environment.keys() and "RANK" not in _environment(process.parent):
                self._ranks.setdefault(environment["RANK"], process.pid)
                self._expected = int(environment["LOCAL_SIZE"])

    def has_lost(self) -> bool:
        """Whether a rank has failed, or the runner is gone while others are still running."""
        return any(code != STOPPED for code in self.failures.values()) or _stat(self._leader).ended

    def ask_to_stop(self) -> None:
        """Send SIGTERM once to every rank, or to the launcher as long as it has started none."""
        self._scan()
        for pid in list(self._ranks.values()) or [p.pid for p in self.members()]:
            if pid not in self._told:
                self._told.add(pid)
                _send(pid, signal.SIGTERM)

    def kill(self) -> int:
        """Kill whatever is still running. Returns how many processes that was."""
        killed: set[int] = set()
        deadline = time.monotonic() + _KILL_S
        while (members := self.members()) and time.monotonic() < deadline:
            for process in members:
                killed.add(process.pid)
                _send(process.pid, signal.SIGKILL)
            time.sleep(0.02)
        return len(killed)


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


# ---- in a rank -------------------------------------------------------------------------------------------------------


def die_with_parent(grace_s: float = LOST_GRACE_S) -> None:
    """Call this first in a rank: when its parent, or the `launch` that started it all, is gone, so is the rank.

    It gets SIGTERM, the request to stop; a rank that hangs is killed `grace_s` seconds later. SIGTERM may come more
    than once (`launch` of DeepSpeed sends it too), so a handler must not take a second one for more than the first.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, args=(parent, grace_s), name="parents", daemon=True).start()


def stopped_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: a process that gets SIGTERM, the request to stop, when the thread that started it is gone.

    Without it, what a killed pipeline has started would go on, and hold its stage against the same command.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: after a fork as little as possible

    def ask() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return ask


def _watch(parent: int, grace_s: float) -> None:
    host, pid, start = os.environ[LAUNCHER].split(":") if LAUNCHER in os.environ else ("", "0", "0")
    here = host == socket.gethostname()
    while os.getppid() == parent and not (here and _is_gone(int(pid), int(start))):
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_gone(pid: int, start: int) -> bool:
    process = _stat(pid)
    return process.ended or process.start != start
