"""Killed at random moments and started again, or done twice: the end is the same, to the last bit."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path

from scripts.judge_server import Settings, make_server
from scripts.reliability.lab import STAGES, Done, Lab, differing, digest
from scripts.reliability.pipelines import killed_pipelines
from scripts.reliability.row import Tally, row
from scripts.reliability.service import serving
from scripts.reliability.variants import BY_FOLDER, LABEL, MERGE, VARIANTS, Variant

CHAIN = 5


@row(
    "R4",
    "kill -9 at a random moment of every stage, then the same command again: whole and LoRA, ZeRO 0 to 3, and every"
    " scheme that keeps something between steps (controllers, running statistics, averages, baselines, refills, coupled"
    " losses, critics, judges, labels, merges)",
    expected="bit-identical end; at most one interval between checkpoints done again",
    asked="20 per stage",
    quick=1,
    full=20,
)
def killed_once(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: per stage, shared by its variants, whole and LoRA first; labels get half, merging and pipelines two."""
    numbers = {"label": (tries + 1) // 2, "merge": min(tries - 1, 2)}
    with judging() as judge:
        for stage, variants in VARIANTS.items():
            shared = dict.fromkeys(variants, 0)
            for variant, _ in zip(cycle(variants), range(numbers[stage] if stage in numbers else tries), strict=False):
                shared[variant] += 1
            for variant, times in shared.items():
                if times:
                    killed(lab, tally, variant, times, random.Random(f"{seed}{variant.folder}"), judge)
    killed_pipelines(lab, tally, tries // 10, seed)


def killed(lab: Lab, tally: Tally, variant: Variant, tries: int, draw: random.Random, judge: str) -> None:
    """One straight run, then `tries` that are killed once."""
    words, straight = prepared(lab, variant, judge)
    wanted = digest(lab.root / variant.folder)
    in_training = 0.0 if variant in MERGE else time.time() - first_row_at(lab.root / variant.folder)
    for number in range(tries):
        lab.clear(variant.folder)
        forget_replies(lab)
        is_later = number % 2 == 1 and variant not in MERGE  # the first half of a tiny run is its start
        moment = draw.uniform(0, in_training if is_later else straight.seconds)
        with tally.attempt(f"{variant.folder} killed {moment:.3f} s after its {'first step' if is_later else 'start'}"):
            child = lab.start(words, before=variant.before)
            if is_later:
                child.until(lambda: progress(lab.root / variant.folder) > 0)
            time.sleep(moment)
            child.kill()
            child.wait()
            before = progress(lab.root / variant.folder)
            resumed(lab, variant, words, wanted, before)
    if variant not in needed_by_others():
        lab.clear(variant.folder)


@row(
    "R5",
    "five kills in one run, each within the step after the last one's",
    expected="bit-identical end",
    asked="10 per stage",
    quick=1,
    full=60,
)
def killed_five_times(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: over all stages in turn, each of a variant of its own."""
    stages = [shuffled(variants, seed) for variants in ([VARIANTS[stage] for stage in reversed(STAGES)] + [LABEL])]
    with judging() as judge:
        for number, variants in zip(range(tries), cycle(stages), strict=False):
            variant = variants[number // len(stages) % len(variants)]
            words, straight = prepared(lab, variant, judge)
            wanted, draw = digest(lab.root / variant.folder), random.Random(f"{seed}{number}")
            lab.clear(variant.folder)
            forget_replies(lab)
            with tally.attempt(f"{variant.folder} killed {CHAIN} times"):
                for _ in range(CHAIN):
                    kill_in_next_step(lab, variant, words, draw.uniform(0, straight.seconds / 12))
                resumed(lab, variant, words, wanted, progress(lab.root / variant.folder))


def kill_in_next_step(lab: Lab, variant: Variant, words: list[str], pause: float) -> None:
    """Let a command log one step that it has done itself, and kill it `pause` seconds later."""
    log, begun = lab.root / variant.folder / "metrics.jsonl", time.time()
    child = lab.start(words, before=variant.before)
    child.until(lambda: log.exists() and any(row["time"] >= begun for row in whole_rows(log)))
    time.sleep(pause)
    child.kill()
    child.wait()


@row(
    "R20",
    "the same recipes twice, in two run directories, from the first stage on",
    expected="equal bytes: weights, optimizer, state, logs, published files",
    asked="25",
    quick=2,
    full=25,
)
def done_twice(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: stages compared; every round of five has a seed of its own."""
    for number in range(-(-tries // len(STAGES))):
        roots = [lab.work / f"twice-{number}-{side}" for side in "ab"]
        for stage in STAGES[: tries - number * len(STAGES)]:
            words = ["--set", f"train.seed={seed + number}"]
            with tally.attempt(f"{stage} with seed {seed + number}"):
                for root in roots:
                    done = lab.run(lab.command(stage, *words, root=root))
                    assert done.code == 0, done.err
                found = [digest(root / stage) for root in roots]
                assert not (different := differing(*found)), different
        for root in roots:
            for stage in STAGES:
                lab.clear(stage, root)


# --- what they share -------------------------------------------------------------------------------------------------


def shuffled(variants: list[Variant], seed: int) -> list[Variant]:
    """In an order that the seed says."""
    return random.Random(seed).sample(variants, len(variants))


def needed_by_others() -> list[Variant]:
    """What is kept for stages that begin from it."""
    return [BY_FOLDER[name] for variants in VARIANTS.values() for variant in variants for name in variant.needs]


def prepared(lab: Lab, variant: Variant, judge: str) -> tuple[list[str], Done]:
    """A variant's words, and how its straight run went, which is done now; what it needs is made before."""
    for name in variant.needs:
        done = lab.run(BY_FOLDER[name].command(lab), before=BY_FOLDER[name].before)
        assert done.code == 0, done.err
    words = variant.command(lab, judge)
    lab.clear(variant.folder)
    forget_replies(lab)
    straight = lab.run(words, before=variant.before)
    assert straight.code == 0, straight.err
    return words, straight


def resumed(lab: Lab, variant: Variant, words: list[str], wanted: dict[str, str], before: int) -> None:
    """The same command again ends as the straight run did. before: the last step in the log when it was killed."""
    done = lab.run(words, before=variant.before)
    assert done.code == 0, done.err
    assert not (different := differing(digest(lab.root / variant.folder), wanted)), different
    if variant not in (*LABEL, *MERGE) and "was finished before" not in done.out:
        lost = before - resumed_from(done.err)
        assert lost <= interval(variant), f"went on from {resumed_from(done.err)}, was at {before}"


def interval(variant: Variant) -> int:
    """Steps between checkpoints."""
    return int(variant.settings["checkpoint"]["every"]) if "checkpoint" in variant.settings else 1


def whole_rows(log: Path) -> list[dict[str, float]]:
    """The whole lines of a log."""
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]]


def first_row_at(stage: Path) -> float:
    """When the first row of metrics was written, in seconds since 1970."""
    return whole_rows(stage / "metrics.jsonl")[0]["time"]


def progress(stage: Path) -> int:
    """The last step in the log of a stage, 0 where there is none."""
    log = stage / "metrics.jsonl"
    rows = whole_rows(log) if log.exists() else []
    return int(rows[-1]["step"]) if rows else 0


def resumed_from(err: str) -> int:
    """The step that a command says it goes on from, 0 where it begins."""
    lines = [line for line in err.splitlines() if "goes on after step" in line]
    return int(lines[-1].split("after step ")[1].split()[0]) if lines else 0


def forget_replies(lab: Lab) -> None:
    """Judges are asked anew."""
    for kept in (lab.root / "cache").glob("judge-*.jsonl"):
        kept.unlink()


@contextmanager
def judging() -> Iterator[str]:
    """The address of a judge, which errs, since all answers of an untrained model are equally bad."""
    server = make_server(Settings(noise=1.0), 0)
    with serving(server):
        yield f"http://127.0.0.1:{server.server_port}"
