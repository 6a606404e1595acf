"""What goes into a checkpoint beside weights: every number comes back, NaN too, through real JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf.algo.masked import moments
from rlhf.recipe.stages import GRPORecipe, PPORecipe
from rlhf.run import commit
from rlhf.train.overoptimisation import Scale
from rlhf.train.state import OnlineState


def recipe(kind=PPORecipe, **options):
    return kind.model_validate({"model": {"from": "sft"}, "data": {"path": "x"}, **options})


def started(**options) -> OnlineState:
    return OnlineState.at_start(recipe(**options))


def through_json(state: OnlineState, folder: Path) -> dict:
    """As a checkpoint writes and reads it."""
    commit.write_json(folder / "state.json", state.as_json())
    return commit.read_json(folder / "state.json")


def test_the_state_before_the_first_step():
    state = started(kl={"coef": 0.3})
    assert state.kl_coef == 0.3 and state.penalty_beta is None and math.isnan(state.baseline)
    assert state.scores == {"count": 0.0, "total": 0.0, "squares": 0.0}
    assert started(policy_loss={"name": "ppo_penalty", "beta": 0.25}).penalty_beta == 0.25
    assert OnlineState.at_start(recipe(GRPORecipe)).kl_coef == 0.04


def test_two_states_share_nothing():
    first, second = started(), started()
    first.add_scores(moments(torch.tensor([1.0]), torch.tensor([True])))
    first.scores["count"] = 9.0
    assert second.scores["count"] == 0.0 and started().scores["count"] == 0.0


def test_scores_of_all_rollouts_are_added_up():
    state = started()
    for values in ([1.0, 3.0], [5.0, math.nan]):
        scores = torch.tensor(values)
        total = state.add_scores(moments(scores, ~scores.isnan()))
    assert state.scores == {"count": 3.0, "total": 9.0, "squares": 35.0}
    assert float(total.mean()) == 3.0 and float(total.variance(unbiased=True)) == pytest.approx(4.0)


def test_every_number_comes_back(tmp_path):
    options = {"policy_loss": {"name": "ppo_penalty"}, "guards": {"flat_reward": {"rollouts": 2}}}
    state = started(**options)
    state.kl_coef, state.penalty_beta, state.baseline = 0.1 + 0.2, 1 / 3, -2.5e-17
    state.add_scores(moments(torch.tensor([0.1, 0.7]), torch.ones(2).bool()))
    state.alarms.look({"reward/score_std": 0.0, "policy/entropy": 2.0})
    state.gap.look(Scale(1.0, 2.0), Scale(3.0, 4.0))
    saved = through_json(state, tmp_path)
    other = started(**options)
    other.restore(saved)
    assert (other.kl_coef, other.penalty_beta, other.baseline) == (0.1 + 0.2, 1 / 3, -2.5e-17)
    assert other.scores == state.scores and other.as_json() == state.as_json()
    # alarms and gap go on where they were
    row = {"reward/score_std": 0.0, "policy/entropy": 0.1}
    assert [alarm.name for alarm in other.alarms.look(row)] == ["entropy_collapse", "flat_reward"]
    assert other.gap.look(Scale(5.0, 1.0), Scale(3.0, 1.0)) == {
        "test/train_shift": 2.0, "test/shift": 0.0, "test/gap": 2.0
    }  # fmt: skip


def test_no_baseline_yet_is_null_and_comes_back_as_none_yet(tmp_path):
    saved = through_json(started(), tmp_path)
    assert saved["baseline"] is None and "NaN" not in json.dumps(saved)
    other = started()
    other.baseline = 3.0
    other.restore(saved)
    assert math.isnan(other.baseline)


def test_a_restored_state_goes_its_own_way(tmp_path):
    state = started()
    saved = state.as_json()
    other = started()
    other.restore(saved)
    other.add_scores(moments(torch.tensor([1.0]), torch.tensor([True])))
    assert state.scores["count"] == saved["scores"]["count"] == 0.0
