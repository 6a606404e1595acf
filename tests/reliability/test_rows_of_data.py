"""A few tries of the rows about what models read: lengths, and tokenizers that differ."""

from __future__ import annotations

import pytest

from scripts.reliability.sheet import ROWS

pytestmark = pytest.mark.pipeline


@pytest.mark.parametrize("id", ["R16", "R17"])
def test_nothing_is_lost(lab, id):
    tally, _ = ROWS[id].run(lab, tries=ROWS[id].quick, seed=0)
    assert tally.tried and not tally.violations, tally.violations
