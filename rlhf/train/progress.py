"""One line that says how a stage is doing: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from rlhf.engine import dist

logger = logging.getLogger("rlhf.progress")
_SHOWN = {
    "train/loss": "loss",
    "eval/loss": "eval loss",
    "train/accuracy": "accuracy",
    "eval/accuracy": "eval accuracy",
    "reward/score_mean": "score",
    "rollout/kl_ref": "KL",
    "rollout/length_mean": "length",
    "value/loss": "value loss",
    "speed/tokens_per_second": "tok/s",
}
_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Use as a context manager; `advance` is cheap. Silent on all ranks but the first."""

    def __init__(self, title: str, total: int, done: int, console: Console) -> None:
        self._live = dist.is_main() and console.is_terminal
        self._title, self._total, self._first = title, total, done
        self._bar = RichProgress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._bar.add_task(title, total=total, completed=done, numbers="")
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, done: int, metrics: dict[str, float]) -> None:
        """Show the number of finished steps and the metrics that this stage has."""
        if not dist.is_main():
            return
        numbers = "  ".join(f"{label} {_short(metrics[name])}" for name, label in _SHOWN.items() if name in metrics)
        self._bar.update(self._task, completed=done, numbers=numbers)
        now = time.monotonic()
        if not self._live and (
            now - self._last_line > _SECONDS_BETWEEN_LINES or done in (self._first + 1, self._total)
        ):
            self._last_line = now
            left = (now - self._started) / (done - self._first) * (self._total - done)
            logger.info("%s %d/%d  %s  %s left", self._title, done, self._total, numbers, _clock(left))

    def show_sample(self, prompt: str, answer: str, score: float | None) -> None:
        """One sample generation, above the bar."""
        shown = "" if score is None else f"  [{score:.2f}]"
        line = Text.assemble("  > ", (one_line(prompt), "dim"), " | ", (one_line(answer), "green"), (shown, "bold"))
        self._bar.console.print(line, soft_wrap=True)


def one_line(text: str) -> str:
    """Text that a model wrote, without what would break the line or command the terminal."""
    return "".join(c if c.isprintable() else "\u23ce" if c == "\n" else "\ufffd" for c in text)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
