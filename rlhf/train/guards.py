"""Invariants that every run checks. They cost nothing and catch what trains wrong in silence."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rlhf.errors import NumericsError

# Largest mean difference, in nats per token, between two passes of the same weights over the same tokens.
_SAME_WEIGHTS = {"fp32": 1e-3, "bf16": 0.1}


def check_same_weights(found: float, dtype: str, what: str) -> None:
    """Refuse to train when two log-probs that must agree do not.

    found: mean absolute difference in nats per token. what: the sentence's subject, e.g. "fresh samples of step 3".
    """
    allowed = _SAME_WEIGHTS[dtype]
    if not math.isfinite(found) or found > allowed:
        raise NumericsError(
            f"{what}: log-probabilities differ by {found:.3g} nats per token, expected at most {allowed:g}",
            fix="The policy that samples or the reference is not the policy that is trained: check dropout, dtype and"
            " the models named in the recipe.",
        )


def check_scored(scored: int, answers: int, step: int) -> None:
    """Refuse a rollout without a single score: there is nothing to learn from, and nothing to report."""
    if not scored:
        raise NumericsError(
            f"expected scores in rollout {step + 1}, found all {answers} answers unscored",
            where="rewards",
            fix="A reward that returns None leaves an answer out: see why it does so for every one.",
        )


def check_counts(counts: Mapping[str, float], step: int, index: int) -> None:
    """Refuse an optimizer step whose mean would be taken over nothing."""
    for name, count in counts.items():
        if not count:
            raise NumericsError(
                f"expected {name} to learn from in minibatch {index + 1} of step {step + 1}, found none",
                fix="All its answers are unscored: use fewer train.minibatches, or a reward that scores more answers.",
            )
