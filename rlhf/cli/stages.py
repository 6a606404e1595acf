"""`rlhf sft | rm | ppo | grpo | dpo | label | merge`: one function behind all, so that their options are identical."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from rlhf.errors import RecipeError, StoppedError, UserError
from rlhf.launch import World
from rlhf.pulse import RANK_TIMEOUT_S, WATCHDOG_S
from rlhf.recipe.load import LoadedRecipe
from rlhf.run.disk import PRIVATE_MASK
from rlhf.run.layout import refuse_other_layout
from rlhf.run.opened import Opened
from rlhf.run.rundir import RunDir
from rlhf.run.stage import StageDir
from rlhf.train.job import Job
from rlhf.train.signals import StopRequest

NEXT = {
    "sft": "rlhf rm RECIPE --run {run}    or    rlhf dpo RECIPE --run {run}",
    "rm": "rlhf ppo RECIPE --run {run}    or    rlhf grpo RECIPE --run {run}",
    "ppo": "rlhf report {run}",
    "grpo": "rlhf report {run}",
    "dpo": "rlhf report {run}",
    "label": "rlhf rm RECIPE --run {run} --set data.from={name}",
    "merge": "rlhf report {run}",
}
IN_ONE_PROCESS = ("merge",)  # stages that are given no devices
RANKS_PER_CORE = 2  # on a CPU, where ranks are for trying things out
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
    allow_foreign: bool = False
    trust_code: list[str] = field(default_factory=list)
    watchdog: int = WATCHDOG_S
    rank_timeout: int = RANK_TIMEOUT_S

    def folder(self) -> StageDir:
        """The stage folder, existing or not."""
        return RunDir(self.run).stage(self.stage if self.name is None else self.name)

    def launch_words(self) -> list[str]:
        """The options that `argv` leaves out."""
        options: dict[str, object] = {"--gpus": self.gpus, "--num-nodes": self.num_nodes, "--hostfile": self.hostfile}
        if self.watchdog != WATCHDOG_S:
            options["--watchdog"] = self.watchdog
        words = [word for option, value in options.items() if value is not None for word in (option, str(value))]
        return words + (["--dry-run"] if self.dry_run else []) + (["--restart"] if self.restart else [])

    def argv(self) -> list[str]:
        """The command for a rank: the same, without what starts ranks."""
        words = [self.stage, str(self.recipe), "--run", str(self.run)]
        words += ["--name", self.name] if self.name is not None else []
        words += [word for item in self.overrides for word in ("--set", item)]
        words += [word for item in self.allow_code for word in ("--allow-code", str(item))]
        words += ["--allow-foreign"] if self.allow_foreign else []
        words += ["--rank-timeout", str(self.rank_timeout)] if self.rank_timeout != RANK_TIMEOUT_S else []
        words += [word for item in self.trust_code for word in ("--trust-code", item)]
        return words


def run_stage(command: StageCommand) -> None:
    """Check, then run in this process, or start the ranks and wait for them. Raises UserError."""
    stop = StopRequest()
    if command.dry_run:
        return start(command, stop)
    try:
        start(command, stop.listen())
    except KeyboardInterrupt:
        raise ended_at_once(command.folder(), stop) from None


def start(command: StageCommand, stop: StopRequest) -> None:
    """The command, in a rank of somebody's launcher or as it was typed."""
    from rlhf import launch  # imported here, as is all that follows: `rlhf --help` needs none of it
    from rlhf.cli.floors import installed, refuse_old

    os.umask(PRIVATE_MASK)
    if not command.allow_foreign:
        command.folder().refuse_foreign()
    refuse_old(installed())
    if launch.is_worker():
        launch.die_with_parent()
        job, _ = checked(command, int(os.environ["WORLD_SIZE"]))
        return work(replace(job, launcher=launch.launcher_pid(), rank_timeout_s=command.rank_timeout), stop)
    world = wanted_world(command)
    ranks = 1 if world is None else slots(world)
    if world is not None:
        launch.launch_command(command.argv(), world)  # for what it refuses
    if not command.dry_run:
        command.folder().refuse_if_held()
    job, loaded = checked(command, ranks)
    for notice in loaded.notices:
        err.print(notice, style="dim", markup=False)
    if command.dry_run or command.restart or not job.folder.is_finished():
        from rlhf.cli.prepare import check_rows

        check_rows(job)
    if command.dry_run:
        return show_dry_run(job.resolved_text, loaded, ranks)
    with job.folder.open(job.inputs, restart=job.restart) as opened:
        if opened.was_asked:
            err.print(f"{job.folder.stop}: removed, it was meant for an earlier start", markup=False, soft_wrap=True)
        if opened.checkpoint is not None:
            refuse_other_layout(opened.checkpoint, {"devices": ranks})
        if opened.mode != "finished":
            go(command, job, world, stop, opened)
    announce(job.folder.path, command, was_finished=opened.mode == "finished")


