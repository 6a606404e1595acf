"""`rlhf label`: a policy answers, rewards or a judge score, and answers to the same prompt become preference pairs.

A step is a slice of the prompts. Its answers are appended to answers.jsonl, which is all that a stage needs to go on;
pairs.jsonl, best.jsonl and lists.jsonl are written at the end, from the whole of it. Prompts that are sampled together,
and their seeds, depend on the recipe alone: all bytes are the same on any number of ranks, in one go or resumed.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf.data.examples import PromptExample
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import DataError, UserError
from rlhf.recipe.stages import LabelBlock, LabelRecipe
from rlhf.rewards import verdicts
from rlhf.rewards.scorer import Scorer
from rlhf.run import commit
from rlhf.run.stage import StageDir
from rlhf.train import roles, scorers
from rlhf.train.guards import check_judged, check_scored
from rlhf.train.job import Job
from rlhf.train.judge import Judge, judge
from rlhf.train.loop import Collected, Stage
from rlhf.train.pairing import Row, best_of_n, best_rows, list_rows, pair_rows
from rlhf.train.parts import sampler
from rlhf.train.pool import Budget
from rlhf.train.rollout import Sampler, generate, in_turns
from rlhf.train.seeding import derive

logger = logging.getLogger("rlhf.label")


# --- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelCollector:
    """Feeds the loop with nothing to learn from: it samples, scores and writes."""

    recipe: LabelRecipe
    prompts: list[PromptExample]
    sampler: Sampler
    policy: Engine
    scorer: Scorer | None  # one of scorer and judge
    judge: Judge | None
    folder: StageDir

    @property
    def label(self) -> LabelBlock:
        """The options."""
        return self.recipe.label

    @property
    def steps(self) -> int:
        """Slices of the prompts."""
        return math.ceil(len(self.prompts) / self.label.batch)

    def collect(self, step: int) -> Collected:
        """The answers to one slice of the prompts, written on rank 0."""
        places = list(range(step * self.label.batch, min((step + 1) * self.label.batch, len(self.prompts))))
        size = self.label.prompts_together()
        batches = [places[i : i + size] for i in range(0, len(places), size)]
        with self.policy.gathered() as policy:
            found = in_turns(batches, lambda batch: self.answer(policy, batch, size))
        answers = sorted(found, key=lambda row: row["place"])
        if self.judge is not None:
            answers = self.judge(answers, step)
        check = check_scored if self.judge is None else check_judged
        check(sum(row["score"] is not None for row in answers), len(answers), step)
        if dist.is_main():
            for row in answers:
                commit.append_jsonl(self.folder.answers, {k: v for k, v in row.items() if k not in ("place", "tokens")})
        return Collected([], self.describe(answers), sum(row["tokens"][0] for row in answers))

    def answer(self, policy: Any, places: list[int], size: int) -> list[Row]:
        """Sampled and scored answers to the prompts at these places, as rows.

        A short batch is filled up with its last prompt, whose further answers are dropped, so that all are alike.
        """
        filled = places + places[-1:] * (size - len(places))
        seeds = [derive(self.label.seed, "label", place, g) for place in filled for g in range(self.label.answers)]
        examples = [self.prompts[place] for place in filled]
        ask = partial(generate, policy, examples, seeds, self.recipe.sampling, self.sampler, self.label.rollout_batch)
        rollout = dist.agreed(ask)
        found = None if self.scorer is None else self.scorer(rollout)
        lengths, widths = rollout.response_mask.sum(-1).tolist(), rollout.attention.sum(-1).tolist()
        rows = []
        for i in range(len(places) * self.label.answers):
            place, number = divmod(i, self.label.answers)
            example = examples[place]
            # A NUL is text that no reader of rows takes: such an answer cannot be compared.
            score = None if found is None or "\0" in rollout.texts[i] else known(float(found.total[i]))
            scores = {} if found is None else {name: known(float(part[i])) for name, part in found.parts.items()}
            rows.append(
                {
                    "place": (places[place], number),
                    "tokens": (widths[i], lengths[i]),
                    "row": example.row,
                    "prompt": example.fields["messages"],
                    "answer": rollout.texts[i],
                    "score": score,
                    "scores": scores,
                    "finished": bool(rollout.finished[i]),
                }
            )
        return rows

    def describe(self, answers: list[Row]) -> dict[str, float]:
        """What the answers of a step were like, and what became of them."""
        scores = [row["score"] for row in answers if row["score"] is not None]
        pairs, left_out = pair_rows(answers, self.label, first=answers[0]["place"][0])
        metrics = {
            "reward/score_mean": statistics.fmean(scores),
            "reward/unscored": float(len(answers) - len(scores)),
            "rollout/length_mean": statistics.fmean(row["tokens"][1] for row in answers),
            "rollout/finished": statistics.fmean(row["finished"] for row in answers),
            "label/pairs": float(len(pairs)),
            "label/ties": float(left_out["ties"]),
            "label/close": float(left_out["close"]),
            "label/equal_texts": float(left_out["equal_texts"]),
            "label/too_few_scored": float(left_out["too_few_scored"]),
            "label/unfinished": float(left_out["unfinished"]),
            **verdicts.metrics(answers),
        }
        if best := best_rows(answers, self.label):
            metrics["label/best_score"] = statistics.fmean(row["score"] for row in best)
        if pairs:
            metrics["label/margin"] = statistics.fmean(row["score_margin"] for row in pairs)
        if len(scores) > 1:
            metrics["reward/score_std"] = statistics.stdev(scores)
        for name in answers[0]["scores"]:
            if values := [row["scores"][name] for row in answers if row["scores"][name] is not None]:
                metrics[f"reward/{name}"] = statistics.fmean(values)
        return metrics

    def guard(self, step: int, metrics: dict[str, float]) -> None:
        """Nothing is trained, so there is nothing to guard."""

    def learned(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], UserError | None]:
        """Nothing is adapted between steps."""
        return {}, None


def known(value: float) -> float | None:
    """A score as JSON has it: nothing where there is none."""
    return None if math.isnan(value) else value


# --- the stage -------------------------------------------------------------------------------------------------------


def collector(job: Job, tokenizer: PreTrainedTokenizerFast, prompts: list[PromptExample]) -> LabelCollector:
    """The stage's models and prompts."""
    recipe = job.recipe
    assert isinstance(recipe, LabelRecipe)
    policy = roles.frozen_policy(job, tokenizer)
    ask = sampler(policy, tokenizer, recipe.sampling, job.stop.check)
    asked = judge(job, tokenizer, policy) if recipe.judge is not None else None
    labeller = (
        None
        if asked
        else scorers.scorer(job, tokenizer, recipe.rewards, key="rewards", shared=None, budget=Budget.of(recipe))
    )
    return LabelCollector(recipe, prompts, ask, policy, labeller, asked, job.folder)


