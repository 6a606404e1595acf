"""Speed and memory of our stages, against TRL and against plain torch loops.

    python -m scripts.bench sft dpo --quick --raw        # two stages, few rounds
    python -m scripts.bench all --raw --hh DIR --gsm8k FILE --write docs/performance.md

Subjects: sft, rm, dpo, grpo, ppo, generation, lora, ranks, growth, all. Every case runs in a process of its own, in
which the sides take turns. Rows come from the package's demo task where no files are named; models are made on the
spot. TRL takes part where it is installed, or where a folder is named:

    pip install --no-deps --target DIR trl==1.16.0 accelerate           # --trl DIR
    pip install --no-deps --target DIR2 trl==1.10.0 accelerate          # --trl-ppo DIR2: a version with PPO
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.launch import World, launch_command, rank_environment
from rlhf.run.commit import write_atomic
from scripts.bench import page
from scripts.bench.cases import SUBJECTS, Case, chosen
from scripts.bench.page import Result
from scripts.bench.spec import Spec

ROOT = Path(__file__).parents[2]
# Large temporaries from one growing heap instead of fresh pages each time: for every side alike.
MALLOC = {
    "MALLOC_TOP_PAD_": "1000000000",
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
}


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="+", choices=SUBJECTS, metavar="SUBJECT")
    parser.add_argument("--only", nargs="+", help="only the cases of these names, e.g. 'grpo wide'")
    parser.add_argument("--quick", action="store_true", help="three rounds instead of seven, one thread only")
    parser.add_argument("--rounds", type=int, help="so many rounds")
    parser.add_argument("--raw", action="store_true", help="also the plain torch loops")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: on GPUs; TRL by autocast")
    parser.add_argument("--hh", help="file or folder with chosen and rejected dialogues")
    parser.add_argument("--gsm8k", help="file with question and answer")
    parser.add_argument("--trl", help="folder that TRL was installed into")
    parser.add_argument("--trl-ppo", help="folder with a version of TRL that has PPO")
    parser.add_argument("--threads", type=int, nargs="+", help="1 means CPU time, more wall time; default: 1, and all")
    parser.add_argument("--malloc", action="store_true", help="keep freed memory (glibc), for every side alike")
    parser.add_argument("--work", type=Path, default=Path("runs/bench"), help="folder for models and results")
    parser.add_argument("--write", type=Path, help="write the page to this file, e.g. docs/performance.md")
    parser.add_argument("--table-only", action="store_true", help="measure nothing: tables of the results in --work")
    return parser.parse_args(arguments)


def spec_of(case: str, threads: int, options: argparse.Namespace) -> Spec:
    """What a case's process is told."""
    name = f"{case.replace(' ', '-')}-threads-{threads}"
    return Spec(
        case=case,
        threads=threads,
        rounds=options.rounds or (3 if options.quick else 7),
        raw=options.raw,
        dtype=options.dtype,
        work=str(options.work.resolve()),
        out=str(options.work.resolve() / "results" / f"{name}.json"),
        hh=absolute(options.hh),
        gsm8k=absolute(options.gsm8k),
        trl=absolute(options.trl_ppo if case.startswith("ppo") else options.trl),
    )


def absolute(path: str | None) -> str | None:
    """The same path from everywhere."""
    return None if path is None else str(Path(path).resolve())


def run(spec: Spec, ranks: int, options: argparse.Namespace) -> Result | None:
    """Measure a case in a process of its own, or in one per rank. None where it fails; why is in the log."""
    out = Path(spec.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    file, log = out.with_suffix(".spec"), out.with_suffix(".log")
    spec.write(file)
    environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), **(MALLOC if options.malloc else {})}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "scripts.bench.worker", str(file)]
    if ranks > 1:
        world = World(ranks, None, None, cpu=not list(Path("/dev").glob("nvidia[0-9]*")))
        command = launch_command([str(file)], world, module="scripts.bench.worker")
        environment |= rank_environment(world)
    with log.open("wb") as output:
        code = subprocess.run(command, env=environment, stdout=output, stderr=output, cwd=ROOT).returncode
    if code or (spec.case != "prepare" and not out.exists()):
        print(f"{spec.case}: failed (exit {code}), see {log}", file=sys.stderr, flush=True)
        return None
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}


def jobs(options: argparse.Namespace) -> list[tuple[Case, int]]:
    """Cases with their number of threads. Ranks have one thread each; growth is measured with one number only."""
    every = {1} if options.quick else {1, len(os.sched_getaffinity(0))}
    threads = options.threads or sorted(every)
    return [
        (case, count)
        for case in chosen(options.subjects)
        if options.only is None or case.name in options.only
        for count in ([1] if case.ranks > 1 else threads[:1] if case.series else threads)
    ]


def report(case: Case, result: Result) -> str:
    """A case in one line."""
    facts = [f"{case.text} [{result['threads']} threads, {result['clock']}]:"]
    for side, found in result["sides"].items():
        facts.append(f"{side} {found['rate']:,.0f} tok/s ({found['share']:.0%}, {page.split(result, side)} s)")
        if side in result["ratios"]:
            facts.append(f"ours/{side} {page.ratio(result, side)}")
    return " ".join([*facts, f"others {page.others(result)}", *result["notes"]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line per case and then the tables. Returns 1 where a case failed."""
    options = parsed(arguments)
    wanted = jobs(options)
    if not wanted:
        names = ", ".join(case.name for case in chosen(options.subjects))
        print(f"--only: expected names of {names}; found {', '.join(options.only)}", file=sys.stderr)
        return 2
    results = kept(wanted, options) if options.table_only else measured(wanted, options)
    words = sys.argv[1:] if arguments is None else list(arguments)
    text = page.page(results, shown_command(words), len(wanted))
    print(f"\n{text}")
    if options.write:
        write_atomic(options.write, text)
    return int(not options.table_only and len(results) < len(wanted))


def measured(wanted: Sequence[tuple[Case, int]], options: argparse.Namespace) -> list[Result]:
    """The results of all cases that did not fail."""
    results = list[Result]()
    if run(spec_of("prepare", max(threads for _, threads in wanted), options), 1, options) is None:
        return results
    for case, threads in wanted:
        result = run(spec_of(case.name, threads, options), case.ranks, options)
        if result is not None:
            results.append(result)
            print(report(case, result), flush=True)
    return results


def kept(wanted: Sequence[tuple[Case, int]], options: argparse.Namespace) -> list[Result]:
    """The results that an earlier run has left."""
    files = [Path(spec_of(case.name, threads, options).out) for case, threads in wanted]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


_LOCAL = {"--hh": "DIR", "--gsm8k": "FILE", "--trl": "DIR", "--trl-ppo": "DIR", "--work": "DIR"}


def shown_command(words: Sequence[str]) -> str:
    """The command as others would type it: where things lie on this machine is left out."""
    words = [word for word in words if word != "--table-only"]
    found = [_LOCAL[before] if before in _LOCAL else word for before, word in zip(["", *words], words, strict=False)]
    return f"python -m scripts.bench {shlex.join(found)}"


if __name__ == "__main__":
    sys.exit(main())
