"""`rlhf run`: a pipeline file is nothing but stage commands in order."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rlhf.cli.stages import IN_ONE_PROCESS, StageCommand, err, show_dry_run, slots, wanted_world
from rlhf.errors import NumericsError, UserError
from rlhf.launch import stopped_with_parent
from rlhf.recipe.load import LoadedRecipe, PipelineCommand, dump_recipe, load_pipeline, load_recipe
from rlhf.run.commit import read_jsonl
from rlhf.run.rundir import RunDir


@dataclass(frozen=True)
class PipelineOptions:
    """What was typed behind the pipeline file; it goes to every stage."""

    run: Path
    overrides: list[str]
    dry_run: bool
    gpus: int | None
    num_nodes: int | None
    hostfile: Path | None
    allow_code: list[Path]
    allow_foreign: bool
    trust_code: list[str]
    watchdog: int
    rank_timeout: int


def run_all(path: Path, options: PipelineOptions) -> None:
    """Run the stages in order; each is a job of its own. Stops at the first that fails or does not learn.

    All recipes are checked before the first stage starts: the last one's mistake should not come up hours later.
    """
    steps = load_pipeline(path)
    commands = [stage_command(step, options) for step in steps]
    recipes = check_all(path, commands)
    for step, command, (loaded, ranks) in zip(steps, commands, recipes, strict=True):
        words = [f"rlhf {step.stage} {step.recipe} --run {options.run}"]
        words += [f"--name {step.name}"] if step.name != step.stage else []
        err.print(f"\n$ {' '.join(words)}", style="bold", markup=False, soft_wrap=True)
        if options.dry_run:  # not the stage's own, which asks for parents that are not made yet
            show_dry_run(dump_recipe(loaded.recipe), loaded, ranks)
            continue
        run_job(command)
        if step.expect is not None:
            check_learning(step, options.run)


def run_job(command: StageCommand) -> None:
    """The stage in a process of its own: DeepSpeed and torch keep groups and memory until a process ends.

    A request to stop goes on to it, and where the pipeline is killed it is asked to stop, too. Where it fails, it has
    said why, and its exit code is ours.
    """
    words = [sys.executable, "-m", "rlhf", *command.argv(), *command.launch_words()]
    process = subprocess.Popen(words, preexec_fn=stopped_with_parent())
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # a Ctrl-C reaches both from the terminal
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup both go on
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: process.terminate())
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def stage_command(step: PipelineCommand, options: PipelineOptions) -> StageCommand:
    """The command that a step of the pipeline stands for. Devices go to the stages that have a use for them."""
    is_alone = step.stage in IN_ONE_PROCESS
    return StageCommand(
        step.stage,
        step.recipe,
        options.run,
        None if step.name == step.stage else step.name,
        [*step.overrides, *options.overrides],
        options.dry_run,
        None if is_alone else options.gpus,
        None if is_alone else options.num_nodes,
        None if is_alone else options.hostfile,
        allow_code=options.allow_code,
        allow_foreign=options.allow_foreign,
        watchdog=options.watchdog,
        rank_timeout=options.rank_timeout,
        trust_code=options.trust_code,
    )


def check_all(path: Path, commands: list[StageCommand]) -> list[tuple[LoadedRecipe, int]]:
    """Every recipe of the pipeline, and the files it names, as far as that is possible before its parents exist.

    Returns the recipes with their numbers of ranks.
    """
    problems: dict[type[UserError], list[str]] = {}
    recipes = []
    for command in commands:
        try:
            command.folder()
            world = wanted_world(command)
            ranks = 1 if world is None else slots(world)
            loaded = load_recipe(command.recipe, command.stage, command.overrides, world_size=ranks)
            loaded.check_files()
            recipes.append((loaded, ranks))
        except UserError as error:
            problems.setdefault(type(error), []).append(f"{error}\n  in {path}, stage {command.name or command.stage}")
    for kind, texts in problems.items():
        raise kind("\n".join(dict.fromkeys(texts)))
    return recipes


def check_learning(step: PipelineCommand, run: Path) -> None:
    """Refuse to go on when the stage's metric did not move as the pipeline file expects."""
    assert step.expect is not None
    metric, direction, least = step.expect.metric, step.expect.direction, step.expect.by
    rows = [row[metric] for row in read_jsonl(RunDir(run).stage(step.name).metrics) if row.get(metric) is not None]
    tenth = max(1, len(rows) // 10)
    if not rows:
        raise NumericsError(f"expected {metric} in metrics.jsonl, found none", where=f"{run}/{step.name}")
    before, after = sum(rows[:tenth]) / tenth, sum(rows[-tenth:]) / tenth
    moved = (after - before) * (1 if direction == "rises" else -1)
    text = f"{metric} went from {before:.4g} to {after:.4g}"
    if moved < least:
        raise NumericsError(
            f"expected {metric} to change by at least {least:g} ({direction}); {text}",
            where=f"{run}/{step.name}",
            fix="Look at report/report.html; the usual suspects are the learning rate and too few steps.",
        )
    err.print(f"{step.name}: {text}, as expected", markup=False)
