"""The closing table of the demo: every stage before the gold reward, which no stage was trained on."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.data.demo import bayes_accuracy, demo_rows, gold_reward, join, optimum
from rlhf.data.grammar import parses, tokenize
from rlhf.errors import CheckpointError
from rlhf.eval.metrics import Estimate, distinct_n, estimate, gain, pair_accuracy
from rlhf.eval.policy import Answers, evaluate_policy, load_policy, score_pairs
from rlhf.recipe.schema import SamplingBlock
from rlhf.run.commit import read_json, write_json
from rlhf.run.rundir import RunDir
from rlhf.run.stage import StageDir, StageSummary

logger = logging.getLogger("rlhf.eval")

REQUIRED = ("ppo", "grpo", "dpo")
MIN_ERRORS, MIN_CLOSED, MAX_KL, MIN_PARSING, MIN_DISTINCT = 3.0, 0.30, 20.0, 0.90, 0.50
ROOM = 48  # tokens, more than any review of the grammar takes
_SHOWN = 4  # prompts whose answers are kept for the report


@dataclass(frozen=True)
class DemoScores:
    """What the judge says about one answer to each prompt."""

    rewards: list[float]
    gold: Estimate
    parse_share: float
    distinct_2: float  # over the words of all answers
    length: float  # mean words of an answer, commas and full stops included


@dataclass(frozen=True)
class Check:
    """One requirement on a stage."""

    text: str
    passed: bool


@dataclass(frozen=True)
class Row:
    """One stage in the table. What does not apply to its kind is None."""

    stage: str
    command: str
    seconds: float | None
    scores: DemoScores | None = None
    kl: Estimate | None = None
    gain: Estimate | None = None  # gold reward above SFT's, on the same prompts
    gap_closed: float | None = None  # the same as a share of what the optimum is above SFT
    accuracy: Estimate | None = None
    ceiling: float | None = None
    checks: list[Check] = field(default_factory=list)


def evaluate_demo(run: Path) -> bool:
    """Judge every finished stage of a demo run, print the table, write report/demo.json.

    True where each of PPO, GRPO and DPO has a stage that meets all requirements.
    """
    prompts = [row["prompt"] for row in demo_rows("eval_prompts")]
    best = estimate([optimum(prompt) for prompt in prompts]).mean
    rows, answers = summary_rows(RunDir(run), prompts, best)
    passed = not missing(rows)
    (run / "report").mkdir(exist_ok=True)
    write_json(run / "report" / "demo.json", as_dict(rows, prompts, answers, best))
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else max(console.width, 120)
    console.print(render_table(rows, best), *verdict_lines(rows), sep="\n", soft_wrap=True)
    return passed


def judge(prompts: Sequence[str], completions: Sequence[str]) -> DemoScores:
    """Gold reward and shape of one completion per prompt."""
    rewards = [gold_reward(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    parsed = [parses(join(prompt, completion)) for prompt, completion in zip(prompts, completions, strict=True)]
    words = [tokenize(completion) for completion in completions]
    return DemoScores(
        rewards=rewards,
        gold=estimate(rewards),
        parse_share=estimate(parsed).mean,
        distinct_2=distinct_n(words, n=2),
        length=estimate([len(each) for each in words]).mean,
    )


def summary_rows(
    run: RunDir, prompts: Sequence[str], best: float, *, only: Collection[str] | None = None
) -> tuple[list[Row], dict[str, Answers]]:
    """One row per finished stage in the order in which they were started, and the answers of every policy.

    only: names of the stages to judge beside SFT; None: all of them.
    """
    stages = [stage for stage in run.describe() if stage.state == "finished"]
    base = next((stage for stage in stages if stage.stage == "sft"), None)
    if base is None:
        what = "expected a finished SFT stage to compare with, found none"
        raise CheckpointError(what, where=str(run.root), fix="Make it with: make demo")
    reference, sampling = load_policy(run.stage(base.name)), sampling_of(run.stage(base.name))
    rows: list[Row] = []
    answers: dict[str, Answers] = {}
    for stage in sorted(stages, key=lambda stage: stage is not base):
        if only is not None and stage is not base and stage.name not in only:
            continue
        logger.info("judging %s", stage.name)
        if stage.kind == "reward":
            rows.append(_reward_row(run, stage))
        elif stage.kind == "policy":
            found = evaluate_policy(run.stage(stage.name), reference, "demo:eval_prompts", sampling)
            before = None if stage is base else rows[0].scores
            rows.append(policy_row(stage, judge(prompts, found.texts), found.kl, before, best))
            answers[stage.name] = found
    return rows, answers


def sampling_of(stage: StageDir) -> SamplingBlock:
    """How every stage is sampled, so that they compare: as the recipe of this one says, with room for every end."""
    recipe = read_json(stage.provenance)["inputs"]["recipe"]
    return SamplingBlock(**{**recipe["sampling"], "max_new_tokens": ROOM})


def _seconds(stage: StageSummary) -> float | None:
    return stage.ended - stage.started if stage.ended is not None and stage.started is not None else None


def _reward_row(run: RunDir, stage: StageSummary) -> Row:
    accuracy = pair_accuracy(*score_pairs(run.stage(stage.name), "demo:eval_pairs"))
    ceiling = bayes_accuracy(demo_rows("eval_pairs"))
    return Row(stage.name, str(stage.stage), _seconds(stage), accuracy=accuracy, ceiling=ceiling)


def policy_row(
    stage: StageSummary, scores: DemoScores, kl: Sequence[float], before: DemoScores | None, best: float
) -> Row:
    """The row of a policy; `before`: SFT's scores on the same prompts, None for SFT itself."""
    if before is None:
        return Row(stage.name, str(stage.stage), _seconds(stage), scores)
    above = gain(scores.rewards, before.rewards)
    room = best - before.gold.mean
    closed = above.mean / room if room > 0 else math.nan
    row = Row(stage.name, str(stage.stage), _seconds(stage), scores, estimate(kl), above, closed)
    return Row(**{**vars(row), "checks": checks(row, before)})


