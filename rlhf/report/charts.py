"""Curves as inline SVG: which metrics belong into one chart, and how a chart is drawn."""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

from rlhf.report.tags import Markup

_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#4b5563")
_BAD, _ALARM, _LEVEL = "#dc2626", "#d97706", "#64748b"
_MOST_POINTS = 800
_SMOOTH_FROM = 40  # points; longer curves are drawn pale with a moving average over them


@dataclass(frozen=True)
class Chart:
    """One chart: every metric that matches a pattern is a curve of it."""

    title: str
    patterns: tuple[str, ...]
    unit: str
    least: int = 1  # metrics below which the chart would only repeat another one
    points: bool = False  # no line: the order of the points means nothing
    log: bool = False  # logarithmic where the values span more than a factor of 30
    against_distance: bool = False  # over the square root of the KL to the reference instead of the step


@dataclass(frozen=True)
class Marks:
    """What is drawn beside the curves."""

    gaps: Sequence[int] = ()  # steps without a finite value, in red
    alarms: Sequence[int] = ()  # steps at which an alarm was on, in amber
    level: float | None = None  # a target, as a dashed line


NO_MARKS = Marks()
ALARM = "alarm/"


# Ordered as one reads a run: is it learning, at what price, is it healthy, how fast.
CHARTS: tuple[Chart, ...] = (
    Chart("Loss", ("train/loss", "eval/loss"), "nats"),
    Chart("Reward", ("reward/score_mean",), "score"),
    Chart("Reward that is not learned from", ("test/score_mean",), "score"),
    Chart("Train score and test score", ("test/train_shift", "test/shift"), "deviations at the start"),
    Chart(
        "Train score ahead of test score", ("test/gap",), "deviations at the start", points=True, against_distance=True
    ),
    Chart(
        "Parts of the reward",
        (
            "reward/model*",
            "reward/exact*",
            "reward/numeric*",
            "reward/format*",
            "reward/length*",
            "reward/function*",
            "reward/process*",
            "reward/http*",
            "reward/demo_gold*",
        ),
        "score",
        least=2,
    ),
    Chart("Parts of the reward that is not learned from", ("test/*",), "score", least=2),
    Chart("Spread of the reward", ("reward/score_std",), "score"),
    Chart("Accuracy", ("train/accuracy", "eval/accuracy"), "share of pairs"),
    Chart("Margin, chosen over rejected", ("train/margin", "eval/margin"), "score"),
    Chart("Scores", ("train/score_*",), "score"),
    Chart("Implicit rewards", ("train/reward_*",), "nats x beta"),
    Chart("Log-probability of the answers", ("train/logprobs_*",), "nats per answer"),
    Chart("Distance to the reference (KL)", ("rollout/kl_ref",), "nats per answer"),
    Chart("Weight of the KL", ("kl/coef",), ""),
    Chart("KL term of the loss", ("policy/kl_loss",), "nats per token"),
    Chart("Length of the answers", ("rollout/length_mean",), "tokens"),
    Chart("Answers that another one repeats", ("rollout/repeated",), "share"),
    Chart("Answers that end by themselves", ("rollout/finished",), "share"),
    Chart("Entropy of the policy", ("policy/entropy",), "nats per token"),
    Chart("Policy loss", ("policy/loss",), ""),
    Chart("Clipped updates", ("policy/clipfrac", "value/clipfrac"), "share of tokens"),
    Chart("Change of the policy per step", ("policy/approx_kl",), "nats per token"),
    Chart("Supervised loss mixed in", ("ptx/loss",), "nats per token"),
    Chart("Value loss", ("value/loss",), ""),
    Chart("Explained variance of the critic", ("value/explained_variance",), "share"),
    Chart("Values and returns", ("value/mean", "value/return_mean"), "score"),
    Chart("Gradient norm", ("*/grad_norm",), "", log=True),
    Chart("Learning rate", ("*/lr",), ""),
    Chart("Groups whose answers all score the same", ("reward/flat_groups",), "share"),
    Chart("Chosen answers less likely than before", ("train/chosen_displaced",), "share"),
    Chart("Sampling against training", ("rollout/sampler_gap",), "nats per token"),
    Chart("Speed", ("speed/*tokens_per_second",), "tokens per second"),
    Chart("Time per step", ("speed/*seconds",), "seconds"),
)


@dataclass(frozen=True)
class Planned:
    """A chart and the metrics that a stage has for it."""

    chart: Chart
    names: list[str]


