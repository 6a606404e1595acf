"""Asked to stop, at every kind of moment: nothing is lost, and the same command comes to the same end."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rlhf.cli.stages
import rlhf.models.draw
import rlhf.rewards.scorer
import rlhf.run.commit
import rlhf.run.stage
import rlhf.train.checkpoints
import rlhf.train.judged
import rlhf.train.online
import rlhf.train.samples
import rlhf.train.stages
import rlhf.train.supervised
import rlhf.train.worker
from rlhf.engine.engine import Engine
from rlhf.run.commit import checkpoint_dirs, read_json, write_atomic
from rlhf.run.rundir import RunDir
from scripts.reliability.lab import STAGES, Child, Done, Lab, differing, digest
from scripts.reliability.row import Tally, row

STOPPED, LIMIT_S = 75, 30.0
STEPS = {"sft": 6, "rm": 6, "dpo": 6, "ppo": 4, "grpo": 4}
FIRED = "fired"  # a file that the child makes when the moment has come


@dataclass(frozen=True)
class Moment:
    """The n-th call of a function, from its first line on."""

    name: str
    owner: Any
    function: str
    call: int = 1
    is_late: bool = False  # the result is, or may be, published: 0 is right, too
    is_cut: bool = False  # what runs is left where it is, so that the step's row is not written


START = [
    Moment("start", rlhf.cli.stages, "checked"),
    Moment("tokenise", rlhf.train.worker, "load_examples"),
    Moment("load the model", rlhf.train.stages, "assemble"),
]
UPDATE = Moment("update", Engine, "backward", 5)
SAVE = Moment("save", rlhf.run.commit, "commit_dir", 2)
END = [
    Moment("export", rlhf.run.stage.StageDir, "publish", 1, is_late=True),
    Moment("exit", rlhf.cli.stages, "announce", 1, is_late=True),
]
BATCH = Moment("batch", rlhf.train.supervised.SupervisedCollector, "collect", 3)
EVALUATION = Moment("evaluation", rlhf.train.stages, "evaluate", 2, is_cut=True)
LAST_EVALUATION = Moment("last evaluation", rlhf.train.stages, "evaluate", 3, is_cut=True)
SAMPLES = Moment("samples", rlhf.train.samples.SampleWriter, "__call__", 2, is_cut=True)
FIRST_STEP = Moment("first step", Engine, "step", 1)
ONLINE = [
    Moment("rollout", rlhf.models.draw.Drawn, "draw", 60, is_cut=True),
    Moment("reward", rlhf.rewards.scorer.Scorer, "__call__", 3, is_cut=True),
    Moment("reference log-probs", rlhf.train.online.OnlineCollector, "look_at", 7, is_cut=True),
    SAMPLES,
    UPDATE,
    SAVE,
]
# The first of each are those that the quick run takes.
MOMENTS = {
    "sft": [EVALUATION, SAMPLES, BATCH, UPDATE, SAVE, *START, *END, LAST_EVALUATION],
    "rm": [SAVE, EVALUATION, BATCH, UPDATE, FIRST_STEP, *START, *END, LAST_EVALUATION],
    "dpo": [
        Moment("reference log-probs", rlhf.train.judged, "logprobs_of_rows"),
        *[EVALUATION, SAMPLES, UPDATE, SAVE, *START, *END, LAST_EVALUATION],
    ],
    "ppo": [*ONLINE, *START, *END],
    "grpo": [*ONLINE[1:], ONLINE[0], *START, *END],
}


@row(
    "R7",
    "SIGTERM and SIGINT at ten and more moments of every stage; SIGHUP, a file STOP, max_minutes, a second SIGINT;"
    " one of two ranks",
    expected="exit 75 within a step and a save (0 where it was published), and the same end, to the bit",
    asked="50",
    quick=1,
    full=11,
    alone=True,
)
def asked_to_stop(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: moments per stage. One is for a quick look: at three stages, and few of the other ways to ask."""
    for stage in STAGES if tries > 1 else ("sft", "ppo", "dpo"):
        wanted = straight(lab, stage)
        for number, moment in enumerate(MOMENTS[stage][:tries]):
            signals = [signal.SIGTERM] if (number + seed) % 2 else [signal.SIGINT]
            with tally.attempt(f"{stage}: {signals[0].name} at {moment.name}"):
                stopped(lab, stage, wanted, moment, signals)
        if stage == "sft":
            other_ways(lab, tally, wanted, tries)
    if tries > 1:
        two_ranks(lab, tally)