def to_stage(source: LabelCollector, report: Callable[[int, str, float | None], None]) -> Stage:
    """The stage as the loop sees it: no objective, and no checkpoint, since the written answers are one."""
    return Stage(
        steps=source.steps,
        updates_per_step=0,
        budget=Budget.of(source.recipe),
        collector=source,
        objectives=[],
        seed=source.recipe.label.seed,
        key_metric="reward/score_mean",
        log_every=source.recipe.log.every,
        checkpoint_every=0,
        report=report,
        skips=None,
    )


def go_on(source: LabelCollector) -> int:
    """Cut the answers back to whole steps, on rank 0; returns how many steps are done."""
    rows = commit.read_jsonl(source.folder.answers)
    per_step = source.label.batch * source.label.answers
    whole = source.steps if len(rows) >= len(source.prompts) * source.label.answers else len(rows) // per_step
    done = min(whole, int(source.folder.read_status()["step"]))  # a step is done when its metrics are written too
    write_rows(source.folder.answers, rows[: done * per_step])
    return done


def publish(source: LabelCollector) -> None:
    """Write the pairs and what else is made of the answers, then the manifest, on rank 0."""
    folder, label = source.folder, source.label
    answers = commit.read_jsonl(folder.answers)
    pairs, left_out = pair_rows(answers, label)
    logger.info("%d pairs; left out: %s", len(pairs), dict(sorted(left_out.items())) or "none")
    if not pairs:
        raise DataError(
            f"expected answers to make pairs, found none among {len(answers)}: {', '.join(sorted(left_out))}",
            where=str(folder.answers),
            fix="Sample more answers (label.answers) or at a higher sampling.temperature, or lower label.min_margin.",
        )
    best, lists = best_rows(answers, label), list_rows(answers, label)
    made = {folder.pairs: pairs, folder.best: best, folder.lists: lists}
    for path, rows in made.items():
        write_rows(path, rows)
    best_of = best_of_n(answers, label)
    told = ", ".join(f"{point['n']}: {point['score']:.3g}" for point in best_of["curve"])
    logger.info("score of the best of n answers: %s", told or "unknown, no prompt has all its answers scored")
    facts = {
        "prompts": len(source.prompts),
        "answers": len(answers),
        "unscored": sum(row["score"] is None for row in answers),
        "pairs": len(pairs),
        "best": len(best),
        "lists": len(lists),
        "left_out": dict(sorted(left_out.items())),
        "best_of_n": best_of,
    }
    if source.judge is not None:
        facts["judge"] = dict(sorted(verdicts.counted(answers).items()))
        logger.info("judge: %s; %d replies asked for, %d cached", facts["judge"], *source.judge.cache.counts.values())
    folder.publish("data", facts, source.steps, plain_files=[*made, folder.answers])


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write all rows of a file at once."""
    commit.write_atomic(path, "".join(json.dumps(commit.plain(row), allow_nan=False) + "\n" for row in rows))
