"""Runs `rlhf` commands in forks of a process that has imported everything already: a start costs 0.1 s, not 8.

Reads one JSON list of arguments per line, writes one JSON line {"code", "out", "err", "torch"} per command; torch: did
the command import it? With the argument `cold` the process has imported only what the command line itself needs.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path


class Witness(importlib.abc.MetaPathFinder):
    """Finds no module, but notes that torch was asked for."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name == "torch":
            self.note.touch()


def run(arguments: list[str], folder: Path) -> None:
    """In the child: the command with its streams in files. Never returns."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["rlhf", *arguments]
    sys.meta_path.insert(0, Witness(folder / "torch"))
    code = 0
    try:
        from rlhf.cli.app import main

        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(*modules: str) -> None:
    """Answer until the input ends. Each command runs in a fork that has these modules."""
    for module in modules:
        importlib.import_module(module)
    print("ready", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                run(json.loads(line), folder)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            answer = {"code": code, "torch": (folder / "torch").exists()}
            (folder / "torch").unlink(missing_ok=True)
            answer |= {stream: (folder / stream).read_text() for stream in ("out", "err")}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    if "cold" in sys.argv[1:]:
        serve("rlhf.cli.app", "rlhf.cli.prepare", "rlhf.cli.stages", "rlhf.launch")
    else:
        serve("rlhf.train.worker")
