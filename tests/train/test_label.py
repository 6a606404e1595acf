"""Labelling options and scores."""

from __future__ import annotations

import pytest

from rlhf.recipe.stages import LabelBlock
from rlhf.train.label import known


def test_no_score_is_no_number():
    assert known(float("nan")) is None and known(0.0) == 0.0


@pytest.mark.parametrize(
    ("batch", "answers", "rollout_batch", "together"), [(256, 4, 64, 16), (8, 4, 64, 8), (8, 16, 4, 1)]
)
def test_prompts_sampled_together_depend_on_the_recipe_alone(batch, answers, rollout_batch, together):
    block = LabelBlock(batch=batch, answers=answers, rollout_batch=rollout_batch)
    assert block.prompts_together() == together
