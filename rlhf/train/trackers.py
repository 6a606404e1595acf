"""TensorBoard and Weights & Biases: copies of metrics.jsonl that may fail, or hang, without holding up a run.

Each has a thread of its own, in which all that it does happens, its import too. A row is put into its queue and the
training goes on. The first failure is said once, and is the tracker's last act.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf.recipe.schema import LogBlock

logger = logging.getLogger("rlhf.metrics")

Row = dict[str, float]
Sink = tuple[Callable[[int, Row], object], Callable[[], object]]  # takes a row, ends

_PATIENCE_S = 10.0  # at the end of a run, for all trackers together


class Tracker:
    """What `begin` opens, behind a queue."""

    def __init__(self, name: str, begin: Callable[[], Sink]) -> None:
        self.name = name
        self._begin = begin
        self._rows: queue.SimpleQueue[tuple[int, Row] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, step: int, row: Row) -> None:
        """Take a row. Returns at once."""
        if self._thread.is_alive():  # else nobody would ever empty the queue
            self._rows.put((step, row))

    def close(self, deadline: float) -> None:
        """Let it end what it has been given, until a moment of the monotonic clock; then it is left to itself."""
        self._rows.put(None)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            logger.warning("%s does not answer and is left: metrics.jsonl has all rows", self.name)

    def _work(self) -> None:
        try:
            take, end = self._begin()
            while (given := self._rows.get()) is not None:
                take(*given)
            end()
        except BaseException as error:  # noqa: BLE001  no outage of a tracker is a reason to lose a run
            logger.warning("%s has failed and is left out, metrics.jsonl has all rows: %s", self.name, error)


def close(trackers: Sequence[Tracker]) -> None:
    """End all of them, each in its thread, within one bounded time."""
    deadline = time.monotonic() + _PATIENCE_S
    for tracker in trackers:
        tracker.close(deadline)


def trackers(log: LogBlock, folder: Path, run_name: str, first_step: int) -> list[Tracker]:
    """Those that a recipe asks for. first_step: finished steps; of later ones, rows of an earlier start are void."""
    found = []
    if log.tensorboard:
        found.append(Tracker("TensorBoard", lambda: _tensorboard(folder / "tensorboard", first_step)))
    if log.wandb is not None:
        project = log.wandb
        found.append(Tracker("Weights & Biases", lambda: _wandb(project, run_name, folder)))
    return found


def _tensorboard(folder: Path, first_step: int) -> Sink:
    """An event file, written in this thread: TensorBoard's own writer starts one that nobody hears failing."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # imported on request: it takes a second
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(exist_ok=True)
    file = (folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("xb")
    writer = RecordWriter(file)

    def put(**fields: object) -> None:
        writer.write(Event(wall_time=time.time(), **fields).SerializeToString())
        file.flush()

    def take(step: int, row: Row) -> None:
        put(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=row[tag]) for tag in row]))

    put(file_version="brain.Event:2")
    put(step=first_step + 1, session_log=SessionLog(status=SessionLog.START))  # voids these steps of earlier files
    return take, file.close


def _wandb(project: str, run_name: str, folder: Path) -> Sink:
    import wandb  # an optional extra

    run = wandb.init(project=project, name=run_name, dir=str(folder))
    return lambda step, row: run.log(row, step=step), run.finish
