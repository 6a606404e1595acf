"""docs/performance.md: the tables that results make, and what stands around them. Pure text, no measuring."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scripts.bench.cases import Case, all_cases
from scripts.bench.measure import PARTS
from scripts.make_docs import table

Result = dict[str, Any]
QUIET = 0.1  # share of the machine that others may take before a row is marked
CLOCKS = {"wall": "wall clock", "cpu": "processor time"}


def page(results: Sequence[Result], command: str, wanted: int | None = None) -> str:
    """The whole page. command: what was typed. wanted: how many results it was to have, where that is known."""
    known = {case.name: case for case in all_cases()}
    named = [(known[result["case"]], result) for result in results]
    parts = [HEAD.format(command=command, machine=machine(results))]
    if wanted is not None and len(results) < wanted:
        parts.append(f"Incomplete: {len(results)} of {wanted} measurements are there.\n")
    for threads in sorted({result["threads"] for result in results}):
        own = [(case, result) for case, result in named if result["threads"] == threads]
        compared = [(case, result) for case, result in own if case.is_compared]
        if compared:
            clock = CLOCKS[compared[0][1]["clock"]]
            parts.append(f"## {threads} {'thread' if threads == 1 else 'threads'}, {clock}\n")
            parts += [speed_table(compared), "", split_table(compared), ""]
            if any(result["notes"] for _, result in compared):
                parts += [*note_lines(compared), ""]
    if ranks := [(case, result) for case, result in named if case.ranks > 1]:
        parts += [RANKS, rank_table(ranks, named), ""]
    if curves := [(case, result) for case, result in named if case.series]:
        parts += [GROWTH, growth_table(curves), "", *growth_lines(curves), ""]
    return "\n".join(parts).rstrip() + "\n"


def machine(results: Sequence[Result]) -> str:
    """What was measured on, and how quiet it was."""
    if not results:
        return "nothing was measured"
    peaks = {result["threads"]: result["peak"] for result in results if "ranks" not in result["case"]}
    shown = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s with {n} thread(s)" for n, peak in sorted(peaks.items()))
    fast = {n: result["fast_peak"] for n in peaks for result in results if result["threads"] == n}
    fast = {n: peak for n, peak in fast.items() if peak is not None}
    if fast:
        rates = ", ".join(f"{peak / 1e9:,.0f}" for _, peak in sorted(fast.items()))
        shown += f" in PyTorch, and {rates} by oneDNN, which our layers use on this processor; shares are of the first"
    others = [result["others"] for result in results if result["others"] is not None]
    busy = f"; other processes took {statistics.median(others):.0%} of the machine (median)" if others else ""
    return f"{results[0]['device']}, {results[0]['dtype']} matrix products reach {shown}{busy}"


# --- cells -----------------------------------------------------------------------------------------------------------


def tokens_per_second(result: Result, side: str) -> str:
    """A side's speed; empty where it took no part."""
    return f"{result['sides'][side]['rate']:,.0f}" if side in result["sides"] else ""


def ratio(result: Result, side: str) -> str:
    """Ours over a side's speed with its range over rounds, e.g. 2.41 (2.30-2.55)."""
    if side not in result["ratios"]:
        return ""
    found = result["ratios"][side]
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def share(result: Result, side: str) -> str:
    """Of the peak."""
    return f"{result['sides'][side]['share']:.0%}" if side in result["sides"] else ""


def megabytes(result: Result, side: str) -> str:
    """Peak memory of a step."""
    memory = result["sides"][side]["memory"] if side in result["sides"] else None
    return "" if memory is None else f"{memory / 1e6:,.0f}"


def split(result: Result, side: str) -> str:
    """Seconds of the parts of a step: generate / score / train."""
    parts = result["sides"][side]["parts"] if side in result["sides"] else {}
    return " / ".join(f"{parts[part]:.2f}" if part in parts else "-" for part in PARTS) if parts else ""


def loss(result: Result, side: str) -> str:
    """Of the first measured step."""
    value = result["sides"][side]["loss"] if side in result["sides"] else None
    return "" if value is None else f"{value:.4f}"


def others(result: Result) -> str:
    """What other processes took, marked where the row is disturbed."""
    value = result["others"]
    return "" if value is None else f"{value:.0%}{' !' if value > QUIET else ''}"


# --- tables ----------------------------------------------------------------------------------------------------------

Named = Sequence[tuple[Case, Result]]


def speed_table(named: Named) -> str:
    """Speed, ratios, share of the peak."""
    header = ("case", "ours, tok/s", "TRL", "ours / TRL", "raw", "ours / raw", "of peak: ours", "TRL", "raw", "others")
    rows = [
        (
            case.text,
            tokens_per_second(result, "ours"),
            tokens_per_second(result, "trl"),
            ratio(result, "trl"),
            tokens_per_second(result, "raw"),
            ratio(result, "raw"),
            *(share(result, side) for side in ("ours", "trl", "raw")),
            others(result),
        )
        for case, result in named
    ]
    return table(header, rows)


