"""Iterative DPO against one-shot DPO on equal data, on the demo task, over several seeds: trains, draws, writes.

    python -m scripts.iterative --runs runs/iterative --seeds 0,1,2 --jobs 2
    python -m scripts.iterative --runs runs/iterative --table-only

Both start from one SFT model and one reward model per seed, and learn from as many answers to the same prompts, which
that reward model has scored. One-shot samples all of them from the SFT model. Iterative DPO goes through the prompts in
three shards: it samples from the policy as it stands, trains on the shard, and goes on from there.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from rlhf.data.demo import demo_rows
from rlhf.eval.demo import Row, summary_rows
from rlhf.run.commit import read_json, write_atomic, write_json
from rlhf.run.lineage import content_hash
from rlhf.run.rundir import RunDir
from scripts.algorithms import RECIPES, ROOT, Task, best_mean, seed_of, spread, train
from scripts.make_docs import table

PAGE, FIGURE = ROOT / "docs" / "iterative-dpo.md", ROOT / "docs" / "iterative-dpo.svg"
PROMPTS, SHARDS = 1536, 3
LABELLER = ("rewards=[{kind: model, from: rm}]", f"data.limit={PROMPTS}", "label.answers=4")
TRAINED = ("data.eval=null", "eval.every=0", "log.samples=0", "train.batch_size=32", "train.lr=2e-4")
ITERATED = tuple(f"iterative-{i}" for i in range(1, SHARDS + 1))
POLICIES = ("sft", "one-shot", *ITERATED)


def tasks_of(run: Path) -> list[Task]:
    """All stages of one seed."""
    tasks = [Task(run, "sft", "sft", ()), Task(run, "rm", "rm", ("sft",))]
    tasks += labelled(run, "once", "sft", "one-shot", ())
    for i, name in enumerate(ITERATED, 1):
        tasks += labelled(run, str(i), ITERATED[i - 2] if i > 1 else "sft", name, (f"data.part={i}/{SHARDS}",))
    return tasks


def labelled(run: Path, label: str, policy: str, trained: str, more: tuple[str, ...]) -> list[Task]:
    """Answers of a policy, scored, and the policy that goes on from them; what it was is its reference."""
    folder = f"label-{label}"
    sampled = Task(run, folder, "label", ("rm", policy), "label", (f"model.from={policy}", *LABELLER, *more))
    settings = (f"model.from={policy}", f"data.from={folder}", *TRAINED)
    return [sampled, Task(run, trained, "dpo", (folder,), "dpo", settings)]


# --- judging ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A policy of one seed before the gold reward."""

    gold: float
    kl: float  # to SFT, nats per answer
    parses: float
    length: float

    @classmethod
    def from_row(cls, row: Row) -> Point:
        """The numbers of a row of the demo's table."""
        assert row.scores is not None
        return cls(row.scores.gold.mean, row.kl.mean if row.kl else 0.0, row.scores.parse_share, row.scores.length)


def judge_run(run: Path) -> dict[str, Point]:
    """The finished policies of one seed, by name; verdicts are kept beside the run's report while they hold."""
    directory, kept = RunDir(run), run / "report" / "points.json"
    names = [stage.name for stage in directory.describe() if stage.state == "finished" and stage.name in POLICIES]
    key = " ".join(content_hash(directory.stage(name).read_manifest()) for name in names)
    if kept.exists() and (found := read_json(kept))["key"] == key:
        return {name: Point(**point) for name, point in found["points"].items()}
    prompts = [row["prompt"] for row in demo_rows("eval_prompts")]
    points = {row.stage: Point.from_row(row) for row in summary_rows(directory, prompts, best_mean(), only=names)[0]}
    kept.parent.mkdir(exist_ok=True)
    write_json(kept, {"key": key, "points": {name: asdict(point) for name, point in points.items()}})
    return points


# --- the page --------------------------------------------------------------------------------------------------------

HEADER = ("policy", "gold reward", "KL to SFT", "parses", "words", "seeds")
TEXT = """\
<!-- Made by `python -m scripts.iterative`: run that again, with --table-only where nothing is to be trained. -->
# Iterative against one-shot DPO

On the [demo task](../recipes/demo/README.md), at equal data: 4 answers to each of {prompts} prompts, scored by the \
reward model, the best against the worst of every prompt; one pass, the same learning rate and batch. **One-shot** \
samples all answers from the SFT model. **Iterative** takes the prompts in {shards} shards, samples every shard from \
the policy as it stands, and has that policy as the reference too ([recipe](../recipes/demo/iterative_dpo.yaml)). \
Means ± standard deviations over seeds; a seed draws SFT model, reward model and answers anew. The gold reward, which \
no stage has seen, judges one answer to each of {judged} held-out prompts; the best answers would have {best:.2f}.

{table}

![gold reward against KL](iterative-dpo.svg)

{says}
"""


