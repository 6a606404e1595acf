"""Every on-policy algorithm on the demo task, over several seeds: trains what is missing, then writes a table.

    python -m scripts.algorithms --runs runs/algorithms --seeds 0,1,2 --jobs 2
    python -m scripts.algorithms --runs runs/algorithms --table-only

A seed is a run directory of its own, RUNS/seed-N, in which all algorithms share one sft and one rm stage; it is the
`train.seed` of every stage, while the generated data stays the same. The table is made from the run directories alone,
of every seed and algorithm in them. Run again, it goes on: finished stages say so, interrupted ones resume.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf.data.demo import demo_rows, optimum
from rlhf.errors import RecipeError
from rlhf.eval.demo import Row, summary_rows
from rlhf.launch import stopped_with_parent
from rlhf.run.commit import read_json, write_atomic, write_json
from rlhf.run.lineage import content_hash
from rlhf.run.rundir import RunDir
from scripts.make_docs import table

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "demo"
PAGE = ROOT / "docs" / "algorithms.md"
SHARED = {"sft": (), "rm": ("sft",)}  # stage -> what it waits for
ALGORITHMS = {  # recipe and stage folder -> subcommand
    "ppo": "ppo",
    "grpo": "grpo",
    "dr_grpo": "grpo",
    "dapo": "grpo",
    "gspo": "grpo",
    "rloo": "grpo",
    "reinforce": "grpo",
    "reinforce_pp": "grpo",
    "remax": "grpo",
    "mdloo": "grpo",
    "nash_md": "grpo",
}
NOT_STARTED = -1  # the code of a stage whose parent failed


@dataclass(frozen=True)
class Task:
    """One stage of one seed."""

    run: Path
    name: str
    stage: str
    after: tuple[str, ...]  # stages of the same run
    recipe: str = ""  # default: named after the stage folder
    settings: tuple[str, ...] = ()  # KEY=VALUE

    @property
    def folder(self) -> Path:
        """The stage folder."""
        return self.run / self.name

    def command(self, recipes: Path) -> list[str]:
        """The command that runs it; its seed is in the name of the run directory."""
        recipe = recipes / f"{self.recipe or self.name}.yaml"
        words = [self.stage, str(recipe), "--run", str(self.run), "--name", self.name]
        seed = "label.seed" if self.stage == "label" else "train.seed"
        settings = [f"{seed}={seed_of(self.run)}", *self.settings]
        return [sys.executable, "-m", "rlhf", *words, *(word for each in settings for word in ("--set", each))]


def tasks_of(runs: Path, seeds: Sequence[int], names: Sequence[str]) -> list[Task]:
    """Every stage of every seed; those that others wait for come first."""
    folders = [runs / f"seed-{seed}" for seed in seeds]
    shared = [Task(run, name, name, after) for name, after in SHARED.items() for run in folders]
    return shared + [Task(run, name, ALGORITHMS[name], tuple(SHARED)) for run in folders for name in names]


def seed_of(run: Path) -> int:
    """The seed of a run directory."""
    return int(run.name.removeprefix("seed-"))


# --- training --------------------------------------------------------------------------------------------------------


def run_all(tasks: Sequence[Task], jobs: int, work: Callable[[Task], int]) -> dict[Task, int]:
    """Do `work`, which returns an exit code, for every task once its parents are done; `jobs` tasks at a time.

    What waits for a task that failed is not started. An exception ends it after the tasks that are running now.
    """
    codes: dict[Task, int] = {}
    waiting, running = list(tasks), dict[Future[int], Task]()
    with ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                done = {(task.run, task.name): code for task, code in codes.items()}
                ready = [task for task in waiting if all((task.run, name) in done for name in task.after)]
                waiting = [task for task in waiting if task not in ready]
                for task in ready:
                    if any(done[task.run, name] for name in task.after):
                        codes[task] = NOT_STARTED
                    else:
                        running[pool.submit(work, task)] = task
                for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                    codes[running.pop(future)] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return codes


class Stages:
    """Runs stages as processes of one thread each, with what they print in a file beside the stage folder."""

    def __init__(self, recipes: Path) -> None:
        self.recipes = recipes
        self._live: list[subprocess.Popen[bytes]] = []

    def __call__(self, task: Task) -> int:
        task.run.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with task.folder.with_suffix(".out").open("wb") as output:
            process = subprocess.Popen(
                task.command(self.recipes),
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # a Ctrl-C reaches it through `stop`, once
                preexec_fn=stopped_with_parent(),
            )
            self._live.append(process)
            code = process.wait()
        said = f"not finished (exit {code}), see {output.name}" if code else "done"
        print(f"{task.folder}: {said}, {time.monotonic() - started:.0f} s", flush=True)
        return code

    def stop(self) -> None:
        """Ask everything that runs to stop after its step; the same command resumes it."""
        for process in self._live:
            if process.poll() is None:
                process.terminate()


def train(tasks: Sequence[Task], jobs: int, recipes: Path) -> list[Task]:
    """Run the stages. Returns those that did not finish."""
    work = Stages(recipes)

    def end(*_: object) -> None:
        work.stop()
        sys.exit(75)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    codes = run_all(tasks, jobs, work)
    return [task for task, code in codes.items() if code]


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """What the table needs of one stage of one seed. SFT is compared with nothing."""

    gold: float
    seconds: float | None
    gain: float | None  # gold reward above SFT's, on the same prompts
    errors: float | None  # the same in standard errors; None where there is no error either
    kl: float | None  # nats per answer

    @classmethod
    def from_row(cls, row: Row) -> Judged:
        """The numbers of a row of the demo's table."""
        assert row.scores is not None, f"{row.stage} is no policy"
        errors = row.gain.mean / row.gain.se if row.gain and row.gain.se > 0 else None
        mean = row.gain.mean if row.gain else None
        return cls(row.scores.gold.mean, row.seconds, mean, errors, row.kl.mean if row.kl else None)