def checks(row: Row, before: DemoScores) -> list[Check]:
    """What a stage that optimised the policy must have reached, against SFT's scores."""
    scores, above, kl, closed = row.scores, row.gain, row.kl, row.gap_closed
    assert scores is not None and above is not None and kl is not None and closed is not None
    errors = above.mean / above.se if above.se > 0 else math.copysign(math.inf, above.mean)
    kept = scores.distinct_2 / before.distinct_2 if before.distinct_2 else math.nan
    return [
        Check(f"{errors:.1f} standard errors above SFT (at least {MIN_ERRORS:g})", errors >= MIN_ERRORS),
        Check(f"{closed:.0%} of the gap to the optimum closed (at least {MIN_CLOSED:.0%})", closed >= MIN_CLOSED),
        Check(f"KL {kl.mean:.1f} nats (at most {MAX_KL:g})", kl.mean <= MAX_KL),
        Check(f"{scores.parse_share:.0%} parse (at least {MIN_PARSING:.0%})", scores.parse_share >= MIN_PARSING),
        Check(f"{kept:.0%} of SFT's distinct-2 kept (at least {MIN_DISTINCT:.0%})", kept >= MIN_DISTINCT),
    ]


def missing(rows: Sequence[Row]) -> list[str]:
    """The required commands of which no stage meets all requirements."""
    met = {row.command for row in rows if row.checks and all(check.passed for check in row.checks)}
    return [command for command in REQUIRED if command not in met]


# --- showing it ----------------------------------------------------------------------------------------------------

# Column of demo.json -> its heading on the console, where the table should fit into 80 columns.
_COLUMNS = {
    "stage": "stage",
    "gold reward": "gold\nreward",
    "gap closed": "gap\nclosed",
    "KL to SFT": "KL\nto SFT",
    "RM accuracy / ceiling": "RM acc.\n/ ceiling",
    "words": "words",
    "parse": "parse",
    "distinct-2": "dist-\ninct-2",
    "time": "time",
}


def cells(row: Row) -> list[str]:
    """A row as text, one cell per column."""
    scores = row.scores
    return [
        row.stage,
        f"{scores.gold.mean:.2f} ± {scores.gold.se:.2f}" if scores else "",
        f"{row.gap_closed:.0%}" if row.gap_closed is not None else "",
        f"{row.kl.mean:.1f} ± {row.kl.se:.1f}" if row.kl else "",
        f"{row.accuracy.mean:.3f} / {row.ceiling:.3f}" if row.accuracy else "",
        f"{scores.length:.1f}" if scores else "",
        f"{scores.parse_share:.1%}" if scores else "",
        f"{scores.distinct_2:.3f}" if scores else "",
        f"{row.seconds:.0f} s" if row.seconds is not None else "",
    ]


def render_table(rows: Sequence[Row], best: float) -> Table:
    """The closing table, for 80 columns. RM accuracy over what the noise of the labels allows at most."""
    title = "Held-out prompts, judged by the gold reward"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name, heading in _COLUMNS.items():
        table.add_column(heading, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    table.add_row("optimum", f"{best:.2f}", "100%", style="dim")
    return table


def verdict_lines(rows: Sequence[Row]) -> list[Text]:
    """One line per judged stage, and one per required command that no stage was made with."""
    lines = []
    for row in rows:
        if row.checks:
            line = Text.assemble(_mark(all(check.passed for check in row.checks)), f" {row.stage}: ")
            for number, check in enumerate(row.checks):
                line.append("; " if number else "")
                line.append(*((check.text, "") if check.passed else (f"✗ {check.text}", "bold red")))
            lines.append(line)
    made = {row.command for row in rows}
    lines += [Text.assemble(_mark(False), f" {name}: no finished stage") for name in REQUIRED if name not in made]
    return lines


def _mark(passed: bool) -> tuple[str, str]:
    return ("pass", "bold green") if passed else ("FAIL", "bold red")


def as_dict(rows: Sequence[Row], prompts: Sequence[str], answers: dict[str, Answers], best: float) -> dict[str, Any]:
    """What report/demo.json holds: everything in the table, the verdicts, and a few answers of every policy."""
    shown = [
        {
            "prompt": prompt,
            "answers": [
                {"stage": stage, "answer": each.texts[i], "gold": gold_reward(prompt, each.texts[i])}
                for stage, each in answers.items()
            ],
        }
        for i, prompt in enumerate(prompts[:_SHOWN])
    ]
    records = [asdict(row) for row in rows]
    for record, row in zip(records, rows, strict=True):
        if row.scores is not None:
            del record["scores"]["rewards"]
        record["cells"] = cells(row)
    return {
        "prompts": len(prompts),
        "optimum": best,
        "columns": list(_COLUMNS),
        "rows": records,
        "failed": missing(rows),
        "samples": shown,
    }
