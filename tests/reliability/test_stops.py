"""Requests to stop and starts at the same time, each row of the sheet a few times."""

from __future__ import annotations

import pytest

from scripts.reliability.sheet import ROWS

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("id", ["R7", "R14"])
def test_nothing_is_lost(lab, id):
    tally, _ = ROWS[id].run(lab, tries=ROWS[id].quick, seed=0)
    assert tally.tried and not tally.violations