def plan(names: Sequence[str]) -> tuple[list[Planned], list[str]]:
    """The charts of a stage, and the metrics that no chart asks for. A metric goes to the first chart that wants it.

    Alarms are no curves: they are marked in those of the metrics they look at.
    """
    left = [name for name in names if not name.startswith(ALARM)]
    planned = []
    for chart in CHARTS:
        mine = [name for name in left if any(fnmatchcase(name, pattern) for pattern in chart.patterns)]
        left = [name for name in left if name not in mine]
        if len(mine) >= chart.least:
            planned.append(Planned(chart, mine))
    return planned, left


def is_noisy(values: Sequence[float]) -> bool:
    """Whether a curve is long and turns so often that its trend needs to be drawn."""
    changes = [b - a for a, b in pairwise(values)]
    turns = sum(a * b < 0 for a, b in pairwise(changes))
    return len(values) >= _SMOOTH_FROM and turns > 0.25 * len(values)


def moving_average(values: Sequence[float], width: int) -> list[float]:
    """Means over centred windows of `width` values, narrower at the ends."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def thin(series: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """A long curve with fewer points: of each stretch the one farthest from the stretch's mean, so that spikes stay."""
    size = -(-len(series) // _MOST_POINTS)
    if size <= 1:
        return series
    kept = []
    for start in range(0, len(series), size):
        stretch = series[start : start + size]
        mean = sum(value for _, value in stretch) / len(stretch)
        kept.append(max(stretch, key=lambda point: abs(point[1] - mean)))
    return kept


def draw(
    chart: Chart,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    place: str,
    marks: Marks = NO_MARKS,
    x_label: str = "step",
) -> Markup:
    """An SVG of the curves, with marks beside them.

    place: where the drawing stands; equal drawings at two places of a page need ids of their own.
    """
    import matplotlib  # imported here: a page without curves does without it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.size": 8, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.4, 2.3))
        figure.subplots_adjust(left=0.15, right=0.985, top=0.97, bottom=0.15)
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        _dress(axes, chart, x_label)
        for number, (name, series) in enumerate(curves.items()):
            _curve(axes, _label(name, curves), series, _COLOURS[number % len(_COLOURS)], points=chart.points)
        _mark(axes, marks)
        values = [value for series in curves.values() for _, value in series]
        if chart.log and min(values) > 0 and max(values) > 30 * min(values):
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.10g}")
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=7, handlelength=1.2, loc="best")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), chart.title, place)


def _dress(axes: Any, chart: Chart, x_label: str) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#cbd5e1")
    axes.tick_params(colors="#64748b", length=2.5, width=0.6)
    axes.grid(axis="y", color="#e2e8f0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.08)
    axes.locator_params(axis="x", nbins=7, integer=x_label == "step")
    axes.set_xlabel(x_label, color="#64748b", fontsize=7, loc="right", labelpad=1)
    axes.set_ylabel(chart.unit, color="#64748b", fontsize=7)


def _curve(axes: Any, label: str, series: Sequence[tuple[float, float]], colour: str, *, points: bool) -> None:
    if points:
        axes.plot(*zip(*series, strict=True), "o", color=colour, markersize=2.5, alpha=0.6, label=label)
        return
    steps, values = [step for step, _ in series], [value for _, value in series]
    if is_noisy(values):
        axes.plot(*zip(*thin(series), strict=True), color=colour, linewidth=0.7, alpha=0.25)
        smooth = moving_average(values, max(3, len(values) // 20))
        steps, values = map(list, zip(*thin(list(zip(steps, smooth, strict=True))), strict=True))
    marker = "o" if len(series) <= 12 else None
    axes.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3, label=label)


def _mark(axes: Any, marks: Marks) -> None:
    for steps, colour in ((marks.alarms, _ALARM), (marks.gaps, _BAD)):
        for step in steps:
            axes.axvline(step, color=colour, linewidth=0.8, alpha=0.5)
    if marks.level is not None:
        axes.axhline(marks.level, color=_LEVEL, linewidth=1.0, linestyle="--")


def _label(name: str, curves: Collection[str]) -> str:
    """The shortest part of a metric's name that tells it from the others."""
    tails = [other.rpartition("/")[2] for other in curves]
    heads = [other.partition("/")[0] for other in curves]
    if len(set(tails)) == len(tails):
        return name.rpartition("/")[2].replace("_", " ")
    return name.partition("/")[0] if len(set(heads)) == len(heads) else name


def _inline(svg: str, title: str, place: str) -> Markup:
    """An SVG document as an element of a page: no prolog, scaled to its container, the page's font, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    prefix = f"c{hashlib.sha256((place + title + svg).encode()).hexdigest()[:8]}-"
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(title)}" ', 1))
