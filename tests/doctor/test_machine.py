"""Each check sees what it is there for: the good case on this machine, the bad one staged."""

from __future__ import annotations

import mmap
import os
import resource
import socket
import subprocess
import sys

import pytest

from rlhf.doctor import machine

GIB = 2**20  # in the kilobytes of /proc/meminfo


@pytest.mark.parametrize(
    ("threads", "state"), [(None, "ok"), ("1", "ok"), ("100000", "warning"), ("many", "failed"), ("0", "failed")]
)
def test_threads(threads, state):
    assert machine.check_cpu({"OMP_NUM_THREADS": threads} if threads else {}).state == state


def test_memory_is_that_of_the_container(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: {64 * GIB} kB\nMemAvailable: {60 * GIB} kB\n")
    assert machine.check_memory(meminfo, tmp_path).found == "60 GiB of 64 GiB free"
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.check_memory(meminfo, tmp_path).found == "60 GiB of 64 GiB free"
    (tmp_path / "memory.max").write_text(f"{12 * 2**30}\n")
    (tmp_path / "memory.current").write_text(f"{23 * 2**29}\n")
    found = machine.check_memory(meminfo, tmp_path)
    assert found.state == "warning" and found.found == "512 MiB of 12 GiB free"


def limited(soft: int, size: int = resource.RLIM_INFINITY) -> str:
    """The state that a process with such limits finds."""
    code = (
        "import resource; from rlhf.doctor.machine import check_files\n"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, resource.RLIM_INFINITY))\n"
        "print(check_files().state, end='')"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_limits_of_files():
    assert (limited(1024), limited(256), limited(1024, 2**20)) == ("ok", "warning", "failed")


@pytest.mark.parametrize(("mask", "state"), [("0022", "ok"), ("0077", "ok"), ("0000", "warning"), ("0222", "failed")])
def test_umask(tmp_path, mask, state):
    status = tmp_path / "status"
    status.write_text(f"Name:\tpython\nUmask:\t{mask}\nState:\tR\n")
    assert machine.check_umask(status).state == state
    assert machine.check_umask().found == f"{current_umask():04o}"


def current_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_leftovers_in_shared_memory_are_those_that_nobody_uses(tmp_path):
    assert machine.check_shared_memory(tmp_path).state == "ok"
    for name in ("torch_1_2_3", "deepspeed_allreduce_buffer_0", "nccl-abc", "somebody-else"):
        (tmp_path / name).write_bytes(b"x" * 4096)
    (tmp_path / "torch_folder").mkdir()
    with (tmp_path / "torch_1_2_3").open("r+b") as opened, (tmp_path / "nccl-abc").open("r+b") as mapped:
        view = mmap.mmap(mapped.fileno(), 4096)
        mapped.close()
        left = machine.leftovers(tmp_path)
        assert [path.name for path in left] == ["deepspeed_allreduce_buffer_0"] and opened
        view.close()
    assert len(machine.leftovers(tmp_path)) == 3
    found = machine.check_shared_memory(tmp_path)
    assert found.state == "warning" and "3 files of ended processes" in found.found and found.fix.startswith("rm ")
    assert machine.check_shared_memory(tmp_path / "nothing").state == "failed"


def test_ports_and_names_of_this_machine():
    assert machine.check_ports().state == "ok"
    assert socket.gethostname() in machine.check_host_name().found


@pytest.mark.parametrize(
    ("wanted", "exact", "found"),
    [
        ("lo", True, True),
        ("eth", True, False),
        ("eth", False, True),
        ("=eth", False, False),
        ("=eth0", False, True),
        ("ib", False, False),
        ("^lo", False, True),
        ("^lo,eth", False, False),
        ("^=eth", False, True),
        ("ib,eth0", False, True),
    ],
)
def test_names_of_interfaces(wanted, exact, found):
    assert machine.names_interface(wanted, ["lo", "eth0"], exact=exact) == found


def test_the_environment_is_that_of_no_launcher():
    assert [finding.state for finding in machine.check_interfaces({})] == ["ok"]
    wrong = list(machine.check_interfaces({"GLOO_SOCKET_IFNAME": "no-such", "RANK": "0"}))
    assert [finding.state for finding in wrong] == ["failed", "failed"] and "unset RANK" in wrong[1].fix
    assert [finding.state for finding in machine.check_interfaces({"NCCL_SOCKET_IFNAME": "lo"})] == ["ok", "ok"]


def test_the_hub_cache(tmp_path):
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    found = machine.check_hub({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert found.state == "ok" and "1 models" in found.found and "offline" in found.found
    assert "online" in machine.check_hub({"HF_HUB_CACHE": str(tmp_path / "new")}).found


def test_locks_of_killed_builds(tmp_path):
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    assert machine.check_extensions(environment).state == "ok"
    lock.touch()
    assert "1 being built" in machine.check_extensions(environment).found
    os.utime(lock, (0, 0))
    found = machine.check_extensions(environment)
    assert found.state == "warning" and str(lock) in found.fix
