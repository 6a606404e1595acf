"""The machine, seen without torch: processors, memory, limits, shared memory, network names, caches, environment."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from rlhf.doctor.finding import Finding, mebibytes

SHM = Path("/dev/shm")
# What torch, DeepSpeed, NCCL and multiprocessing put there and leave behind when they are killed.
SHM_NAMES = ("torch_*", "deepspeed_*", "nccl-*", "sem.mp-*", "psm_*")
RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SHM_ENOUGH = 64 * 2**20  # NCCL needs some tens of MiB per device
_FILES_ENOUGH = 1024
_LOCK_AGE_S = 600.0  # no extension builds longer
_RESOLVE_S = 2.0


def check_cpu(environment: Mapping[str, str] = os.environ) -> Finding:
    """Cores that this process may use, and the threads that a rank will have."""
    cores = len(os.sched_getaffinity(0))
    if "OMP_NUM_THREADS" not in environment:
        return Finding.of("cpu", f"{cores} cores, divided among the ranks of a node")
    text = environment["OMP_NUM_THREADS"]
    if not text.isdecimal() or int(text) == 0:
        fix = "Unset it, or set it to a number of threads: each rank then gets its share of the cores."
        return Finding.of("cpu", f"expected OMP_NUM_THREADS to be a number, found {text!r}", failed=fix)
    threads = f"{cores} cores, OMP_NUM_THREADS={text}"
    fix = "More threads than cores are slow: unset OMP_NUM_THREADS."
    return Finding.of("cpu", threads, warning=fix if int(text) > cores else None)


def check_memory(meminfo: Path = Path("/proc/meminfo"), limits: Path = Path("/sys/fs/cgroup")) -> Finding:
    """Memory that is free, and the container's limit where it is lower."""
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit = limits / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()).isdecimal() and int(text) < total:
        total = int(text)
        free = min(free, total - int((limits / "memory.current").read_text()))
    fix = "End what takes it: the tiniest run takes about 1 GiB per rank."
    return Finding.of("memory", f"{mebibytes(free)} of {mebibytes(total)} free", warning=fix if free < 2**30 else None)


def check_files() -> Finding:
    """How many files a process may hold open, and how large one may become."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if largest != resource.RLIM_INFINITY:
        fix = "A checkpoint that is larger cannot be written: ulimit -f unlimited"
        return Finding.of("limits", f"files of at most {mebibytes(largest)}", failed=fix)
    found = f"{soft:,} open files, files of any size"
    fix = f"Loaders and ranks hold many: ulimit -n {min(max(hard, soft), 65536) if hard > 0 else 65536}"
    return Finding.of("limits", found, warning=fix if soft < _FILES_ENOUGH and soft != resource.RLIM_INFINITY else None)


def check_umask(status: Path = Path("/proc/self/status")) -> Finding:
    """Who may read and write what a run makes."""
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    mask = int(fields["Umask"], 8)
    if mask & 0o700:
        fix = "A run could not read its own files: umask 022"
        return Finding.of("umask", f"{mask:04o}", failed=fix)
    fix = "Others may write into run directories: umask 022, or 077 to keep them private"
    return Finding.of("umask", f"{mask:04o}", warning=fix if not mask & 0o002 else None)


def check_shared_memory(folder: Path = SHM) -> Finding:
    """Room for NCCL and data loaders, and what killed processes have left in it."""
    if not folder.is_dir():
        return Finding.of("shared memory", f"no {folder}", failed="Mount a tmpfs there; NCCL and gloo need it.")
    room = shutil.disk_usage(folder)
    found = f"{mebibytes(room.free)} of {mebibytes(room.total)} free in {folder}"
    if room.free < _SHM_ENOUGH:
        fix = "Several GPUs need more: docker run --shm-size=8g, or empty it."
        return Finding.of("shared memory", found, warning=fix)
    left = leftovers(folder)
    size = sum(path.stat().st_size for path in left)
    told = f"{found}; {len(left)} files of ended processes hold {mebibytes(size)}"
    names = " ".join(str(path) for path in left[:3]) + (" ..." if len(left) > 3 else "")
    return Finding.of("shared memory", told if left else found, warning=f"rm {names}" if left else None)


def leftovers(folder: Path) -> list[Path]:
    """Files of this user under the known names that no process has mapped or open."""
    found = [p for pattern in SHM_NAMES for p in folder.glob(pattern) if p.is_file() and p.stat().st_uid == os.getuid()]
    if not found:
        return []
    used = in_use()
    return sorted(path for path in found if str(path) not in used)


def in_use() -> set[str]:
    """Paths that processes have mapped or open, as far as this user may look."""
    paths: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to somebody else
            fields = (line.split(maxsplit=5) for line in (process / "maps").read_text(errors="replace").splitlines())
            paths |= {field[5] for field in fields if len(field) == 6}
            for link in list((process / "fd").iterdir()):
                with suppress(OSError):  # closed since
                    paths.add(os.readlink(link))
    return paths


def check_ports() -> Finding:
    """Whether ranks of one machine can meet: a port of the loopback interface that answers."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=2.0):
                pass
    except OSError as error:
        fix = "Several ranks meet there: bring the loopback interface up, and let no firewall close it."
        return Finding.of("ports", f"127.0.0.1 does not answer: {error}", failed=fix)
    return Finding.of("ports", f"127.0.0.1 answers, e.g. on {port}")


