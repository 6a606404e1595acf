"""Looking at things without changing them: `rlhf status`, `rlhf show`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.errors import CheckpointError
from rlhf.run.rundir import RunDir, StageSummary

out = Console(highlight=False)
_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "damaged": "red"}


def show_status(path: Path, *, as_json: bool) -> None:
    """Every stage of a run directory."""
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        fix = "Name the folder that the stages were given with --run."
        raise CheckpointError(f"expected a run directory, found {found}", where=str(path), fix=fix)
    stages = RunDir(path).describe()
    if as_json:
        print(json.dumps([asdict(stage) for stage in stages], indent=2))
        return
    if not stages:
        out.print(f"{path}: no stages yet", markup=False, soft_wrap=True)
        out.print(f"next: rlhf sft RECIPE --run {path}", markup=False, soft_wrap=True)
        return
    table = Table("stage", "command", "state", "step", "key metric", "parents", "time", title=str(path), box=None)
    for stage in stages:
        table.add_row(*_row(stage))
    if not out.is_terminal:
        out.width = max(out.width, 140)  # piped into a file nothing is gained by breaking lines at 80
    out.print(table)


def _row(stage: StageSummary) -> list[str]:
    steps = f"{stage.step}/{stage.total_steps}" if stage.total_steps else str(stage.step)
    name, value = stage.key_metric or ("-", None)
    parents = ", ".join(f"{p} (changed since)" if p in stage.stale else p for p in stage.parents)
    style = _STYLES.get(stage.state, "yellow")
    state = f"[{style}]{stage.state}[/]" + (f" ({escape(stage.reason)})" if stage.reason else "")
    seconds = (stage.ended or time.time()) - stage.started if stage.started else None
    return [
        escape(stage.name),
        stage.stage or "-",
        state,
        steps,
        (name if value is None else f"{name} {value:.4g}") + _best(stage),
        parents or "-",
        "-" if seconds is None else f"{seconds:.0f} s",
    ]


def _best(stage: StageSummary) -> str:
    """The step that checkpoint.keep_best keeps."""
    best = stage.best
    return "" if best is None else f", best {best['metric']} {best['value']:.4g} at {best['step']}"


def show_data(path: Path, stage: str | None, run: Path | None, overrides: list[str], count: int) -> None:
    """Tokens of the first rows, coloured by what is trained."""
    from rlhf.cli.prepare import data_stage, prepare
    from rlhf.train.job import data_kind

    stage = data_stage(path, stage)
    job, _ = prepare(stage, path, RunDir(run or Path("runs/show")), overrides=overrides, allowed_code=[])
    from rlhf.data.show import show
    from rlhf.train.tokenizers import find_tokenizer

    kind = data_kind(job.recipe)
    tokenizer = find_tokenizer(job, kind)
    for part in show(job.recipe.data, tokenizer, kind, count, max_new_tokens=job.new_tokens()):
        out.print(part)
