"""Makes saves in forks of itself, each of which waits until something watches it. Imports nothing heavy.

    python -S scripts/reliability/saver.py

A line on stdin: {"folder", "sizes"}; on stdout the pid of a fork, which saves as soon as a byte comes in; then what it
has to say, if it still can, and how it ended.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf.errors import UserError  # noqa: E402
from rlhf.run import commit  # noqa: E402
from rlhf.run.disk import disk  # noqa: E402

OLD, NEW = 100, 200
_PR_SET_PTRACER, _ANY = 0x59616D61, -1


class InOrder:
    """Does in this thread what a pool does in several: calls are counted by thread."""

    def __init__(self, max_workers: int) -> None:
        pass

    def __enter__(self) -> InOrder:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        return [work(item) for item in items]


def content(step: int, name: str, size: int) -> bytes:
    """What a file of a checkpoint holds."""
    words = f"{name} after {step} steps; ".encode()
    return (words * (size // len(words) + 1))[:size]


def save(folder: Path, step: int, sizes: dict[str, int]) -> None:
    """A checkpoint as a running stage makes it: files, the commit, older ones deleted."""
    final = folder / commit.step_name(step)
    temporary = commit.fresh_temporary(final)
    with disk(temporary, sum(sizes.values())):
        for name, size in sizes.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            with (temporary / name).open("wb", buffering=0) as file:
                data = content(step, name, size)
                while data:
                    data = data[file.write(data[: 2**20]) :]
    commit.commit_dir(temporary, final, {"step": step})
    commit.rotate(folder, 1)


def watched(folder: Path, sizes: dict[str, int]) -> None:
    """The fork's life."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANY, 0, 0, 0)
    os.read(0, 1)
    os.getppid()  # from here on calls count
    try:
        save(folder, NEW, sizes)
        said = {"code": 0, "text": ""}
    except UserError as error:
        said = {"code": error.exit_code, "text": str(error)}
    except BaseException as error:  # noqa: BLE001  told to the one who asked
        said = {"code": 1, "text": f"{type(error).__name__}: {error}"}
    os.getppid()  # and here they end
    os.write(1, json.dumps(said).encode() + b"\n")


def serve() -> None:
    """One fork per line."""
    commit.ThreadPoolExecutor = InOrder  # type: ignore[misc, assignment]
    while line := _line():
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            watched(Path(asked["folder"]), asked["sizes"])
            os._exit(0)
        os.write(1, b"%d\n" % pid)
        status = os.waitpid(pid, 0)[1]
        os.write(1, json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")


def _line() -> bytes:
    """Byte by byte: what follows is for a fork."""
    line = b""
    while (byte := os.read(0, 1)) and byte != b"\n":
        line += byte
    return line


if __name__ == "__main__":
    serve()
