"""Faults in numbers, put into real runs: a few of the scenarios that docs/reliability.md counts."""

from __future__ import annotations

import pytest

from scripts.reliability.sheet import ROWS


@pytest.mark.parametrize("id", ["R12", "R18"])
def test_nothing_that_is_not_finite_or_not_true_is_learned_from(lab, id):
    tally, _ = ROWS[id].run(lab, tries=ROWS[id].quick, seed=0)
    assert tally.tried == ROWS[id].quick and not tally.violations, "\n".join(tally.violations)