def split_table(named: Named) -> str:
    """Parts of a step, memory, losses."""
    sides = ("ours", "trl", "raw")
    header = ["case"]
    for what in ("seconds (generate / score / train)", "MB", "loss"):
        header += [f"{what}: ours" if side == "ours" else side.replace("trl", "TRL") for side in sides]
    rows = [
        (case.text, *(cell(result, side) for cell in (split, megabytes, loss) for side in sides))
        for case, result in named
    ]
    return table(tuple(header), rows)


def note_lines(named: Named) -> list[str]:
    """Why a side is missing."""
    return [f"- {case.text}: {note}" for case, result in named for note in result["notes"]]


def rank_table(ranks: Named, named: Named) -> str:
    """Two ranks of one thread beside one rank, with two threads where that was measured, else with one."""
    rows = []
    for case, result in ranks:
        twins = [r for c, r in named if c.is_compared and _twin(c, case) and r["threads"] <= case.ranks]
        plain = max(twins, key=lambda r: r["threads"], default=None)
        both = "" if plain is None else f"{result['sides']['ours']['rate'] / plain['sides']['ours']['rate']:.2f}"
        before = "" if plain is None else tokens_per_second(plain, "ours")
        threads = "" if plain is None else str(plain["threads"])
        numbers = (tokens_per_second(result, "ours"), before, threads, both)
        rows.append((case.text, *numbers, split(result, "ours"), others(result)))
    return table(("case", "tok/s", "on one rank", "its threads", "times", "seconds of a step", "others"), rows)


def _twin(one: Case, many: Case) -> bool:
    fields = ("stage", "model", "rows", "answers", "lora", "live", "sampling", "decode", "tokens")
    return all(getattr(one, field) == getattr(many, field) for field in fields)


def growth_table(curves: Named) -> str:
    """Time and memory against tokens."""
    rows = [
        (
            case.series,
            case.text,
            str(result["threads"]),
            f"{result['sides']['ours']['tokens']:,.0f}",
            f"{result['sides']['ours']['seconds']:.2f}",
            f"{1e6 * result['sides']['ours']['seconds'] / result['sides']['ours']['tokens']:.0f}",
            megabytes(result, "ours"),
            others(result),
        )
        for case, result in curves
    ]
    header = ("growing", "case", "threads", "tokens of a step", "seconds", "µs per token", "MB", "others")
    return table(header, rows)


def growth_lines(curves: Named) -> list[str]:
    """How straight each curve is."""
    lines = []
    keys = sorted({(result["threads"], case.series) for case, result in curves}, key=str)
    for threads, series in keys:
        points = [r["sides"]["ours"] for c, r in curves if c.series == series and r["threads"] == threads]
        for what, unit, scale in (("seconds", "µs", 1e6), ("memory", "kB", 1e-3)):
            known = [(point["tokens"], point[what]) for point in points if point[what] is not None]
            if len(known) > 2:
                slope, fit = line(known)
                text = f"- {series}, {threads} thread(s): {what} grow by {slope * scale:,.1f} {unit} per token"
                lines.append(f"{text}; a straight line explains {fit:.1%} of the differences")
    return lines


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """(slope, R squared) of the least-squares line."""
    xs, ys = zip(*points, strict=True)
    slope, _ = statistics.linear_regression(xs, ys)
    return slope, 1.0 if len(set(ys)) == 1 else statistics.correlation(xs, ys) ** 2


HEAD = """\
<!-- Made by `python -m scripts.bench`: run that again, do not edit. -->
# Performance

Our stages, TRL's trainers and plain torch loops, on the same rows, tokens, weights, precision and steps. Made by

    {command}

on {machine}.

- **ours**: the stage as `rlhf STAGE` runs it: its recipe, data, DeepSpeed engine, objectives, checks and loop.
- **TRL**: its trainer's own step (sampling and rewards included), tuned: gradient checkpointing and bf16 autocast, \
on by default, are off; AdamW is the same.
- **raw**: a loop in plain torch without engine, checks or metrics: one flat row without padding, the head on loss \
tokens only, a prompt computed once for all its answers, a static cache in sampling. It stands for what the machine \
allows; ours should reach 0.9 of it. There is none with LoRA.
- **tok/s**: real tokens of a step, prompts included, over its time; in generation the sampled ones. Sides take turns \
step by step in one process. Speeds are medians over rounds; ratios are taken within a round, with their range.
- **of peak**: useful operations (two per weight and token forward, twice that backward, causal attention, the head \
where it is needed) over what matrix products reach. Padding and recomputation are not useful. Who computes a prompt \
once for several answers does less, and may pass 100 %.
- **seconds**: wall clock. Score is rewards, reference and values. **MB**: what a step needs at its peak beside what \
stays between steps.
- **loss**: of the first measured step. Sides that learn from given rows agree; those that sample see answers of \
their own.
- **others**: share of the machine that other processes took meanwhile; rows with more than {quiet:.0%} are marked !, \
and should be measured again.
""".replace("{quiet:.0%}", f"{QUIET:.0%}")

RANKS = """\
## Two ranks

Through the `deepspeed` launcher, a thread per rank, beside one rank.
"""

GROWTH = """\
## How cost grows

Ours alone. `length`: rows of one length, more tokens each; `batch`: more rows; `group`: more answers to each of four \
prompts. Attention grows with the square of the length, so the first curve bends upwards: by little as long as linear \
layers dominate. Memory between steps is left out, which is why a line need not pass through zero.
"""
