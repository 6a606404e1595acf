"""What the blocks of losses refuse of themselves."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlhf.recipe.loss_options import BcoLoss
from rlhf.recipe.pair_options import FDpoLoss, RobustDpoLoss


def test_an_exponent_belongs_to_its_divergence() -> None:
    assert FDpoLoss(divergence="alpha", alpha=0.3).alpha == 0.3
    with pytest.raises(ValidationError, match="expected alpha with divergence alpha and only there, found none"):
        FDpoLoss(divergence="alpha")
    with pytest.raises(ValidationError, match="found 0.3 with divergence js"):
        FDpoLoss(alpha=0.3)


def test_weights_have_a_smallest_before_their_largest() -> None:
    with pytest.raises(ValidationError, match="expected min_density_ratio <= max_density_ratio, found 2.0 > 1.0"):
        BcoLoss(min_density_ratio=2.0, max_density_ratio=1.0)


def test_half_of_the_labels_cannot_be_wrong() -> None:
    with pytest.raises(ValidationError, match="less than 0.5"):
        RobustDpoLoss(label_smoothing=0.5)
