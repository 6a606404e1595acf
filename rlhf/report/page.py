"""`rlhf report`: one self-contained page with everything a run directory knows. Rebuilt at any time from its files."""

from __future__ import annotations

import time
from pathlib import Path

from rlhf.report import sections
from rlhf.report.collect import RunPage, read_run
from rlhf.report.diagram import lineage_diagram
from rlhf.report.findings import findings
from rlhf.report.implicit import implicit_table
from rlhf.report.style import CSS
from rlhf.report.tags import Markup, tag
from rlhf.run.commit import write_atomic


def write_report(run: Path) -> Path:
    """Build RUN/report/report.html and return its path."""
    page = read_run(run)
    target = run / "report" / "report.html"
    target.parent.mkdir(exist_ok=True)
    write_atomic(target, render(page, time.strftime("%Y-%m-%d %H:%M")))
    return target


def render(run: RunPage, when: str) -> str:
    """The page as text."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{run.name}: run report"),
        tag("style", Markup(CSS)),
    )
    found = {stage.summary.name: findings(stage) for stage in run.stages}
    body = tag(
        "body",
        _navigation(run),
        tag(
            "main",
            tag("h1", run.name),
            tag("div", f"{run.path} · written {when}", class_="soft"),
            _overview(run),
            sections.look_at(run, found),
            sections.demo_table(run.demo) if run.demo else None,
            implicit_table(run.implicit) if run.implicit else None,
            sections.comparison(run),
            [sections.stage_section(stage, found[stage.summary.name]) for stage in run.stages],
        ),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _navigation(run: RunPage) -> Markup:
    links = [tag("a", stage.summary.name, href=f"#{stage.summary.name}") for stage in run.stages]
    return tag("nav", tag("div", tag("strong", run.name), links))


def _overview(run: RunPage) -> list[Markup]:
    if not run.stages:
        return [tag("p", "No stage was started in this run directory yet.")]
    return [
        tag("div", lineage_diagram(run), class_="card lineage scroll"),
        tag("div", sections.stage_table(run), class_="card scroll"),
    ]
