"""What the loop itself remembers from step to step, beside weights and the stage's state: it goes into checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rlhf.engine import dist
from rlhf.recipe.schema import KeepBestBlock
from rlhf.train.signals import StopRequest


@dataclass(frozen=True)
class Best:
    """The step that the watched metric was best at."""

    step: int
    value: float


@dataclass
class Standing:
    """The best step so far, and what of the last step is still to be done. The same on every rank."""

    watched: KeepBestBlock | None = None
    best: Best | None = None
    # The metrics of a step whose weights are updated, and whose evaluation or samples were cut off by a request.
    unfinished: dict[str, float] | None = None

    def improves(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether a finished step is better than all before, which is then remembered. An equal one is not."""
        if self.watched is None or self.watched.metric not in metrics:
            return False
        value, sign = metrics[self.watched.metric], 1 if self.watched.larger_is_better else -1
        if math.isnan(value) or (self.best is not None and sign * value <= sign * self.best.value):
            return False
        self.best = Best(step, value)
        return True

    def told(self) -> dict[str, Any] | None:
        """The best step as status.json shows it."""
        if self.watched is None or self.best is None:
            return None
        return {"metric": self.watched.metric, "step": self.best.step, "value": self.best.value}

    def as_json(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        watched = None if self.watched is None else self.watched.model_dump()
        best = None if self.best is None else vars(self.best)
        return {"watched": watched, "best": best, "unfinished": self.unfinished}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `as_json` gave. What was best by another metric is forgotten."""
        same = self.watched is not None and saved["watched"] == self.watched.model_dump()
        self.best = Best(**saved["best"]) if same and saved["best"] is not None else None
        unfinished = saved["unfinished"]
        if unfinished is not None:
            unfinished = {name: math.nan if value is None else value for name, value in unfinished.items()}
        self.unfinished = unfinished


def leave_together(stop: StopRequest) -> None:
    """Raise StoppedError on every rank where any of them was asked to stop. Every rank must call it."""
    if dist.any_rank(stop.requested):
        raise stop.error()