@dataclass(frozen=True)
class Line:
    """One stage over seeds."""

    name: str
    seeds: list[Judged]

    def cells(self) -> tuple[str, ...]:
        """The line of the table; cells that do not apply to SFT are empty there."""
        errors = present([each.errors for each in self.seeds])
        return (
            "SFT" if self.name == "sft" else f"[{self.name}](../recipes/demo/{self.name}.yaml)",
            spread([each.gold for each in self.seeds], 2),
            spread(present([each.gain for each in self.seeds]), 2),
            f"{min(errors):.1f}" if errors else "",
            spread(present([each.kl for each in self.seeds]), 1),
            spread(present([each.seconds for each in self.seeds]), 0),
            str(len(self.seeds)),
        )


def present(values: Sequence[float | None]) -> list[float]:
    """The values that are there."""
    return [value for value in values if value is not None]


def spread(values: Sequence[float], digits: int) -> str:
    """Mean +- standard deviation over seeds; a single seed has no deviation."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def judge_all(runs: Path, jobs: int) -> list[Line]:
    """SFT and every algorithm that some seed has finished, judged by the gold reward on held-out prompts."""
    folders = [path for path in runs.glob("seed-*") if re.fullmatch(r"seed-\d+", path.name)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        seeds = list(pool.map(judge_run, sorted(folders, key=seed_of)))
    lines = [Line(name, [judged[name] for judged in seeds if name in judged]) for name in ("sft", *ALGORITHMS)]
    return [line for line in lines if line.seeds]


def judge_run(run: Path) -> dict[str, Judged]:
    """The finished stages of one seed, by name. Verdicts are kept beside the run's report, and hold while neither the
    stage nor its SFT model has changed."""
    directory, kept = RunDir(run), run / "report" / "judged.json"
    names = [s.name for s in directory.describe() if s.state == "finished" and s.name in ("sft", *ALGORITHMS)]
    if "sft" not in names:
        return {}
    hashes = {name: content_hash(directory.stage(name).read_manifest()) for name in names}
    keys = {name: f"{hashes['sft']} {hashes[name]}" for name in names}
    records = read_json(kept) if kept.exists() else {}
    records = {name: records[name] for name in names if name in records and records[name]["key"] == keys[name]}
    if missing := [name for name in names if name not in records]:
        prompts = [row["prompt"] for row in demo_rows("eval_prompts")]
        for row in summary_rows(directory, prompts, best_mean(), only=missing)[0]:
            records[row.stage] = {"key": keys[row.stage], **asdict(Judged.from_row(row))}
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, records)
    fields = ("gold", "seconds", "gain", "errors", "kl")
    return {name: Judged(**{field: record[field] for field in fields}) for name, record in records.items()}


def best_mean() -> float:
    """The largest gold reward that the held-out prompts allow, on average."""
    return statistics.fmean(optimum(row["prompt"]) for row in demo_rows("eval_prompts"))


HEADER = ("algorithm", "gold reward", "above SFT", "standard errors", "KL to SFT", "seconds", "seeds")
TEXT = """\
<!-- Made by `python -m scripts.algorithms`: run that again, with --table-only where nothing is to be trained. -->
# Algorithms on the demo task

