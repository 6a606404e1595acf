"""Every rule: a curve that triggers it, one that does not."""

from __future__ import annotations

import pytest

from rlhf.report.collect import StagePage
from rlhf.report.findings import RULES, Finding, ends, findings, stretches
from rlhf.run.stage import StageSummary

CASES = {  # metric -> (a curve to warn of, a curve that is fine, a word of the warning)
    "train/loss": ([2.0] * 10, [2.0 - i / 10 for i in range(10)], "did not fall"),
    "eval/loss": ([2.0, 1.5, 1.0, 1.4, 1.8], [2.0, 1.5, 1.2, 1.0, 1.01], "lowest at step 3"),
    "eval/accuracy": ([0.5] * 5, [0.5, 0.6, 0.6, 0.7, 0.7], "near chance"),
    "reward/score_mean": ([1.0, 0.9, 0.8, 0.7, 0.6], [0.0, 0.2, 0.4, 0.5, 0.6], "did not rise"),
    "rollout/kl_ref": ([0.0, 5.0, 10.0, 20.0, 40.0], [0.0, 1.0, 2.0, 4.0, 8.0], "40.0 nats"),
    "policy/entropy": ([2.0, 1.5, 1.0, 0.5, 0.1], [2.0, 1.8, 1.6, 1.4, 1.2], "alike"),
    "rollout/finished": ([1.0, 1.0, 0.9, 0.8, 0.5], [0.9, 0.95, 0.99, 1.0, 1.0], "50% of the answers"),
    "rollout/length_mean": ([20.0, 25.0, 30.0, 35.0, 40.0], [20.0, 21.0, 22.0, 23.0, 24.0], "from 20 to 40"),
    "policy/clipfrac": ([0.1, 0.2, 0.3, 0.4, 0.5], [0.1] * 5, "50% of the tokens"),
    "value/explained_variance": ([0.0, -0.1, -0.2, -0.3, -0.5], [-0.5, 0.0, 0.2, 0.3, 0.4], "-0.50"),
    "train/grad_norm": ([1.0, 1.0, 90.0, 1.0, 1.0], [1.0, 2.0, 9.0, 1.0, 1.0], "90 at step 3"),
    "policy/grad_norm": ([1.0, 1.0, 90.0, 1.0, 1.0], [0.0] * 5, "policy/grad_norm"),
    "value/grad_norm": ([1.0, 1.0, 90.0, 1.0, 1.0], [1.0] * 5, "value/grad_norm"),
    "reward/unscored": ([0.0, 0.0, 2.0, 1.0, 0.0], [0.0] * 5, "3 answers"),
    "reward/flat_groups": ([0.1, 0.2, 0.4, 0.6, 0.9], [0.9, 0.6, 0.4, 0.2, 0.1], "90% of the groups"),
    "rollout/sampler_gap": ([0.0, 0.0, 0.2, 0.0, 0.0], [1e-6] * 5, "step 3"),
    "train/chosen_displaced": ([0.5, 0.6, 0.7, 0.8, 0.9], [0.5] * 5, "90% of the chosen"),
}


def stage(series=None, gaps=None, provenance=None, state="finished", reason=None, stale=(), problems=()) -> StagePage:
    summary = StageSummary("ppo", "ppo", "policy", state, 7, 10, None, ["sft"], list(stale), reason, 0.0, 1.0)
    return StagePage(summary, series or {}, gaps or {}, [], provenance or {}, {}, "", "", "", [], list(problems))


def curve(values: list[float]) -> list[tuple[int, float]]:
    return list(enumerate(values, start=1))


def test_every_rule_has_a_case():
    assert [metric for metric, _ in RULES] == list(CASES)


@pytest.mark.parametrize("metric", CASES)
def test_rule(metric):
    bad, good, word = CASES[metric]
    (finding,) = findings(stage({metric: curve(bad)}))
    assert word in finding.text and not finding.is_bad
    assert findings(stage({metric: curve(good)})) == []
    assert findings(stage({metric: curve(bad[:4])})) == [], "too short to judge"


