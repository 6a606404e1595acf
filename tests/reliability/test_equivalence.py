"""A gradient does not depend on how its batch is divided."""

from __future__ import annotations

import pytest
import torch

from scripts.reliability.equivalence import TOLERANCE, VARIANTS, check
from scripts.reliability.lab import STAGES
from scripts.reliability.sheet import ROWS


@pytest.mark.distributed
def test_no_gradient_differs(lab):
    row = ROWS["R19"]
    tally, _ = row.run(lab, tries=row.quick, seed=0)
    assert tally.tried == row.quick and not tally.violations, "\n".join(tally.violations)


def test_a_wrong_gradient_is_seen(lab):
    """Off by a few millionths as a whole, by as much in one tensor, or by one bit where nothing may differ."""
    draw = torch.Generator().manual_seed(0)
    right = {f"model/model.safetensors: {i}": torch.randn(50, 50, generator=draw) for i in range(20)}
    check(right, right, lab, bitwise=True)
    with pytest.raises(AssertionError, match="gradients differ"):
        check({key: value * (1 + 2 * TOLERANCE) for key, value in right.items()}, right, lab, bitwise=False)
    first = next(iter(right))
    one = right[first].clone()
    one[0, 0] = torch.nextafter(one[0, 0], torch.tensor(torch.inf))
    check({**right, first: one}, right, lab, bitwise=False)
    with pytest.raises(AssertionError, match=f"{first} differs"):
        check({**right, first: one}, right, lab, bitwise=True)
    with pytest.raises(AssertionError, match="elsewhere in another way"):
        check({**right, first: right[first] * (1 + 1e-5)}, right, lab, bitwise=False)


def test_the_full_row_tries_every_way_with_every_stage():
    assert ROWS["R19"].full == len(VARIANTS) * len(STAGES)
