"""Trackers that fail or hang while a stage trains: they are no reason to lose anything."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice, product
from pathlib import Path

from rlhf.train import trackers
from scripts.reliability.kills import progress, whole_rows
from scripts.reliability.lab import Done, Lab, differing, digest
from scripts.reliability.row import Tally, row

PATIENCE_S = 1.0
STAGES = ("sft", "rm", "ppo", "grpo", "dpo")
_OWN_MOUNTS = 0x20000  # CLONE_NEWNS
_PRIVATE, _READ_ONLY = 1 << 18 | 1 << 14, 1  # MS_PRIVATE with MS_REC, MS_RDONLY

WANDB = """\
import os, time

WHERE, HOW = os.environ["FAULT"].split(":")


def meet(where):
    if where == WHERE:
        if HOW == "hang":
            time.sleep(600)
        raise {"raise": ConnectionError, "exit": SystemExit}[HOW]("no network")


class Run:
    def log(self, row, step):
        if step >= 2:
            meet("log")

    def finish(self):
        meet("finish")


def init(**options):
    meet("init")
    return Run()


meet("import")
"""
SERVICE = [f"{where}:{how}" for where, how in product(("import", "init", "log", "finish"), ("raise", "hang", "exit"))]
FOLDER = ["in the way", "full", "read-only", "removed"]


@row(
    "R23",
    "a tracker fails, hangs or ends the program where it is imported, opened, given a row, or closed; its folder is in"
    " the way, full, read-only or removed while it is written",
    expected="exit 0, one warning, the same bytes as without a tracker: metrics.jsonl complete, each step once",
    asked="20",
    quick=3,
    full=24,
)
def outages(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: two of three have a service that fails, one a folder."""
    package = lab.work / "package"
    package.mkdir(exist_ok=True)
    (package / "wandb.py").write_text(WANDB)
    faults = [fault for two, one in zip(zip(SERVICE[::2], SERVICE[1::2], strict=True), cycle(FOLDER), strict=False)
              for fault in (*two, one)]  # fmt: skip
    straight: dict[str, dict[str, str]] = {}
    for fault, stage in zip(islice(cycle(faults), tries), cycle(STAGES), strict=False):
        name = f"r23-{stage}"
        if stage not in straight:
            lab.clear(name)
            done = lab.run(lab.command(stage, "--name", name))
            assert done.code == 0, done.err
            straight[stage] = digest(lab.root / name)
        lab.clear(name)
        with tally.attempt(f"{stage}: {fault}"):
            meet_service(lab, stage, fault, package) if fault in SERVICE else meet_folder(lab, tally, stage, fault)
            rows = whole_rows(lab.root / name / "metrics.jsonl")
            assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
            assert not (different := differing(digest(lab.root / name), straight[stage])), different
        lab.clear(name)


def meet_service(lab: Lab, stage: str, fault: str, package: Path) -> None:
    """A run whose Weights & Biases does not work."""
    words = lab.command(stage, "--name", f"r23-{stage}", "--set", "log.wandb=mine")
    done = lab.run(words, env={"FAULT": fault}, before=partial(prepared, package))
    warned(done, "Weights & Biases")


def meet_folder(lab: Lab, tally: Tally, stage: str, fault: str) -> None:
    """A run whose TensorBoard events cannot be written once it goes on after a kill, or from the second step on."""
    folder = lab.root / f"r23-{stage}"
    words, events = lab.command(stage, "--name", folder.name, "--set", "log.tensorboard=true"), folder / "tensorboard"
    child = lab.start(words, before=partial(prepared, None))
    child.until(lambda: progress(folder) > 0 and events.exists())
    child.kill()
    child.wait()
    if fault == "removed":
        child = lab.start(words, before=partial(prepared, None))
        child.until(lambda: progress(folder) > 1)
        for path in events.iterdir():
            path.unlink()
        assert child.wait().code == 0, child.text("err")
        return
    if fault == "in the way" or not can_mount():
        if fault != "in the way":
            tally.remark("no file system of its own could be mounted: the folder was in the way instead")
        for path in events.iterdir():
            path.unlink()
        events.rmdir()
        events.write_text("")
        before: Callable[[], object] = partial(prepared, None)
    else:
        before = partial(mounted, events, fault)
    warned(lab.run(words, before=before), "TensorBoard")


def warned(done: Done, name: str) -> None:
    """It ended well and said once what did not work."""
    assert done.code == 0, f"exit {done.code}: {done.err[-600:]}"
    told = [line for line in done.err.splitlines() if name in line]
    assert len(told) == 1 and "metrics.jsonl has all rows" in told[0], told
    assert "Traceback" not in done.err, done.err[-600:]


# --- in the process of the command -----------------------------------------------------------------------------------


def prepared(package: Path | None) -> None:
    """A package of ours in the tracker's place, and less patience with it."""
    trackers._PATIENCE_S = PATIENCE_S
    if package is not None:
        sys.path.insert(0, str(package))


def mounted(folder: Path, fault: str) -> None:
    """A file system of 4 KiB that is full, or one that is read-only, that this process alone sees at the folder."""
    prepared(None)
    libc = ctypes.CDLL(None, use_errno=True)
    flags = _READ_ONLY if fault == "read-only" else 0
    done = [
        libc.unshare(_OWN_MOUNTS),
        libc.mount(None, b"/", None, _PRIVATE, None),
        libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", flags, b"size=4k"),
    ]
    assert not any(done), os.strerror(ctypes.get_errno())
    if fault == "full":
        (folder / "other").write_bytes(bytes(4096))


def can_mount() -> bool:
    """Whether this user may mount something for a process of its own."""
    pid = os.fork()
    if pid == 0:
        libc = ctypes.CDLL(None)
        os._exit(1 if libc.unshare(_OWN_MOUNTS) or libc.mount(None, b"/", None, _PRIVATE, None) else 0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
