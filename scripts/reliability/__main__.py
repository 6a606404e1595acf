"""Tries to break runs in every way of the reliability sheet, and counts.

    python -m scripts.reliability R4 R9 --tries 3            # two rows, a few tries
    python -m scripts.reliability all --write docs/reliability.md

Every row runs in a process of its own with a lab of its own; rows that start two ranks run alone, others side by side.
Exits 1 where anything did not end as it must. With --work the page also has what earlier calls have left there: after a
correction its row alone is run again.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rlhf.run.commit import write_atomic
from scripts.reliability.page import Result, page
from scripts.reliability.sheet import ROWS

ROOT = Path(__file__).parents[2]
JOBS = 2  # rows side by side


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", metavar="ROW", choices=[*ROWS, "all"], help=f"all, or {', '.join(ROWS)}")
    parser.add_argument("--tries", type=int, help="so many of each; default: as many as the table states")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and damages")
    parser.add_argument("--work", type=Path, help="folder for models and results; default: a temporary one")
    parser.add_argument("--write", type=Path, help="write the page to this file, e.g. docs/reliability.md")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # of the one row that this process runs
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rows, print a line for each, write the page. Returns the exit code."""
    options = parsed(arguments)
    # As in a terminal: in a background job these are ignored, also by the commands it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    ids = list(ROWS) if "all" in options.rows else list(dict.fromkeys(options.rows))
    if options.result is not None:
        return run_here(ids[0], options)
    with tempfile.TemporaryDirectory() as spare:
        work = (options.work or Path(spare)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        results = run_all(ids, options, work)
        seconds = time.monotonic() - started
        earlier = {id: Result.read(work / f"{id}.json") for id in ROWS if id not in ids}
    if options.write is not None:
        known = {result.id: result for result in (*results, *filter(None, earlier.values()))}
        is_whole = len(results) == len(ROWS)
        write_atomic(options.write, page([known[id] for id in ROWS if id in known], seconds if is_whole else None))
    return int(any(result.violations for result in results))


def run_here(id: str, options: argparse.Namespace) -> int:
    """One row in this process."""
    from scripts.reliability.lab import Lab

    row, work = ROWS[id], options.work
    lab = Lab.made(work / "lab")
    tally, seconds = row.run(lab, tries=options.tries or row.full, seed=options.seed)
    Result(id, tally.tried, tally.violations, tally.remarks, seconds).write(options.result)
    return 0


def run_all(ids: list[str], options: argparse.Namespace, work: Path) -> list[Result]:
    """Every row in a process of its own; first those that may run side by side."""
    together = [id for id in ids if not ROWS[id].alone]
    with ThreadPoolExecutor(JOBS) as pool:
        found = dict(zip(together, pool.map(lambda id: run_apart(id, options, work), together), strict=True))
    found |= {id: run_apart(id, options, work) for id in ids if ROWS[id].alone}
    return [found[id] for id in ids]


def run_apart(id: str, options: argparse.Namespace, work: Path) -> Result:
    """One row in a process of its own; one that dies is a violation."""
    result = work / f"{id}.json"
    result.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix=f"{id}-") as folder:
        words = [id, "--work", folder, "--result", str(result), "--seed", str(options.seed)]
        words += ["--tries", str(options.tries)] if options.tries else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "scripts.reliability", *words]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    found = Result.read(result)
    if done.returncode or found is None:
        found = Result(id, 0, [f"the row itself ended with {done.returncode}: {done.stderr[-2000:]}"], [], 0.0)
        found.write(result)
    print(found.line(), flush=True)
    for violation in found.violations:
        print(f"    {violation}", flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
