"""Jobs of two ranks through the real launcher, and what is decided about them."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf import launch
from rlhf.errors import RecipeError, WorkerLostError
from rlhf.launch import Ending, World, launch_command, pick_world_size, rank_environment, verdict

HELPERS = Path(__file__).parent / "launch"
ROOT = Path(__file__).parents[1]
MARK = "RLHF_TEST_FOLDER"
WATCHDOG_S = 4  # of parent.py


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", launch.LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_one_node_never_picks_up_a_host_file_and_uses_the_given_port(bare: pytest.MonkeyPatch) -> None:
    command = launch_command(["ppo", "a b.yaml"], World(gpus=8, master_port=4321))
    assert command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert command[-4:] == ["--module", "rlhf", "ppo", "a b.yaml"]
    assert option(command, "--num_gpus") == "8"
    assert option(command, "--hostfile") == "/nonexistent"
    assert option(command, "--master_port") == "4321"
    assert "--no_local_rank" in command and "--num_nodes" not in command


def test_ports_are_free_and_differ(bare: pytest.MonkeyPatch) -> None:
    ports = {option(launch_command(["sft"], World(gpus=2)), "--master_port") for _ in range(5)}
    assert len(ports) > 1 and all(1024 < int(port) < 65536 for port in ports)


def test_several_nodes_need_a_host_file(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--hostfile"):
        launch_command(["sft"], World(gpus=2, num_nodes=2))
    with pytest.raises(RecipeError, match="found none at"):
        launch_command(["sft"], World(gpus=2, num_nodes=2, hostfile=tmp_path / "hosts"))
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=2\n")
    command = launch_command(["sft"], World(gpus=2, num_nodes=2, hostfile=hosts))
    assert option(command, "--hostfile") == str(hosts) and option(command, "--num_nodes") == "2"
    assert "--num_gpus" not in launch_command(["sft"], World(gpus=None, hostfile=hosts))


def test_visible_devices_are_respected(bare: pytest.MonkeyPatch) -> None:
    bare.setenv("CUDA_VISIBLE_DEVICES", "2,3,5")
    command = launch_command(["sft"], World(gpus=2))
    assert option(command, "--include") == "localhost:2,3" and "--num_gpus" not in command
    assert "--num_gpus" in launch_command(["sft"], World(gpus=2, cpu=True))
    with pytest.raises(RecipeError, match="at least 4 devices"):
        launch_command(["sft"], World(gpus=4))
    bare.setenv("CUDA_VISIBLE_DEVICES", "GPU-1f2e,GPU-aa")
    with pytest.raises(RecipeError, match="numbers"):
        launch_command(["sft"], World(gpus=2))


def test_ranks_share_the_cores_unless_told_otherwise(bare: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    assert rank_environment(World(gpus=2))["OMP_NUM_THREADS"] == str(max(1, cores // 2))
    assert rank_environment(World(gpus=10_000, cpu=True))["OMP_NUM_THREADS"] == "1"
    assert rank_environment(World(gpus=1, cpu=True))["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in rank_environment(World(gpus=1))
    bare.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in rank_environment(World(gpus=2))


def test_ranks_of_one_node_talk_over_loopback_unless_told_otherwise(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        bare.delenv(name, raising=False)
    assert [rank_environment(World(gpus=2))[name] for name in names] == ["lo", "lo"]
    assert not set(names) & rank_environment(World(gpus=2, hostfile=tmp_path / "hosts")).keys()
    bare.setenv("NCCL_SOCKET_IFNAME", "eth0")
    assert "NCCL_SOCKET_IFNAME" not in rank_environment(World(gpus=2))


def test_tools_beside_the_interpreter_are_on_the_path(bare: pytest.MonkeyPatch) -> None:
    tools = str(Path(sys.executable).parent)
    bare.setenv("PATH", "/usr/bin")
    assert rank_environment(World(gpus=1))["PATH"] == f"{tools}:/usr/bin"
    bare.setenv("PATH", f"/usr/bin:{tools}")
    assert "PATH" not in rank_environment(World(gpus=1))


def test_the_printed_command_is_one_for_a_shell() -> None:
    line = launch.printable(["python", "a b", "c'd"], {"A": "x y", "PATH": "/venv/bin:/usr/bin"})
    script = f'python() {{ printf "%s|" "$@" "$A" "${{PATH%%:*}}"; }}; {line}'
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, env={"PATH": "/bin"})
    assert run.stdout == f"a b|c'd|x y|{Path(sys.executable).parent}|"


def test_world_size() -> None:
    assert pick_world_size(None, 1) == 1
    assert pick_world_size(8, 2) == 16
    for gpus, nodes in ((0, 1), (-1, 1), (1, 0)):
        with pytest.raises(RecipeError, match="at least 1"):
            pick_world_size(gpus, nodes)


def test_a_worker_is_known_by_its_environment(bare: pytest.MonkeyPatch) -> None:
    assert not launch.is_worker() and launch.launcher_pid() is None
    bare.setenv("RANK", "0")
    assert not launch.is_worker()
    bare.setenv("WORLD_SIZE", "2")
    bare.setenv(launch.LAUNCHER, "host:123:456")
    assert launch.is_worker() and launch.launcher_pid() == 123


def test_the_kernel_tells_a_rank_of_its_parents_death() -> None:
    script = (
        "import ctypes; from rlhf.launch import die_with_parent; die_with_parent(); signal = ctypes.c_int()\n"
        "ctypes.CDLL(None).prctl(2, ctypes.byref(signal)); print(signal.value)"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == f"{signal.SIGTERM:d}\n"


# ---- what became of it -----------------------------------------------------------------------------------------------


def ended(code: int, failures: dict[str, int], **more: dict) -> Ending:
    return Ending(code, failures, **more)


def test_success_needs_the_result_not_only_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdict(ended(0, {}), False, True, tmp_path) == 0
    with pytest.raises(WorkerLostError, match="has no result"):
        verdict(ended(0, {}), False, False, tmp_path)
    assert not capsys.readouterr().err
    assert verdict(ended(250, {"1": -6}), False, True, tmp_path) == 0
    assert "rank 1 was killed (SIGABRT)" in capsys.readouterr().err


@pytest.mark.parametrize("code", sorted(launch.OWN_CODES - {launch.LOST, launch.STOPPED}))
def test_codes_of_ours_are_passed_on(tmp_path: Path, code: int) -> None:
    assert verdict(ended(code, {}), False, False, tmp_path) == code
    assert verdict(ended(1, {"0": code, "1": 1}), False, False, tmp_path) == code
    assert verdict(ended(10, {"0": 10, "1": code}), False, False, tmp_path) == code, "a lost peer is no reason"
    assert verdict(ended(75, {"0": 75, "1": code}), False, False, tmp_path) == code, "an error goes before a stop"
    assert verdict(ended(75, {"0": 75, "1": code}), True, False, tmp_path) == code


def test_a_requested_stop_is_a_stop_however_the_ranks_ended(tmp_path: Path) -> None:
    assert verdict(ended(241, {"0": -15}), True, False, tmp_path) == 75
    assert verdict(ended(0, {}), True, False, tmp_path) == 75
    assert verdict(ended(-9, {"0": -9, "1": -9}), True, False, tmp_path) == 75
    assert verdict(ended(75, {}), False, False, tmp_path) == 75, "somebody asked the ranks themselves"
    assert verdict(ended(75, {"0": 75, "1": 75}), False, False, tmp_path) == 75


@pytest.mark.parametrize(
    ("code", "failures", "more", "said"),
    [
        (
            1,
            {"1": -9, "0": 1},
            {},
            r"rank 0 exited with code 1, rank 1 was killed \(SIGKILL, often for want of memory\)",
        ),
        (75, {"1": -11, "0": 75}, {}, r"rank 1 was killed \(SIGSEGV\)"),
        (1, {"0": 1}, {}, "rank 0 exited with code 1"),
        (1, {"1": 1, "0": 75}, {}, "rank 1 exited with code 1"),
        (10, {"1": 1, "0": 10}, {}, "rank 0 waited for another rank in vain, rank 1 exited with code 1;"),
        (247, {}, {}, r"a rank was killed \(SIGKILL"),
        (1, {}, {}, "the launcher exited with code 1 and no rank said why"),
        (0, {"0": 75}, {}, "has no result"),
        (10, {}, {}, "the launcher waited for another rank in vain"),
        (
            10,
            {"1": 10},
            {"doing": {"0": "sampling", "1": "the update"}},
            "rank 1 waited for another rank in vain in the update, rank 0 was still running in sampling;",
        ),
        (
            -9,
            {},
            {"frozen": {"1": 30.4}, "doing": {"0": "sampling", "1": "the update"}},
            "rank 1 gave no sign of life for 30 s in the update;",
        ),
    ],
)
def test_anything_else_is_a_lost_worker_with_a_name(
    tmp_path: Path, code: int, failures: dict[str, int], more: dict, said: str
) -> None:
    (tmp_path / "log.txt").write_text(
        "".join(f"line {i}\n" for i in range(10)) + "last \udcff".encode("utf-8", "replace").decode()
    )
    with pytest.raises(WorkerLostError, match=said) as caught:
        verdict(ended(code, failures, **more), False, False, tmp_path)
    assert caught.value.exit_code == 10
    assert str(caught.value).splitlines()[-3:] == ["    line 8", "    line 9", "    last ?"]


# ---- real jobs -------------------------------------------------------------------------------------------------------


class Job:
    """A running launch, and the ways to look at it."""

    def __init__(self, folder: Path, behaviours: tuple[str, ...]) -> None:
        self.folder = folder
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}", MARK: str(folder)}
        for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", launch.LAUNCHER):
            environment.pop(name, None)
        command = [sys.executable, str(HELPERS / "parent.py"), str(folder), *behaviours]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, *names: str) -> None:
        until(lambda: all((self.folder / name).exists() for name in names), 60)

    def processes(self) -> dict[int, str]:
        """pid -> command line of everything that the job has started and that still runs, the parent not counted."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and f"{MARK}={self.folder}".encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
        found.pop(self.process.pid, None)
        return found

    def pid_of(self, part: str) -> int:
        (pid,) = [pid for pid, command in self.processes().items() if part in command]
        return pid

    def pid_of_rank(self, rank: int) -> int:
        found = [p for p, c in self.processes().items() if "-m ranks" in c and "deepspeed" not in c]
        (pid,) = [p for p in found if f"\0RANK={rank}\0".encode() in Path(f"/proc/{p}/environ").read_bytes()]
        return pid

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextmanager
def job(tmp_path: Path, *behaviours: str) -> Iterator[Job]:
    folder = tmp_path / "läuf 1"
    folder.mkdir()
    running = Job(folder, behaviours)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()
        for pid in running.processes():
            os.kill(pid, signal.SIGKILL)


