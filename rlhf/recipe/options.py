"""Options of the losses on pairs: one block per registered function, its keyword-only arguments as fields.

A block is chosen by its `name`. `algo/` holds the functions; a test holds both sides against each other. The on-policy
choices are in `policy_options.py`, the rewards in `reward_options.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.recipe.schema import Block, default_name

# --- preference losses (`rlhf dpo`) --------------------------------------------------------------------------------


class DpoLoss(Block):
    """Sigmoid DPO (arXiv:2305.18290 eq. 7)."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference, in 1/nats; 0.01-0.5")


class CdpoLoss(Block):
    """Conservative DPO: labels are flipped with probability label_smoothing (Mitchell 2023, eq. 3)."""

    name: Literal["cdpo"] = "cdpo"
    beta: float = Field(0.1, gt=0, description="strength of the pull towards the reference, in 1/nats; 0.01-0.5")
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="probability that a preference label is wrong")


PreferenceLoss = Annotated[DpoLoss | CdpoLoss, Field(discriminator="name"), default_name("dpo")]

# --- reward-model losses (`rlhf rm`) -------------------------------------------------------------------------------


class RmBtLoss(Block):
    """Bradley-Terry on score differences, with the row's margin if the data has one (arXiv:2203.02155 eq. 1)."""

    name: Literal["rm_bt"] = "rm_bt"
    center_coef: float = Field(
        0.0, ge=0, description="weight of (score_chosen + score_rejected)^2, which keeps scores near 0; 0.01 is usual"
    )


class RmBtSmoothLoss(Block):
    """Bradley-Terry for labels that are wrong with a known probability."""

    name: Literal["rm_bt_smooth"] = "rm_bt_smooth"
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="probability that a preference label is wrong")
    center_coef: float = Field(
        0.0, ge=0, description="weight of (score_chosen + score_rejected)^2, which keeps scores near 0; 0.01 is usual"
    )


RewardLoss = Annotated[RmBtLoss | RmBtSmoothLoss, Field(discriminator="name"), default_name("rm_bt")]
