"""Start a stage on several devices through the `deepspeed` launcher, and leave nothing of it behind.

    rlhf ppo ... --gpus 8          this process: holds the stage folder, waits
    `- deepspeed runner            leader of a session of its own
       `- deepspeed launch         one per node; ends the other ranks where one fails
          |- rank 0                python -m rlhf ppo ..., with RANK and WORLD_SIZE in the environment
          `- rank 1

What the launcher leaves open is closed here. A request to stop (SIGINT, SIGTERM, SIGHUP) goes to the ranks only, which
finish their step, write a checkpoint and exit 75; the runner would die of it and `launch` would give them 30 seconds.
Success is the stage's manifest: a runner whose `launch` was killed exits 0. A rank that is frozen is found by its
silence (`rlhf.pulse`). Whatever is left of the session at the end is ended, and a rank ends itself when its parents are
gone (`die_with_parent`).

On one node nothing listens but on the loopback interface, and the ranks find each other through a file in a folder
that only this user can enter. On several nodes they do so over the network, and only the collectives' own patience
tells of a frozen one. There DeepSpeed carries only those environment variables to the others whose names begin with
PYTHON or NCCL; further ones belong in `.deepspeed_env` (see its documentation).
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from rlhf import pulse
from rlhf.errors import RecipeError, WorkerLostError
from rlhf.processes import STOPPED, Session, stat

LOST = WorkerLostError.exit_code
OWN_CODES = frozenset({2, 3, 4, 5, 6, 7, 8, 9, LOST, STOPPED})
GRACE_S = 600.0  # for ranks that were asked to stop: one step and one checkpoint, of a large model too
LOST_GRACE_S = 10.0  # for ranks whose peer or parent is gone: nothing they wait for will come
LAUNCHER_GRACE_S = 30.0  # for a launcher whose ranks have all ended; one that is frozen would wait for ever
LAUNCHER = "PYTHON_RLHF_LAUNCHER"  # host:pid:start of this process; the prefix lets it reach other nodes
_POLL_S = 0.1  # `launch` looks once a second and then reaps a dead rank; how it died is seen before
_PR_SET_PDEATHSIG = 1
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


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
    """What the ranks need in their environment beside what is there.

    Tools, threads that share the cores, and on one node the loopback interface to talk over.
    """
    tools = str(Path(sys.executable).parent)  # ninja, and deepspeed's own scripts
    path = os.environ["PATH"] if "PATH" in os.environ else os.defpath
    added = {} if tools in path.split(os.pathsep) else {"PATH": tools + os.pathsep + path}
    if "OMP_NUM_THREADS" not in os.environ:
        added["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // pick_world_size(world.gpus, 1)))
    if world.hostfile is None:
        added |= {name: value for name, value in _LOOPBACK.items() if name not in os.environ}
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
    watchdog_s: float = pulse.WATCHDOG_S,
) -> int:
    """Run `python -m MODULE ARGV` on every device, wait, and return the exit code: 0 only if `succeeded()`.

    An exit code of ours (2 to 9, 75) is passed on. Anything else raises WorkerLostError, which names the rank where it
    is known and ends with the last lines of the stage's log.txt. A first SIGINT, SIGTERM or SIGHUP asks the ranks to
    stop; `grace_s` seconds later, or at a further SIGINT, they are killed. So they are where one of them has given no
    sign of life for `watchdog_s` seconds. In good times only the command is printed.
    """
    command, added = launch_command(argv, world, module), rank_environment(world)
    _say(printable(command, added))
    environment = {**os.environ, **added, LAUNCHER: f"{socket.gethostname()}:{os.getpid()}:{stat(os.getpid()).start}"}
    with _StopRequests() as requests, tempfile.TemporaryDirectory(prefix="rlhf-", ignore_cleanup_errors=True) as folder:
        if world.hostfile is None:
            environment[pulse.FOLDER] = folder
            environment.pop("CUDA_VISIBLE_DEVICES", None)  # said by --include; both at once make the runner complain
        runner = subprocess.Popen(command, env=environment, start_new_session=True)
        session = Session(runner.pid, pulse.Pulses(Path(folder)))
        frozen: dict[str, float] = {}
        try:
            frozen = _wait(session, requests, grace_s, watchdog_s)
        finally:
            left = session.kill()
            code = runner.wait()
        ending = Ending(code, session.failures, frozen, session.doing())
    if left:
        _say(f"ended {left} processes that the launcher had left")
    return verdict(ending, bool(requests.received), succeeded(), stage)


def _wait(session: Session, requests: _StopRequests, grace_s: float, watchdog_s: float) -> dict[str, float]:
    """Return when the session is over, or when what is left of it has had its time; the ranks that were frozen then."""
    deadline = float("inf")
    while session.is_alive():
        session.observe()
        if frozen := session.frozen(watchdog_s):
            return frozen
        now = time.monotonic()
        if requests.received:
            session.ask_to_stop()
            if deadline > now + grace_s:
                deadline = now + grace_s
                _say(f"stopping after this step, within {grace_s:.0f} s; Ctrl-C ends it at once")
            if signal.SIGINT in requests.received[1:]:
                break
        elif session.has_lost():
            deadline = min(deadline, now + LOST_GRACE_S)
        elif session.has_ended():
            deadline = min(deadline, now + LAUNCHER_GRACE_S)
        if now > deadline:
            break
        time.sleep(_POLL_S)
    return {}


@dataclass(frozen=True)
class Ending:
    """How a job ended.

    code: the launcher's, which passes on that of one rank; it may be a peer that died of the first failure. failures:
    rank -> exit code (negative: signal) of the ranks seen to fail first. frozen: rank -> seconds of silence. doing:
    what ranks have told last.
    """

    code: int
    failures: dict[str, int]
    frozen: dict[str, float] = field(default_factory=dict)
    doing: dict[str, str] = field(default_factory=dict)


def verdict(ending: Ending, stop_requested: bool, done: bool, stage: Path) -> int:
    """The exit code of a job, or WorkerLostError."""
    codes = [*ending.failures.values(), ending.code]
    if done and not OWN_CODES.intersection(codes):
        if ending.code:
            _say(f"{stage} is complete; ranks failed afterwards: {_named(ending)}")
        return 0
    killed = any(code < 0 for code in ending.failures.values()) or ending.frozen
    lost = killed or ending.code == 0  # 0: `launch` itself is gone
    # A rank that has lost another, or is told to stop, says nothing of the reason: another one does.
    reasons = [code for code in codes if code in OWN_CODES - {LOST, STOPPED}]
    if reasons and not lost:
        return min(reasons)
    if stop_requested or (not lost and {STOPPED} == {code for code in codes if code}):
        return STOPPED
    fix = f"The same command resumes. The end of {stage / 'log.txt'}:" + "".join(_last_lines(stage / "log.txt"))
    raise WorkerLostError(f"{_named(ending)}; the stage has no result", where=str(stage), fix=fix)


def _say(text: str) -> None:
    with suppress(OSError):  # a terminal that was closed must not keep the ranks from their checkpoint
        print(text, file=sys.stderr, flush=True)


def _named(ending: Ending) -> str:
    """Who failed, how and where; and where the others were if all that is known is that somebody waited in vain."""
    told = {rank: f"gave no sign of life for {seconds:.0f} s" for rank, seconds in ending.frozen.items()}
    told |= {rank: _ending(code) for rank, code in ending.failures.items()}
    parts = [f"rank {rank} {how}{_during(ending, rank)}" for rank, how in sorted(told.items())]
    if parts and not ending.frozen and set(ending.failures.values()) == {LOST}:
        others = sorted(ending.doing.keys() - told.keys())
        parts += [f"rank {rank} was still running{_during(ending, rank)}" for rank in others]
    if parts:
        return ", ".join(parts)
    code = ending.code
    if code > 128 and 256 - code in list(signal.Signals):  # `launch` exits with a rank's negative code
        return f"a rank {_ending(code - 256)}"
    return f"the launcher {_ending(code)} and no rank said why"


def _during(ending: Ending, rank: str) -> str:
    return f" in {ending.doing[rank]}" if rank in ending.doing else ""


def _ending(code: int) -> str:
    if code == LOST:
        return "waited for another rank in vain"
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


# ---- in a rank -------------------------------------------------------------------------------------------------------


def die_with_parent(grace_s: float = LOST_GRACE_S) -> None:
    """Call this first in a rank: when its parent, or the `launch` that started it all, is gone, so is the rank.

    It gets SIGTERM, the request to stop; a rank that hangs is killed `grace_s` seconds later. SIGTERM may come more
    than once (`launch` of DeepSpeed sends it too), so a handler must not take a second one for more than the first.
    Until then the rank gives signs of life.
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
        pulse.beat()
        time.sleep(pulse.BEAT_S)
    if here and _is_gone(int(pid), int(start)):
        pulse.clear()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_gone(pid: int, start: int) -> bool:
    process = stat(pid)
    return process.ended or process.start != start