def test_ends_are_means_of_tenths():
    assert ends(curve([float(i) for i in range(20)])) == (0.5, 18.5)
    assert ends(curve([3.0])) == (3.0, 3.0)


@pytest.mark.parametrize("state", ["failed", "damaged", "interrupted", "unknown"])
def test_bad_states(state):
    found = findings(stage(state=state, reason="loss is nan"))
    assert found == [Finding(f"{state} at step 7 of 10: loss is nan", True)]


def test_stopped_is_no_failure():
    assert findings(stage(state="stopped")) == [Finding("stopped at step 7 of 10: no reason was recorded", False)]
    assert findings(stage(state="running")) == []


def test_worst_first():
    found = findings(stage({"train/loss": curve([1.0] * 9)}, {"policy/loss": [4, 5, 6, 7]}, stale=["sft"]))
    assert [finding.is_bad for finding in found] == [True, True, False]
    assert "policy/loss was not a finite number at step 4, 5, 6 and 1 more" in [finding.text for finding in found]
    assert any("sft has changed" in finding.text for finding in found)


def test_an_alarm_is_told_with_its_steps():
    series = {"rollout/kl_ref": curve([1.0] * 8), "alarm/kl_spike": [(3, 1.0), (4, 1.0), (5, 1.0), (8, 1.0)]}
    (finding,) = findings(stage(series))
    expected = "The policy has left the reference: alarm kl_spike at step 3 to 5, 8, look at rollout/kl_ref"
    assert finding == Finding(expected)
    (finding,) = findings(stage({"alarm/kl_spike": [(3, 1.0)], "alarm/of_another_version": [(3, 1.0)]}))
    assert "at step 3, look" in finding.text


def test_stretches():
    assert stretches([3, 4, 5, 9], range(1, 11)) == "3 to 5, 9"
    assert stretches([10, 20, 40], [10, 20, 30, 40]) == "10 to 20, 40"
    assert stretches([7], []) == "7"


RISING = [i / 10 for i in range(20)]
TURNING = [min(i, 16 - i) / 10 for i in range(20)]  # 0.8 at step 9, -0.3 at the end


@pytest.mark.parametrize(
    ("train", "test", "is_found"),
    [
        (RISING, TURNING, True),
        (RISING, RISING, False),
        (TURNING, TURNING, False),  # both fell
        (RISING, [0.3 * value for value in TURNING[:14]] + [0.1] * 6, False),  # within the noise
        (RISING[:4], TURNING[:4], False),
    ],
)
def test_a_falling_test_score_is_found_while_the_train_score_rises(train, test, is_found):
    found = findings(stage({"test/train_shift": curve(train), "test/shift": curve(test)}))
    assert ["the test score fell" in finding.text for finding in found] == [True] * is_found
    if is_found:  # windows of 3: the peak is (0.7 + 0.8 + 0.7) / 3, the end (-0.2 - 0.3) / 2
        assert "from 0.73 around step 9 to -0.25" in found[0].text and "from 0.80 to 1.85" in found[0].text
    assert findings(stage({"test/shift": curve(test)})) == []


def test_dropped_rows():
    source = {"path": "a.jsonl", "read": 100, "kept": 80, "dropped": {"longer than max_length": 20}}
    (finding,) = findings(stage(provenance={"data": {"sources": [source]}}))
    assert finding.text == "20% of a.jsonl was dropped: 20 longer than max_length"
    few = {**source, "dropped": {"empty answer": 5}}
    assert findings(stage(provenance={"data": {"sources": [few]}})) == []


@pytest.mark.parametrize(
    "provenance", [{}, {"data": None}, {"data": []}, {"data": {"sources": 3}}, {"data": {"sources": [None, {}, 5]}}]
)
def test_provenance_of_any_shape(provenance):
    assert findings(stage(provenance=provenance)) == []


def test_problems_are_passed_on():
    assert findings(stage(problems=["x: damaged"])) == [Finding("x: damaged")]
