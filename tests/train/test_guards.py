"""Invariants refuse what trains wrong in silence."""

from __future__ import annotations

import pytest

from rlhf.errors import NumericsError
from rlhf.train.guards import check_counts, check_same_weights, check_scored


@pytest.mark.parametrize(
    ("dtype", "allowed", "refused"), [("fp32", 9e-4, 1.1e-3), ("bf16", 0.09, 0.11), ("fp32", 0.0, float("nan"))]
)
def test_two_passes_of_the_same_weights_agree(dtype, allowed, refused):
    check_same_weights(allowed, dtype, "fresh samples of step 1")
    with pytest.raises(NumericsError, match="fresh samples of step 1: log-probabilities differ by"):
        check_same_weights(refused, dtype, "fresh samples of step 1")


def test_a_rollout_needs_a_score():
    check_scored(1, 8, step=0)
    with pytest.raises(NumericsError, match="rollout 3, found all 8 answers unscored"):
        check_scored(0, 8, step=2)


def test_a_minibatch_needs_something_to_learn_from():
    check_counts({"tokens": 3.0, "sequences": 1.0}, step=0, index=0)
    with pytest.raises(NumericsError, match="expected tokens to learn from in minibatch 2 of step 5, found none"):
        check_counts({"rows": 1.0, "tokens": 0.0}, step=4, index=1)
