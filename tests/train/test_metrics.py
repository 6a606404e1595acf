"""Means over micro-batches, and the rows that are written down."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from rlhf.recipe.schema import LogBlock
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
        log = MetricsLog(path, LogBlock(), "run/sft")
        log.write(1, {"train/loss": 2.5})
        log.write(2, {"train/loss": float("nan"), "train/lr": 1e-5})
        MetricsLog(path, LogBlock(), "run/sft").write(3, {})
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert rows[0]["train/loss"] == 2.5 and rows[1]["train/loss"] is None and rows[1]["train/lr"] == 1e-5
        assert rows[0]["time"] > 1.7e9

    forked(body)


def test_a_failing_tracker_is_switched_off_and_the_truth_goes_on(forked, tmp_path):
    def body():
        warnings = []
        handler = logging.Handler()
        handler.emit = lambda record: warnings.append(record.getMessage())
        logging.getLogger("rlhf.metrics").addHandler(handler)
        path = tmp_path / "metrics.jsonl"
        log = MetricsLog(path, LogBlock(tensorboard=True), "run/sft")
        log.write(1, {"train/loss": 2.5})
        assert list((tmp_path / "tensorboard").iterdir()) and not warnings
        log.write(2, {"train/loss": "no number"})  # TensorBoard refuses text
        log.write(3, {"train/loss": "no number"})
        assert len(path.read_text().splitlines()) == 3
        assert len(warnings) == 1 and "a tracker failed and is switched off" in warnings[0]

    forked(body)
