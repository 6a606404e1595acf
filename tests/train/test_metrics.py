"""Means over micro-batches, and the rows that are written down."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.recipe.schema import LogBlock
from rlhf.train import trackers
from rlhf.train.metrics import Meter, MetricsLog, Totals


def test_means_are_weighted_by_their_denominators(forked):
    def body():
        meter = Meter()
        meter.add_counts({"tokens": 3.0, "rows": 2.0})
        meter.add({"loss": (torch.tensor(6.0), "tokens"), "length": (torch.tensor(3), "rows")})
        meter.add_counts({"tokens": 1.0, "rows": 2.0})
        meter.add({"loss": (torch.tensor(2.0, requires_grad=True), "tokens"), "length": (torch.tensor(2), "rows")})
        assert meter.reduce().values == {"loss": (8.0, 4.0), "length": (5.0, 4.0)}
        assert meter.means() == {"loss": 2.0, "length": 1.25}
        assert meter.means() == {"loss": 2.0, "length": 1.25}  # looking changes nothing
        assert Meter().means() == {}

    forked(body)


def test_a_metric_without_its_count_is_our_mistake(forked):
    def body():
        meter = Meter()
        meter.add({"loss": (torch.tensor(6.0), "tokens")})
        with pytest.raises(KeyError, match="tokens"):
            meter.means()

    forked(body)


def test_totals_of_optimizer_steps_are_weighted_by_their_denominators():
    whole = Totals()
    whole.add(Totals({"loss": (6.0, 3.0)}))
    whole.add(Totals({"loss": (2.0, 1.0), "kl": (5.0, 10.0)}))  # a metric may come later
    assert whole.values == {"loss": (8.0, 4.0), "kl": (5.0, 10.0)} and whole.means() == {"loss": 2.0, "kl": 0.5}
    assert Totals().means() == {}


def test_rows_are_appended_with_step_and_time(forked, tmp_path):
    def body():
        path = tmp_path / "metrics.jsonl"
        log = MetricsLog(path, LogBlock(), "run/sft", 0)
        log.write(1, {"train/loss": 2.5})
        log.write(2, {"train/loss": float("nan"), "train/lr": 1e-5})
        MetricsLog(path, LogBlock(), "run/sft", 0).write(3, {})
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert rows[0]["train/loss"] == 2.5 and rows[1]["train/loss"] is None and rows[1]["train/lr"] == 1e-5
        assert rows[0]["time"] > 1.7e9

    forked(body)


def warned(logger: str = "rlhf.metrics") -> list[str]:
    """What is said from here on."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger(logger).addHandler(handler)
    return warnings


def events(folder: Path, name: str) -> list[int]:
    """The steps of a metric as TensorBoard shows them."""
    found = EventAccumulator(str(folder)).Reload()
    return [event.step for event in found.Scalars(name)]


def test_tensorboard_has_each_step_once_after_a_resume(forked, tmp_path):
    def body():
        warnings = warned()
        for first, last in ((0, 3), (1, 4)):
            log = MetricsLog(tmp_path / "metrics.jsonl", LogBlock(tensorboard=True), "run/sft", first)
            for step in range(first + 1, last + 1):
                log.write(step, {"train/loss": 2.5})
            log.close()
        assert events(tmp_path / "tensorboard", "train/loss") == [1, 2, 3, 4] and not warnings

    forked(body)


def test_a_failing_tracker_is_left_out_and_the_truth_goes_on(forked, tmp_path):
    def body():
        warnings = warned()
        path = tmp_path / "metrics.jsonl"
        log = MetricsLog(path, LogBlock(tensorboard=True), "run/sft", 0)
        log.write(1, {"train/loss": 2.5})
        log.write(2, {"train/loss": "no number"})  # TensorBoard refuses text
        log.write(3, {"train/loss": "no number"})
        log.close()
        assert len(path.read_text().splitlines()) == 3 and events(tmp_path / "tensorboard", "train/loss") == [1]
        assert len(warnings) == 1 and "TensorBoard has failed and is left out" in warnings[0]

    forked(body)


@pytest.mark.parametrize("where", ["begin", "take", "end"])
def test_a_tracker_that_hangs_is_left_after_a_bounded_time(where, monkeypatch):
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.2)
    warnings, asleep = warned(), threading.Event()

    def part(name: str, value: object = None) -> Callable[..., object]:
        def call(*_: object) -> object:
            if name == where:
                asleep.wait(20)
            return value

        return call

    one = trackers.Tracker("it", part("begin", (part("take"), part("end"))))
    started = time.monotonic()
    for step in range(3):
        one.write(step, {})
    trackers.close([one])
    assert 0.15 < time.monotonic() - started < 5
    assert warnings == ["it does not answer and is left: metrics.jsonl has all rows"]
    asleep.set()
    one._thread.join(20)  # what it says later is not heard by another test
    assert not one._thread.is_alive() and len(warnings) == 1