def go(command: StageCommand, job: Job, world: World | None, stop: StopRequest, opened: Opened) -> None:
    """Run the stage in this process, or start its ranks and wait for them."""
    from rlhf import launch

    if world is None:
        return work(job, stop, opened)
    is_done = job.folder.is_finished
    code = launch.launch(command.argv(), world, stage=job.folder.path, succeeded=is_done, watchdog_s=command.watchdog)
    if code:
        sys.exit(code)


def checked(command: StageCommand, ranks: int) -> tuple[Job, LoadedRecipe]:
    """The job that a command stands for, after every check that needs no model."""
    from rlhf.cli.prepare import prepare

    return prepare(
        command.stage,
        command.recipe,
        RunDir(command.run),
        name=command.name,
        overrides=command.overrides,
        world_size=ranks,
        restart=command.restart,
        allowed_code=command.allow_code,
        trusted_code=command.trust_code,
    )


def work(job: Job, stop: StopRequest, held: Opened | None = None) -> None:
    """Run the stage in this process."""
    try:
        with without_collector():
            from rlhf.train.worker import run  # torch, transformers and deepspeed are imported here, after every check

        run(job, stop, held)
    except UserError:
        raise
    except BaseException as error:
        # Half-imported packages make other errors of a request that came while they were being imported.
        if not stop.requested or (stop.after_step and not isinstance(error, KeyboardInterrupt)):
            raise
        if not job.folder.is_finished():
            raise ended_at_once(job.folder, stop) from error


def ended_at_once(folder: StageDir, stop: StopRequest) -> StoppedError:
    """What the user is told of a request that waited for nothing."""
    error = stop.error(", at once" if stop.after_step else ", while the stage was starting")
    goes_on = stop.after_step or folder.checkpoints.exists()
    fix = "The same command goes on from the last checkpoint." if goes_on else "The same command starts again."
    return StoppedError(error.what, where=str(folder.path), fix=fix)


@contextmanager
def without_collector() -> Iterator[None]:
    """For imports: what they make stays. Looking through it for garbage, over and over, takes a sixth of a start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def wanted_world(command: StageCommand) -> World | None:
    """The devices that the command line asks for; None where this process is enough."""
    if command.hostfile is None and (command.gpus or 1) * (command.num_nodes or 1) == 1:
        return None
    gpus = len(list(Path("/dev").glob("nvidia[0-9]*")))
    here = gpus or len(os.sched_getaffinity(0)) * RANKS_PER_CORE
    if command.hostfile is None and not command.dry_run and (command.gpus or 1) > here:
        there = f"{gpus} GPUs" if gpus else f"no GPU and {len(os.sched_getaffinity(0))} CPU cores"
        fix = "Use fewer devices, or name other machines with --hostfile."
        what = f"expected devices of this machine, which has {there}, found {command.gpus}"
        raise RecipeError(what, where="--gpus", fix=fix)
    return World(command.gpus, command.num_nodes, command.hostfile, cpu=not gpus)


def slots(world: World) -> int:
    """The number of ranks: as --gpus says, or what a host file (lines `host slots=n`) gives within its limits."""
    if world.hostfile is None:
        return (world.gpus or 1) * (world.num_nodes or 1)
    where, counts = f"--hostfile {world.hostfile}", []
    try:
        lines = world.hostfile.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"expected a host file, found: {error}", where=where) from None
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        count = words[-1].removeprefix("slots=")
        if len(words) != 2 or not count.isdecimal() or not int(count):
            raise RecipeError(f"expected `host slots=n`, found {line.strip()!r}", where=f"{world.hostfile}:{number}")
        counts.append(min(int(count), world.gpus or sys.maxsize))
    if len(counts) < (world.num_nodes or 1):
        raise RecipeError(f"expected a line per node ({world.num_nodes or 1}), found {len(counts)}", where=where)
    return sum(counts[: world.num_nodes])


def show_dry_run(resolved: str, loaded: LoadedRecipe, ranks: int) -> None:
    """The recipe with every default on stdout, the batch arithmetic under it."""
    from rlhf.recipe.explain import describe_batch

    out.print(resolved, markup=False, soft_wrap=True, end="")
    for line in describe_batch(loaded.recipe, ranks, None):
        out.print(f"# {line}", markup=False, soft_wrap=True)


def announce(folder: Path, command: StageCommand, *, was_finished: bool) -> None:
    """Where the result is and what can be done next; on stdout."""
    state = "was finished before with the same inputs" if was_finished else "finished"
    result = "pairs.jsonl" if command.stage == "label" else "model"
    out.print(f"{command.stage} {state}: {folder / result}", markup=False, soft_wrap=True)
    out.print(f"next: {NEXT[command.stage].format(run=command.run, name=folder.name)}", markup=False, soft_wrap=True)
