"""The rows about security, a few tries each."""

from __future__ import annotations

import pytest

from scripts.reliability.sheet import ROWS

SECURITY = ("S1", "S2", "S3", "S4", "S5", "S6", "S7", "S10", "S11", "S13")


@pytest.mark.parametrize("id", SECURITY)
def test_nothing_gets_through(lab, id):
    row = ROWS[id]
    tally, _ = row.run(lab, tries=row.quick, seed=0)
    assert tally.tried >= row.quick and not tally.violations, "\n".join(tally.violations)