def other_ways(lab: Lab, tally: Tally, wanted: dict[str, str], tries: int) -> None:
    """What is not a first signal."""
    with tally.attempt("sft: a file STOP"):
        asked_by_file(lab, wanted)
    twice = [signal.SIGINT, signal.SIGINT]
    moments = [UPDATE, EVALUATION, Moment("save", rlhf.train.checkpoints.Checkpoints, "save", 3), END[0]]
    for moment in moments[:tries]:
        with tally.attempt(f"sft: SIGINT twice at {moment.name}"):
            stopped(lab, "sft", wanted, moment, twice)
    if tries > 1:
        with tally.attempt("sft: max_minutes, again and again"):
            out_of_time(lab, wanted)
        with tally.attempt("sft: SIGHUP"):
            stopped(lab, "sft", wanted, UPDATE, [signal.SIGHUP])


def straight(lab: Lab, stage: str, ranks: int = 1) -> dict[str, str]:
    """What a run comes to that nobody stops."""
    lab.clear(name_of(stage))
    done = lab.run(command(lab, stage), ranks=ranks)
    assert done.code == 0, done.err
    return end_of(lab, stage)


def stopped(
    lab: Lab, stage: str, wanted: dict[str, str], moment: Moment, signals: list[signal.Signals], *, ranks: int = 1
) -> None:
    """Start, stop at a moment (of the last rank), see how it ended, start again."""
    lab.clear(name_of(stage))
    shutil.rmtree(lab.root / "cache", ignore_errors=True)  # the reference's log-probs are computed again
    (lab.work / FIRED).unlink(missing_ok=True)
    metrics = lab.root / name_of(stage) / "metrics.jsonl"
    child = lab.start(command(lab, stage), before=at(lab.work, metrics, moment, signals, str(ranks - 1)), ranks=ranks)
    done, seconds = ended_after(lab, child)
    assert done.code in ({STOPPED, 0} if moment.is_late else {STOPPED}), f"exit {done.code}: {done.err}"
    assert set(child.codes.values()) == {done.code}, child.codes
    assert seconds < LIMIT_S, f"{seconds:.1f} s"
    if moment.is_cut:
        assert lines(metrics) == int((lab.work / FIRED).read_text()), "it went on to the end of the step"
    if done.code == STOPPED:
        assert "The same command" in done.err and "Traceback" not in done.err, done.err
        assert shown_state(lab, stage) in (None, "stopped"), shown_state(lab, stage)
        resumed(lab, stage, wanted, ranks)
    else:
        assert not (different := differences(lab, stage, wanted)), different


def ended_after(lab: Lab, child: Child) -> tuple[Done, float]:
    """(how it ended, seconds since the moment)."""
    assert child.until(lambda: (lab.work / FIRED).exists()) or (lab.work / FIRED).exists(), "the moment never came"
    asked = time.monotonic()
    return child.wait(), time.monotonic() - asked


def resumed(lab: Lab, stage: str, wanted: dict[str, str], ranks: int = 1) -> None:
    """The same command comes to the same end."""
    done = lab.run(command(lab, stage), ranks=ranks)
    assert done.code == 0, done.err
    assert not (different := differences(lab, stage, wanted)), different


def out_of_time(lab: Lab, wanted: dict[str, str]) -> None:
    """Starts that may each take a second and a half; every one that has begun gets further."""
    lab.clear(name_of("sft"))
    short = [*command(lab, "sft"), "--set", "max_minutes=0.025"]
    for _ in range(20):
        done = lab.run(short, before=slowed)
        if done.code == 0:
            break
        assert done.code == STOPPED and "max_minutes" in done.err, f"exit {done.code}: {done.err}"
    else:
        raise AssertionError("20 starts, and not at the end")
    assert not (different := differences(lab, "sft", wanted)), different