def page(seeds: Sequence[dict[str, Point]], says: str) -> str:
    """docs/iterative-dpo.md."""
    lines = []
    for name in POLICIES:
        points = [seed[name] for seed in seeds if name in seed]
        columns = [("gold", 2), ("kl", 1), ("parses", 2), ("length", 1)]
        numbers = [spread([getattr(point, key) for point in points], digits) for key, digits in columns]
        lines.append((name, *numbers, str(len(points))))
    return (
        TEXT.format(
            prompts=PROMPTS,
            shards=SHARDS,
            judged=len(demo_rows("eval_prompts")),
            best=best_mean(),
            table=table(HEADER, lines),
            says=says,
        ).rstrip()
        + "\n"
    )


def difference(seeds: Sequence[dict[str, Point]]) -> str:
    """The last iterate against one-shot, seed by seed."""
    both = [(seed[ITERATED[-1]], seed["one-shot"]) for seed in seeds if {ITERATED[-1], "one-shot"} <= seed.keys()]
    if len(both) < 2:
        return ""
    gains = [last.gold - once.gold for last, once in both]
    mean, error = statistics.fmean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    extra = statistics.fmean(last.kl - once.kl for last, once in both)
    parts = [
        f"Seed by seed, the last iterate is {mean:+.2f} ± {error:.2f} (standard error over {len(both)} seeds) above"
        f" one-shot in gold reward, at {extra:+.1f} nats of KL."
    ]
    gaps = {}
    for name in ITERATED[:-1]:
        pairs = [(seed[name], seed["one-shot"]) for seed in seeds if {name, "one-shot"} <= seed.keys()]
        gaps[name] = [statistics.fmean(getattr(a, k) - getattr(b, k) for a, b in pairs) for k in ("gold", "kl")]
    nearest = min(gaps, key=lambda name: abs(gaps[name][1]))
    gold, kl = gaps[nearest]
    parts.append(
        f"The earlier iterate that is nearest to one-shot in KL, `{nearest}`, has {gold:+.2f} of gold reward beside it"
        f" at {kl:+.1f} nats, from {ITERATED.index(nearest) + 1}/{SHARDS} of the data."
    )
    return " ".join(parts)


def draw(seeds: Sequence[dict[str, Point]], path: Path) -> None:
    """Gold reward against KL: small marks are seeds, large ones their means with standard deviations."""
    matplotlib.rcParams["svg.hashsalt"] = "rlhf"
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    series = {"one-shot": (("sft", "one-shot"), "C1"), "iterative": (("sft", *ITERATED), "C0")}
    for label, (names, color) in series.items():
        groups = [[seed[name] for seed in seeds if name in seed] for name in names]
        groups = [group for group in groups if group]
        kl, gold = ([statistics.fmean(getattr(p, key) for p in group) for group in groups] for key in ("kl", "gold"))
        spreads = [[statistics.pstdev(getattr(p, key) for p in group) for group in groups] for key in ("gold", "kl")]
        axes.errorbar(kl, gold, yerr=spreads[0], xerr=spreads[1], marker="o", color=color, label=label, capsize=2)
        for group in groups[1:]:
            axes.scatter([p.kl for p in group], [p.gold for p in group], s=9, color=color, alpha=0.5)
    axes.set(xlabel="KL to SFT, nats per answer", ylabel="gold reward, held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, judge, draw, write. Returns the exit code: 1 where a stage did not finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/iterative"), help="folder of the run directories")
    parser.add_argument("--seeds", default="0,1,2", help="seeds to train, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time, a thread each")
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder with sft.yaml, rm.yaml, label.yaml, ...")
    parser.add_argument("--out", type=Path, default=PAGE, help="where the table is written; the figure beside it")
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    options = parser.parse_args(arguments)
    runs = [options.runs / f"seed-{seed}" for seed in options.seeds.split(",")]
    tasks = [] if options.table_only else [task for run in runs for task in tasks_of(run)]
    unfinished = train(tasks, options.jobs, options.recipes)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the judges, which are processes of their own
    found = [path for path in options.runs.glob("seed-*") if re.fullmatch(r"seed-\d+", path.name)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        seeds = list(pool.map(judge_run, sorted(found, key=seed_of)))
    text = page(seeds, difference(seeds))
    write_atomic(options.out, text)
    draw(seeds, options.out.with_suffix(".svg"))
    print(text)
    return 1 if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