@pytest.mark.distributed
def test_two_ranks_run_and_their_words_come_through(tmp_path: Path) -> None:
    with job(tmp_path, "done", "done") as running:
        code, out, err = running.finish()
        assert code == 0, err
        assert sorted(out.splitlines()) == ["rank 0 speaks", "rank 1 speaks"]
        (printed,) = err.splitlines()
        words = shlex.split(printed)
        assert words[words.index("--module") :] == ["--module", "ranks", str(running.folder), "done", "done"]
        assert {"OMP_NUM_THREADS=1", "DS_ACCELERATOR=cpu"} <= set(words[: words.index(sys.executable)])
        facts = json.loads((running.folder / "started-1").read_text())
        assert facts["folder_mode"] == 0o700 and not Path(facts["folder"]).exists()
        assert facts["argv"][1:] == [str(running.folder), "done", "done"]
        assert facts["worker"] and facts["launcher"] == running.process.pid and facts["WORLD_SIZE"] == "2"
        assert not running.processes()


@pytest.mark.distributed
def test_the_code_of_a_failing_rank_is_passed_on_and_a_stubborn_peer_ended(tmp_path: Path) -> None:
    with job(tmp_path, "stubborn", "exit3") as running:
        code, _, err = running.finish()
        assert code == 3, err
        assert not running.processes()


