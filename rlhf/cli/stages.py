"""`rlhf sft | rm | ppo | grpo | dpo`: one function behind all of them, so that their options are identical."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from rlhf.errors import UserError
from rlhf.run.rundir import RunDir

NEXT = {
    "sft": "rlhf rm RECIPE --run {run}    or    rlhf dpo RECIPE --run {run}",
    "rm": "rlhf ppo RECIPE --run {run}    or    rlhf grpo RECIPE --run {run}",
    "ppo": "rlhf report {run}",
    "grpo": "rlhf report {run}",
    "dpo": "rlhf report {run}",
}
out, err = Console(highlight=False), Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class StageCommand:
    """What was typed."""

    stage: str
    recipe: Path
    run: Path
    name: str | None = None
    overrides: list[str] = field(default_factory=list)
    dry_run: bool = False
    gpus: int | None = None
    num_nodes: int | None = None
    hostfile: Path | None = None
    restart: bool = False
    allow_code: list[Path] = field(default_factory=list)

    def argv(self) -> list[str]:
        """The command for a rank: the same, without what starts ranks."""
        words = [self.stage, str(self.recipe), "--run", str(self.run)]
        words += ["--name", self.name] if self.name else []
        words += [word for item in self.overrides for word in ("--set", item)]
        words += [word for item in self.allow_code for word in ("--allow-code", str(item))]
        return words


def run_stage(command: StageCommand) -> None:
    """Check, then run in this process, or start the ranks and wait for them. Raises UserError."""
    from rlhf import launch  # imported here: `rlhf --help` needs none of it
    from rlhf.cli.prepare import prepare

    ranks = world_size(command)
    job, loaded = prepare(
        command.stage,
        command.recipe,
        RunDir(command.run),
        name=command.name,
        overrides=command.overrides,
        world_size=ranks,
        restart=command.restart,
        allowed_code=command.allow_code,
    )
    for notice in loaded.notices:
        err.print(notice, style="dim", markup=False)
    if command.dry_run:
        return show_dry_run(job.resolved_text, loaded, ranks)
    if launch.is_worker():
        work(replace(job, launcher=launch.launcher_pid()))
    elif ranks is not None and ranks > 1:
        with job.folder.open(job.inputs, restart=job.restart) as opened:
            if opened.mode != "finished":
                world = launch.World(
                    command.gpus, command.num_nodes or 1, command.hostfile, cpu=not Path("/dev/nvidiactl").exists()
                )
                code = launch.launch(command.argv(), world, stage=job.folder.path, succeeded=job.folder.is_finished)
                if code:
                    sys.exit(code)
        announce(job.folder.path, command, was_finished=opened.mode == "finished")
    else:
        was_finished = work(job)
        announce(job.folder.path, command, was_finished=was_finished)


def work(job) -> bool:  # type: ignore[no-untyped-def]
    """Run the stage in this process. Returns whether it had been finished before."""
    if job.launcher is None and job.folder.is_finished() and not job.restart:
        with job.folder.open(job.inputs) as opened:  # says so, or refuses other inputs, without importing torch
            if opened.mode == "finished":
                return True
    from rlhf.train.worker import run  # torch, transformers and deepspeed are imported here, after every check

    return run(job)


def world_size(command: StageCommand) -> int | None:
    """Number of ranks as far as the command line tells; None where the hostfile decides."""
    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if command.hostfile is not None:
        return slots(command)
    return (command.gpus or 1) * (command.num_nodes or 1)


def slots(command: StageCommand) -> int:
    """Ranks that a hostfile (lines `host slots=n`) gives, within --num-nodes and --gpus."""
    assert command.hostfile is not None
    try:
        lines = command.hostfile.read_text().splitlines()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=f"--hostfile {command.hostfile}") from None
    counts = []
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].removeprefix("slots=").isdigit():
            what = f"expected `host slots=n`, found {line.strip()!r}"
            raise UserError(what, where=f"{command.hostfile}:{number}")
        counts.append(min(int(words[1].removeprefix("slots=")), command.gpus or sys.maxsize))
    return sum(counts[: command.num_nodes])


def show_dry_run(resolved: str, loaded, ranks: int | None) -> None:  # type: ignore[no-untyped-def]
    """The recipe with every default on stdout, the batch arithmetic under it."""
    from rlhf.recipe.explain import describe_batch

    out.print(resolved, markup=False, soft_wrap=True, end="")
    for line in describe_batch(loaded.recipe, ranks or 1, None):
        out.print(f"# {line}", markup=False, soft_wrap=True)


def announce(folder: Path, command: StageCommand, *, was_finished: bool) -> None:
    """Where the result is and what can be done next; on stdout."""
    state = "was finished before with the same inputs" if was_finished else "finished"
    out.print(f"{command.stage} {state}: {folder / 'model'}", markup=False, soft_wrap=True)
    out.print(f"next: {NEXT[command.stage].format(run=command.run)}", markup=False, soft_wrap=True)
