"""The best step so far, and what of a step is still to be done: both survive in a checkpoint, exactly."""

from __future__ import annotations

import json
import math

from rlhf.recipe.schema import KeepBestBlock
from rlhf.train.standing import Best, Standing

LOSS = KeepBestBlock(metric="eval/loss", larger_is_better=False)
ACCURACY = KeepBestBlock(metric="eval/accuracy", larger_is_better=True)


def through_a_file(standing: Standing, watched: KeepBestBlock | None) -> Standing:
    other = Standing(watched)
    other.restore(json.loads(json.dumps(standing.as_json())))
    return other


def test_only_a_better_step_is_the_best():
    standing = Standing(LOSS)
    values = [None, 2.0, math.nan, 2.0, 1.5, 1.7, 1.5]
    rows = [{} if value is None else {"eval/loss": value} for value in values]
    assert [standing.improves(step, row) for step, row in enumerate(rows, 1)] == [
        False, True, False, False, True, False, False
    ]  # fmt: skip
    assert standing.told() == {"metric": "eval/loss", "step": 5, "value": 1.5}
    larger = Standing(ACCURACY)
    assert [larger.improves(step, {"eval/accuracy": value}) for step, value in enumerate((0.5, 0.4, 0.6))] == [
        True, False, True
    ]  # fmt: skip
    assert not Standing().improves(1, {"eval/loss": 0.0}) and Standing().told() is None


def test_it_survives_to_the_last_bit():
    standing = Standing(LOSS, Best(3, 1 / 3), {"train/loss": 0.1 + 0.2, "reward/x": 1e-300, "value/ratio": 2.0})
    assert through_a_file(standing, LOSS) == standing
    assert through_a_file(Standing(), None) == Standing()


def test_what_was_best_by_another_metric_is_forgotten():
    standing = Standing(LOSS, Best(3, 1.0))
    assert through_a_file(standing, ACCURACY).best is None and through_a_file(standing, None).best is None
    assert through_a_file(Standing(), LOSS).best is None