Every on-policy algorithm on the [demo task](../recipes/demo/README.md): the same SFT model, the same reward model, \
the same prompts; the gold reward, which none of them sees, judges one answer to each of {prompts} held-out prompts. \
Numbers are means ± standard deviations over seeds. A seed draws everything anew, SFT and reward model included; the \
data stays.

{table}

- **gold reward**: mean over the held-out prompts; the best answers would have {best:.2f}.
- **above SFT**: the gain over the SFT model of the same seed, on the same prompts. **standard errors**: the same in \
standard errors over prompts, for the seed in which it is least.
- **KL to SFT**: nats per answer, on the held-out prompts.
- **seconds**: of the stage, on one thread, with other stages beside it.

The recipes differ in more than the algorithm (learning rate, minibatches): the table says that each of them learns, \
and at what price, not which is best elsewhere.

{recipes}
"""


def page(lines: Sequence[Line], recipes: Path) -> str:
    """docs/algorithms.md."""
    prompts = len(demo_rows("eval_prompts"))
    shown = "\n".join(f"- `{line.name}`: {summary}" for line in lines for summary in summaries(line.name, recipes))
    cells = [line.cells() for line in lines]
    return TEXT.format(prompts=prompts, best=best_mean(), table=table(HEADER, cells), recipes=shown)


def summaries(name: str, recipes: Path) -> Iterator[str]:
    """What the first line of an algorithm's recipe says of it."""
    if name in ALGORITHMS:
        yield (recipes / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


# --- the command -----------------------------------------------------------------------------------------------------


def algorithms(text: str) -> list[str]:
    """The names in a list like `ppo,grpo`."""
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ALGORITHMS]:
        what = f"expected names of {', '.join(ALGORITHMS)}, found {', '.join(unknown)}"
        raise RecipeError(what, where="--only")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, judge, write. Returns the exit code: 1 where a stage did not finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/algorithms"), help="folder of the run directories")
    parser.add_argument("--seeds", default="0,1,2", help="seeds to train, separated by commas")
    parser.add_argument("--only", default=",".join(ALGORITHMS), help="algorithms to train, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time, a thread each")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder with sft.yaml, rm.yaml, ppo.yaml, ...")
    parser.add_argument("--out", type=Path, default=PAGE, help="where the table is written")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    names, seeds = algorithms(options.only), [int(seed) for seed in options.seeds.split(",")]
    tasks = [] if options.table_only else tasks_of(options.runs, seeds, names)
    unfinished = train(tasks, options.jobs, options.recipes)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the judges, which are processes of their own
    text = page(judge_all(options.runs, options.jobs), options.recipes)
    write_atomic(options.out, text)
    print(text)
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