def check_host_name() -> Finding:
    """Whether this host's own name leads to it, which NCCL, gloo and the launcher use on several nodes."""
    name, answer = socket.gethostname(), list[str]()

    def ask() -> None:
        try:
            answer.extend(str(found[4][0]) for found in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP))
        except OSError as error:
            failure.append(str(error))

    failure: list[str] = []
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_RESOLVE_S)
    if answer:
        return Finding.of("host name", f"{name} is {answer[0]}")
    why = failure[0] if failure else f"no answer in {_RESOLVE_S:.0f} s"
    fix = f"Several nodes need it, and starts wait for it: add a line `127.0.1.1 {name}` to /etc/hosts."
    return Finding.of("host name", f"{name} has no address: {why}", warning=fix)


def check_interfaces(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """What the environment says to NCCL, gloo and the ranks."""
    there = [name for _, name in socket.if_nameindex()]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if variable in environment:
            wanted = environment[variable]
            fix = f"Name one that is there ({', '.join(there)}), or unset it."
            told = f"{variable}={wanted}"
            if not names_interface(wanted, there, exact=variable.startswith("GLOO")):
                yield Finding.of("interfaces", f"{told}, and this machine has no such interface", failed=fix)
            else:
                yield Finding.of("interfaces", told)
    ranks = [name for name in RANK_NAMES if name in environment]
    if ranks:
        fix = f"A stage would take itself for a rank of a launcher and wait for others: unset {' '.join(ranks)}"
        told = ", ".join(f"{name}={environment[name]}" for name in ranks)
        yield Finding.of("environment", told, failed=fix)
    else:
        yield Finding.of("environment", "no variable of a launcher is set")


def names_interface(wanted: str, there: list[str], *, exact: bool) -> bool:
    """Whether a list of names, NCCL's as prefixes (`=`: exact, `^`: all but these), leaves any of the interfaces."""
    if exact:
        return all(name in there for name in wanted.split(","))
    names = wanted.lstrip("^=").split(",")
    plain = wanted.startswith(("=", "^="))
    hit = [each for each in there if any(each == n if plain else each.startswith(n) for n in names)]
    return len(hit) < len(there) if wanted.startswith("^") else bool(hit)


def check_hub(environment: Mapping[str, str] = os.environ) -> Finding:
    """Where models and data of the hub are kept, and whether the hub is asked at all. Nothing is asked here."""
    if "HF_HUB_CACHE" in environment:
        cache = Path(environment["HF_HUB_CACHE"])
    elif "HF_HOME" in environment:
        cache = Path(environment["HF_HOME"], "hub")
    else:
        cache = Path("~/.cache/huggingface/hub").expanduser()
    offline = environment.get("HF_HUB_OFFLINE") in ("1", "true", "True", "TRUE", "ON", "YES")
    existing = next(path for path in (cache, *cache.parents) if path.is_dir())
    if not os.access(existing, os.W_OK) and not (offline and cache.is_dir()):
        fix = "Hub ids cannot be loaded: set HF_HOME to a folder that this user can write to."
        return Finding.of("hub cache", f"{existing} cannot be written to", warning=fix)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    mode = "offline: only what is in it can be named by a hub id" if offline else "online"
    free = mebibytes(shutil.disk_usage(existing).free)
    return Finding.of("hub cache", f"{cache}, {models} models, {free} free; {mode}")


def check_extensions(environment: Mapping[str, str] = os.environ) -> Finding:
    """Locks that a killed build of a torch extension has left: the next build of it would wait for ever."""
    if "TORCH_EXTENSIONS_DIR" in environment:
        cache = Path(environment["TORCH_EXTENSIONS_DIR"])
    else:
        cache = Path("~/.cache/torch_extensions").expanduser()
    now = time.time()
    locks = [p for pattern in ("*/lock", "*/*/lock") for p in cache.glob(pattern) if p.is_file()]
    stale = [path for path in locks if now - path.stat().st_mtime > _LOCK_AGE_S]
    if stale:
        fix = f"Builds of it wait for ever: rm {' '.join(map(str, stale))}"
        return Finding.of("extensions", f"{len(stale)} locks of killed builds in {cache}", warning=fix)
    building = f", {len(locks)} being built" if locks else ""
    return Finding.of("extensions", f"no stale lock in {cache}{building}")
