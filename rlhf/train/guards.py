"""Invariants that every run checks. They cost nothing and catch what trains wrong in silence."""

from __future__ import annotations

import math

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