def asked_by_file(lab: Lab, wanted: dict[str, str]) -> None:
    """The file ends the run that is there, and not the next one."""
    lab.clear(name_of("sft"))
    folder = lab.root / name_of("sft")
    child = lab.start(command(lab, "sft"), before=slowed)
    assert child.until(lambda: (folder / "metrics.jsonl").exists())
    (folder / "STOP").touch()
    asked = time.monotonic()
    done = child.wait()
    assert done.code == STOPPED and "STOP" in done.err, f"exit {done.code}: {done.err}"
    assert time.monotonic() - asked < LIMIT_S and (folder / "STOP").exists()
    again = lab.run(command(lab, "sft"))
    assert again.code == 0 and "meant for an earlier start" in again.err, again.err
    assert not (different := differences(lab, "sft", wanted)), different


def two_ranks(lab: Lab, tally: Tally) -> None:
    """One rank is told; both end, and in the same way."""
    for stage, moment in (("grpo", ONLINE[0]), ("grpo", ONLINE[2]), ("sft", EVALUATION)):
        with tally.attempt(f"{stage} on two ranks: SIGTERM to the second at {moment.name}"):
            wanted = straight(lab, stage, ranks=2)
            stopped(lab, stage, wanted, moment, [signal.SIGTERM], ranks=2)


# --- in the child -----------------------------------------------------------------------------------------------------


def at(work: Path, metrics: Path, moment: Moment, signals: list[signal.Signals], rank: str = "0") -> Callable[[], None]:
    """Has the process send itself signals at a moment, and note how many rows its log has then."""

    def prepare() -> None:
        if os.environ.get("RANK", "0") != rank:
            return
        original, calls = getattr(moment.owner, moment.function), iter(range(1, 1_000_000))

        def wrapped(*args: Any, **options: Any) -> Any:
            if next(calls) == moment.call:
                write_atomic(work / FIRED, str(lines(metrics)))
                for number in signals:
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)  # the interpreter takes a signal between two of its instructions
            return original(*args, **options)

        setattr(moment.owner, moment.function, wrapped)

    return prepare


def lines(log: Path) -> int:
    """Rows of a log."""
    return log.read_text().count("\n") if log.exists() else 0


def slowed() -> None:
    """Updates that take a quarter of a second each."""
    original = Engine.step

    def step(self: Engine, *args: Any, **options: Any) -> Any:
        time.sleep(0.25)
        return original(self, *args, **options)

    Engine.step = step  # type: ignore[method-assign]


# --- places -----------------------------------------------------------------------------------------------------------


def name_of(stage: str) -> str:
    """The folder that a stage is tried in."""
    return f"r7-{stage}"


def command(lab: Lab, stage: str) -> list[str]:
    """The words of the command that is tried."""
    return lab.command(stage, "--name", name_of(stage))


def end_of(lab: Lab, stage: str) -> dict[str, str]:
    """What a run has come to. Only one that was stopped in its last evaluation has a checkpoint of its last step."""
    folder = RunDir(lab.root).stage(name_of(stage))
    last: Path = folder.checkpoint(STEPS[stage])
    if last.exists():
        shutil.rmtree(last)
    return digest(folder.path)


def differences(lab: Lab, stage: str, wanted: dict[str, str]) -> list[str]:
    """What differs at the end. A checkpoint of a cut-off evaluation or sample is from before the step's conclusion."""
    found = differing(end_of(lab, stage), wanted)
    newest = checkpoint_dirs(RunDir(lab.root).stage(name_of(stage)).checkpoints)[-1]
    if read_json(newest / "loop.json")["unfinished"] is None:
        return found
    return [name for name in found if not name.endswith(("/loop.json", "/state.json"))]


def shown_state(lab: Lab, stage: str) -> str | None:
    """What `rlhf status` says of it; None where it left nothing behind."""
    folder = RunDir(lab.root).stage(name_of(stage))
    return folder.describe().state if folder.exists() else None
