"""Every alarm: off within its bound, on beyond it, said once; what a checkpoint holds; repeated answers."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf.errors import NumericsError
from rlhf.recipe.guard_options import GuardsBlock, metric_of_alarms
from rlhf.train.alarms import WATCHES, Alarms, repeated_share, stop_error

# name -> (values that are fine, then the value with which it goes off), at the bounds that the recipe has by default
CASES = {
    "kl_spike": ([0.0, 50.0], 50.1),
    "entropy_collapse": ([2.0, 0.2], 0.19),
    "eos_rate": ([0.8, 0.4], 0.39),
    "flat_reward": ([1.0, 0.0, 0.0], 1e-8),
    "all_clipped": ([0.0, 0.0, 0.1, 0.0, 0.0], 0.0),
    "explained_variance": ([-0.1, 0.0, -0.1, -0.1, -0.1, -0.1], -0.1),
    "repeated_answers": ([0.0, 0.5], 0.51),
}
METRICS = metric_of_alarms()


def watching(**options) -> Alarms:
    return Alarms(GuardsBlock(**options))


def test_every_alarm_has_a_case_and_causes():
    assert {*CASES, "length_drift"} == set(GuardsBlock.model_fields) == set(WATCHES)


@pytest.mark.parametrize("name", CASES)
def test_an_alarm_goes_off_beyond_its_bound(name):
    alarms, (fine, bad) = watching(), CASES[name]
    for value in fine:
        assert not [alarm for alarm in alarms.look({METRICS[name]: value}) if alarm.name == name]
        assert f"alarm/{name}" not in alarms.marks()
    (alarm,) = [alarm for alarm in alarms.look({METRICS[name]: bad}) if alarm.name == name]
    assert alarms.marks()[f"alarm/{name}"] == 1.0
    assert alarm.text.startswith(f"alarm {name}: ") and f"(guards.{name}." in alarm.text
    assert all(mark in alarm.text for mark in ("(1)", "(2)", "(3)")) and alarm.text.endswith(
        f"Look at {METRICS[name]}."
    )
    assert not alarm.stops


@pytest.mark.parametrize(("value", "is_on"), [(29.9, False), (30.1, True), (3.4, False), (3.3, True)])
def test_length_may_drift_up_and_down(value, is_on):
    alarms = watching()
    assert alarms.look({"rollout/length_mean": 10.0}) == []
    assert [alarm.name for alarm in alarms.look({"rollout/length_mean": value})] == ["length_drift"] * is_on


def test_an_alarm_that_stays_on_is_said_once_and_again_after_it_was_off():
    alarms = watching(kl_spike={"threshold": 5.0})
    said, marked = [], []
    for value in (1.0, 6.0, 7.0, 4.0, 9.0, 9.0):
        said.append(len(alarms.look({"rollout/kl_ref": value})))
        marked.append(len(alarms.marks()))
    assert said == [0, 1, 0, 0, 1, 0]
    assert marked == [0, 1, 1, 0, 1, 1]


def test_a_missing_metric_changes_nothing():
    alarms = watching(explained_variance={"rollouts": 2})
    assert alarms.look({"value/explained_variance": -1.0}) == [] and alarms.look({}) == []
    assert [alarm.name for alarm in alarms.look({"value/explained_variance": -1.0})] == ["explained_variance"]
    assert alarms.look({"rollout/kl_ref": 1.0}) == [] and alarms.marks() == {"alarm/explained_variance": 1.0}


def test_several_at_once():
    found = watching().look({"rollout/kl_ref": 99.0, "rollout/repeated": 0.9, "policy/entropy": 1.0})
    assert [alarm.name for alarm in found] == ["kl_spike", "repeated_answers"]


def test_the_text_says_what_was_seen_against_what():
    alarms = watching(entropy_collapse={"threshold": 0.25})
    alarms.look({"policy/entropy": 2.0})
    (alarm,) = alarms.look({"policy/entropy": 0.4})
    assert "is 0.4 nats per token, 20% of the first rollout's (guards.entropy_collapse.threshold: 0.25)" in alarm.text


def test_an_alarm_may_stop_the_run():
    alarms = watching(kl_spike={"threshold": 5.0, "on_alarm": "stop"})
    found = alarms.look({"rollout/kl_ref": 6.0, "rollout/repeated": 0.9})
    assert [(alarm.name, alarm.stops) for alarm in found] == [("kl_spike", True), ("repeated_answers", False)]
    error = stop_error(found, step=12)
    assert isinstance(error, NumericsError) and error.exit_code == 5
    assert "after step 12 as guards.kl_spike.on_alarm says" in str(error) and "repeated" not in str(error)


def test_a_resumed_run_goes_on_as_if_never_interrupted():
    rows = [
        {"rollout/kl_ref": 60.0 * (i % 4 == 1), "policy/entropy": 2.0 / (i + 1), "reward/score_std": float(i < 3)}
        for i in range(24)
    ]
    whole = watching()
    expected = [([alarm.name for alarm in whole.look(row)], whole.marks()) for row in rows]
    assert {name for names, _ in expected for name in names} == {"kl_spike", "entropy_collapse", "flat_reward"}
    for cut in range(len(rows)):
        first, second = watching(), watching()
        for row in rows[:cut]:
            first.look(row)
        second.load(json.loads(json.dumps(first.state())))
        assert [([alarm.name for alarm in second.look(row)], second.marks()) for row in rows[cut:]] == expected[cut:]


def test_repeated_share():
    ids = torch.tensor([[5, 6, 0], [5, 6, 9], [5, 6, 7], [8, 0, 0], [5, 6, 1], [3, 3, 3]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    assert repeated_share(ids, mask) == pytest.approx(3 / 5, abs=1e-12)  # 5 6 three times; the last is no answer
    assert repeated_share(ids[2:4], mask[2:4]) == 0.0
    assert repeated_share(ids[:2], mask[:2]) == 1.0
    assert repeated_share(ids[:0], mask[:0]) == 0.0
