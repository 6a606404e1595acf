"""One thread for all work of a measurement.

PyTorch has a pool of workers for every thread that computes. Where there is more than one, they get in each other's
way even while they wait, and what consists of many short operations takes twice as long.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class OneThread:
    """Does what it is handed, one thing after the other. A thing that wants to pause lets others be done by `serve`."""

    def __init__(self) -> None:
        self._handed: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=self.serve, daemon=True).start()

    def begin(self, work: Callable[[], Result]) -> Future[Result]:
        """Hand over work."""
        future: Future[Result] = Future()
        self._handed.put((work, future))
        return future

    def do(self, work: Callable[[], Result]) -> Result:
        """Hand over work and wait for it."""
        return self.begin(work).result()

    def go_on(self) -> None:
        """End the innermost `serve`: what had paused goes on."""
        self._handed.put(None)

    def serve(self) -> None:
        """Do what is handed over, until `go_on`. Called by work that is being done, in this thread."""
        while (item := self._handed.get()) is not None:
            work, future = item
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  whoever waits must hear of it
                future.set_exception(error)