@pytest.mark.distributed
def test_a_killed_rank_is_named(tmp_path: Path) -> None:
    with job(tmp_path, "stubborn", "wait") as running:
        (running.folder / "log.txt").write_text("step 7 of 9\n")
        running.wait_for("started-0", "started-1")
        time.sleep(1.5)
        os.kill(running.pid_of_rank(1), signal.SIGKILL)
        code, out, _ = running.finish()
        assert code == 10
        assert "SIGKILL" in out and "step 7 of 9" in out and str(running.folder) in out
        assert not running.processes()


@pytest.mark.distributed
def test_a_frozen_rank_is_named_and_the_job_ended(tmp_path: Path) -> None:
    with job(tmp_path, "wait", "wait") as running:
        running.wait_for("started-0", "started-1")
        time.sleep(1.5)
        os.kill(running.pid_of_rank(1), signal.SIGSTOP)
        started = time.monotonic()
        code, out, _ = running.finish()
        assert code == 10 and time.monotonic() - started < WATCHDOG_S + 5, out
        assert re.search(r"rank 1 gave no sign of life for [45] s in a nap; the stage has no result", out), out
        assert not running.processes()


@pytest.mark.distributed
def test_a_request_to_stop_reaches_every_rank_once_and_ends_resumable(tmp_path: Path) -> None:
    with job(tmp_path, "polite", "polite") as running:
        running.wait_for("started-0", "started-1")
        running.process.send_signal(signal.SIGTERM)
        code, _, err = running.finish()
        assert code == 75, err
        assert (running.folder / "asked-0").exists() and (running.folder / "asked-1").exists()
        assert "stopping" in err and "Traceback" not in err
        assert not running.processes()


@pytest.mark.distributed
def test_a_second_interrupt_ends_everything_at_once(tmp_path: Path) -> None:
    with job(tmp_path, "stubborn", "stubborn") as running:
        running.wait_for("started-0", "started-1")
        running.process.send_signal(signal.SIGINT)
        running.wait_for("asked-0", "asked-1")  # two signals that wait together arrive as one
        assert running.process.poll() is None
        started = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        code, _, _ = running.finish()
        assert code == 75 and time.monotonic() - started < 5
        assert not running.processes()


@pytest.mark.distributed
def test_a_killed_launcher_is_not_taken_for_success(tmp_path: Path) -> None:
    with job(tmp_path, "stubborn", "wait") as running:
        running.wait_for("started-0", "started-1")
        os.kill(running.pid_of("deepspeed.launcher.launch"), signal.SIGKILL)
        code, out, _ = running.finish()
        assert code == 10 and "has no result" in out
        assert not running.processes()


@pytest.mark.distributed
def test_ranks_end_when_the_waiting_command_is_killed(tmp_path: Path) -> None:
    with job(tmp_path, "wait", "polite") as running:
        running.wait_for("started-0", "started-1")
        running.process.kill()
        until(lambda: not running.processes(), 15)
        assert (running.folder / "asked-1").exists()
        assert not Path(json.loads((running.folder / "started-1").read_text())["folder"]).exists()
