"""The parts of the page: overview, findings, the demo's table, comparison, and one section per stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rlhf.recipe.guard_options import metric_of_alarms
from rlhf.report.charts import ALARM, Chart, Marks, Planned, draw, plan
from rlhf.report.collect import RunPage, SampleGroup, Series, StagePage, as_json, pick
from rlhf.report.findings import Finding
from rlhf.report.tags import Child, Markup, tag

_MOST_SAMPLES = 8
_MOST_COMPARED = 8
_FRONTIER = Chart("Reward against distance from the reference", (), "score", points=True)
_REWARD = Chart("Reward", (), "score")


def table(head: Iterable[str], rows: Iterable[Iterable[Child]], numbers: Iterable[int] = ()) -> Markup:
    """A table; `numbers` are the columns that are aligned to the right."""
    right = set(numbers)

    def row(kind: str, values: Iterable[Child]) -> Markup:
        return tag("tr", [tag(kind, v, class_="number" if i in right else None) for i, v in enumerate(values)])

    return tag("table", tag("thead", row("th", head)), tag("tbody", [row("td", values) for values in rows]))


def pill(text: str, kind: str) -> Markup:
    """A small coloured label."""
    return tag("span", text, class_=f"pill {kind}")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.1f} min" if minutes >= 2 else f"{seconds:.0f} s"


# --- the run -------------------------------------------------------------------------------------------------------


def stage_table(run: RunPage) -> Markup:
    """One row per stage."""
    return table(
        ("stage", "command", "state", "steps", "key metric", "made from", "time"), map(_stage_row, run.stages), (3, 6)
    )


def _stage_row(stage: StagePage) -> list[Child]:
    summary = stage.summary
    metric = "-"
    if summary.key_metric is not None:
        name, value = summary.key_metric
        metric = f"{name} {value:.4g}" if isinstance(value, (int, float)) else str(name)
    ended = summary.started is not None and summary.ended is not None
    return [
        tag("a", summary.name, href=f"#{summary.name}"),
        summary.stage,
        pill(summary.state, summary.state),
        f"{summary.step} of {summary.total_steps}" if summary.total_steps else str(summary.step),
        metric,
        ", ".join(dict.fromkeys(summary.parents)) or "-",
        duration(summary.ended - summary.started) if ended else "-",  # type: ignore[operator]
    ]


def look_at(run: RunPage, found: Mapping[str, list[Finding]]) -> list[Markup]:
    """Findings of all stages in one place."""
    lines = sorted(
        ((name, finding) for name, mine in found.items() for finding in mine), key=lambda line: not line[1].is_bad
    )
    items = [_finding(finding, tag("a", name, href=f"#{name}")) for name, finding in lines]
    items += [_finding(Finding(problem)) for problem in run.problems]
    return (
        [tag("h2", "What to look at"), tag("div", tag("ul", items, class_="findings"), class_="card")] if items else []
    )


def _finding(finding: Finding, link: Markup | None = None) -> Markup:
    return tag("li", link, ": " if link else None, finding.text, class_="bad" if finding.is_bad else None)


def demo_table(demo: dict[str, Any]) -> list[Markup]:
    """What the gold reward says about each stage, with the verdicts and a few answers side by side."""
    rows = [row for row in pick(demo, "rows", list) or [] if pick(row, "cells", list)]
    columns = [str(name) for name in pick(demo, "columns", list) or []]
    optimum = pick(demo, "optimum", float)
    best = [["optimum", f"{optimum:.2f}", "100%", *[""] * (len(columns) - 3)]] if optimum is not None else []
    scores = table(columns, [[str(cell) for cell in row["cells"]] for row in rows] + best, range(1, len(columns)))
    title = f"Held-out prompts, judged by the gold reward ({pick(demo, 'prompts', int)} prompts)"
    verdicts = [_verdict(row) for row in rows if pick(row, "checks", list)]
    samples = [_judged_sample(sample) for sample in pick(demo, "samples", list) or []]
    return [
        tag("h2", title),
        tag("div", scores, class_="card scroll"),
        tag("div", table(("", "stage", "requirements"), verdicts), class_="card scroll verdicts")
        if verdicts
        else Markup(""),
        tag("details", tag("summary", "Answers of every stage to the same prompts"), samples)
        if samples
        else Markup(""),
    ]


def _verdict(row: dict[str, Any]) -> list[Child]:
    checks = [check for check in row["checks"] if isinstance(check, dict)]
    passed = all(pick(check, "passed", bool) for check in checks)
    texts = [
        [tag("br") if number else None, "" if pick(check, "passed", bool) else "✗ ", str(pick(check, "text", str))]
        for number, check in enumerate(checks)
    ]
    return [pill("pass" if passed else "fail", "pass" if passed else "fail"), pick(row, "stage", str), texts]


def _judged_sample(sample: Any) -> Markup:
    rows = [
        [pick(each, "stage", str), pick(each, "answer", str), f"{pick(each, 'gold', float) or 0.0:.2f}"]
        for each in pick(sample, "answers", list) or []
    ]
    return tag(
        "div",
        tag("div", str(pick(sample, "prompt", str)), class_="soft"),
        table(("stage", "answer", "gold reward"), rows, (2,)),
        class_="card",
    )


def comparison(run: RunPage) -> list[Markup]:
    """The on-policy stages in the same charts: reward over steps, and reward against what it cost in KL."""
    both = ("reward/score_mean", "rollout/kl_ref")
    stages = [stage for stage in run.stages if all(name in stage.series for name in both)][:_MOST_COMPARED]
    if len(stages) < 2:
        return []
    rewards = {stage.summary.name: stage.series[both[0]] for stage in stages}
    frontier = {stage.summary.name: _against(stage.series[both[1]], stage.series[both[0]]) for stage in stages}
    drawing = draw(_FRONTIER, frontier, "comparison", x_label="KL to the reference, nats per answer")
    charts = [_figure(_REWARD.title, "", draw(_REWARD, rewards, "comparison")), _figure(_FRONTIER.title, "", drawing)]
    return [tag("h2", "Stages compared"), tag("div", charts, class_="charts")]


def _against(across: Series, up: Series) -> list[tuple[float, float]]:
    """Points (value of `across`, value of `up`) of the steps that have both."""
    values = dict(up)
    return [(x, values[step]) for step, x in across if step in values]


# --- a stage -------------------------------------------------------------------------------------------------------


def stage_section(stage: StagePage, found: list[Finding]) -> Markup:
    """Everything about one stage."""
    summary = stage.summary
    title = tag("h2", summary.name, " ", pill(summary.state, summary.state))
    return tag(
        "section",
        title,
        tag("div", tag("ul", [_finding(finding) for finding in found], class_="findings"), class_="card")
        if found
        else None,
        _curves(stage),
        _samples(stage.samples),
        _data(stage),
        _facts(stage),
        id=summary.name,
    )


def _curves(stage: StagePage) -> list[Markup]:
    """The charts that matter, and the other metrics folded away."""
    if not stage.series:
        return [tag("p", "No metrics were written.", class_="soft")]
    planned, others = plan(list(stage.series))
    rest = [Planned(Chart(name, (), ""), [name]) for name in others]
    parts = [tag("h3", "Curves"), tag("div", [chart(stage, each) for each in planned], class_="charts")]
    if rest:
        further = tag("div", [chart(stage, each) for each in rest], class_="charts")
        parts.append(tag("details", tag("summary", "Further curves"), further))
    return parts


def chart(stage: StagePage, planned: Planned) -> Markup:
    """One chart with its title and the last value of its first curve."""
    curves = {name: stage.series[name] for name in planned.names}
    before, after = curves[planned.names[0]][0][1], curves[planned.names[0]][-1][1]
    change = f"{before:.4g} → {after:.4g}" if len(curves[planned.names[0]]) > 1 else f"{after:.4g}"
    if planned.chart.against_distance and "rollout/kl_ref" in stage.series:
        distances = [(step, math.sqrt(max(0.0, kl))) for step, kl in stage.series["rollout/kl_ref"]]
        paths = {name: points for name, series in curves.items() if (points := _against(distances, series))}
        if paths:
            drawing = draw(planned.chart, paths, stage.summary.name, x_label="√ KL to the reference, √ nats per answer")
            return _figure(planned.chart.title, change, drawing)
    return _figure(planned.chart.title, change, draw(planned.chart, curves, stage.summary.name, _marks(stage, planned)))


def _marks(stage: StagePage, planned: Planned) -> Marks:
    gaps = {step for name in planned.names if name in stage.gaps for step in stage.gaps[name]}
    looking = [ALARM + alarm for alarm, metric in metric_of_alarms().items() if metric in planned.names]
    alarms = {step for name in looking if name in stage.series for step, _ in stage.series[name]}
    level = kl_target(stage) if "rollout/kl_ref" in planned.names else None
    return Marks(sorted(gaps), sorted(alarms), level)


def kl_target(stage: StagePage) -> float | None:
    """The KL, in nats per answer, that an adaptive weight of the KL steers to; None where the weight is fixed."""
    recipe = pick(pick(stage.provenance, "inputs", dict), "recipe", dict)
    controller = pick(pick(recipe, "kl", dict), "controller", dict)
    target = pick(controller, "target", float) if pick(controller, "name", str) == "adaptive" else None
    return target if target is not None and math.isfinite(target) else None


def _figure(title: str, note: str, drawing: Markup) -> Markup:
    return tag("figure", tag("figcaption", title, tag("span", note)), drawing)


def _samples(groups: list[SampleGroup]) -> list[Markup]:
    if not groups:
        return []
    more = len(groups) - _MOST_SAMPLES
    return [
        tag("h3", "Samples, before and after"),
        *[_sample(group) for group in groups[:_MOST_SAMPLES]],
        tag("p", f"{more} more in samples.jsonl", class_="soft") if more > 0 else Markup(""),
    ]


def _sample(group: SampleGroup) -> Markup:
    sides = [group.first] if group.first is group.last else [group.first, group.last]
    heads = [tag("div", _step(side), class_="step") for side in sides]
    kinds = ["answer", "answer after"]
    answers = [tag("div", str(side["answer"]), class_=kind) for side, kind in zip(sides, kinds, strict=False)]
    lone = [Markup("<div></div>")] if len(sides) == 1 else []
    prompt = tag("div", group.prompt, class_="prompt")
    return tag("div", prompt, *heads, *lone, *answers, class_="card sample")


def _step(side: dict[str, Any]) -> str:
    score = side["score"] if isinstance(side.get("score"), (int, float)) else None
    return f"step {side['step']}" + (f" · score {score:.3g}" if score is not None else "")


def _data(stage: StagePage) -> list[Markup]:
    data = pick(stage.provenance, "data", dict)
    sources = [source for source in pick(data, "sources", list) or [] if isinstance(source, dict)]
    if not sources:
        return []
    rows = [
        [
            pick(source, "path", str),
            pick(source, "format", str),
            *(f"{number:,}" if (number := pick(source, key, int)) is not None else "-" for key in ("read", "kept")),
            _reasons(pick(source, "dropped", dict)),
            _reasons(pick(source, "changed", dict)),
        ]
        for source in sources
    ]
    head = ("source", "format", "rows read", "kept", "dropped", "changed")
    return [
        tag("h3", "Data"),
        tag("div", table(head, rows, (2, 3)), _tokens(data), class_="card scroll"),
    ]


def _reasons(counts: dict[str, Any] | None) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in (counts or {}).items()) or "-"


def _tokens(data: dict[str, Any] | None) -> list[Markup]:
    lines = []
    for key, name in (("train", "training"), ("eval", "held out")):
        part = pick(data, key, dict)
        rows, tokens = pick(part, "rows", int), pick(part, "tokens", int)
        if rows and tokens is not None:
            longest = pick(part, "longest", int)
            text = f"{name}: {rows:,} rows, {tokens:,} tokens, mean {tokens / rows:.0f}, longest {longest}"
            lines.append(tag("div", text, class_="soft"))
    return lines


def _facts(stage: StagePage) -> list[Markup]:
    """What is rarely needed: recipe, provenance, log."""
    facts = {key: value for key, value in stage.provenance.items() if key not in ("inputs", "data", "earlier")}
    parts = [
        ("Recipe as given", stage.recipe, False),
        ("Recipe with every default", stage.resolved, False),
        ("Made with", as_json(facts) if facts else "", False),
        ("Published", as_json(stage.manifest) if stage.manifest else "", False),
        ("Warnings of the log", "\n".join(stage.warnings), False),
        ("End of the log", stage.log_tail, stage.summary.state in ("failed", "interrupted", "damaged")),
    ]
    return [tag("details", tag("summary", title), tag("pre", text), open=shown) for title, text, shown in parts if text]
