"""The losses that a recipe can choose: all preference losses, and those of reward models with their options.

A block is chosen by its `name`; its fields are the keyword-only arguments of that function in `algo/`. A test holds
both sides against each other. The options of preference losses are in `pair_options.py` and `loss_options.py`,
on-policy choices in `policy_options.py`, rewards in `reward_options.py`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf.recipe import loss_options as others
from rlhf.recipe import pair_options as pairs
from rlhf.recipe.schema import Block, default_name

# --- preference losses (`rlhf dpo`) -----------------------------------------------------------------------------------

_PREFERENCE_LOSSES = (
    pairs.DpoLoss
    | pairs.CdpoLoss
    | pairs.RobustDpoLoss
    | pairs.IpoLoss
    | pairs.IpoAvgLoss
    | pairs.DpoNormLoss
    | pairs.DpoRewardMarginLoss
    | pairs.FDpoLoss
    | pairs.DpopLoss
    | pairs.RDpoLoss
    | pairs.RpoNllLoss
    | pairs.Tdpo1Loss
    | pairs.Tdpo2Loss
    | pairs.BetaDpoLoss
    | pairs.AotLoss
    | pairs.RsoHingeLoss
    | pairs.GpoExponentialLoss
    | pairs.GpoTruncatedQuadraticLoss
    | pairs.GpoSavageLoss
    | pairs.GpoSquaredLoss
    | pairs.ExoPrefLoss
    | pairs.DiscopopLoss
    | pairs.NcaPairLoss
    | pairs.ApoZeroLoss
    | pairs.ApoDownLoss
    | pairs.BcoPairLoss
    | pairs.SppoLoss
    | pairs.SppoHardLoss
    | pairs.DnoLoss
    | pairs.SimpoLoss
    | pairs.OrpoLoss
    | pairs.CpoLoss
    | pairs.SlicHfLoss
    | pairs.UnlikelihoodSeqLoss
    | pairs.UnlikelihoodTokenLoss
    | pairs.PreferredFtLoss
    | pairs.PairwiseCringeLoss
    | others.KtoLoss
    | others.ApoZeroUnpairedLoss
    | others.BcoLoss
    | others.AotUnpairedLoss
    | others.NpoLoss
    | others.CringeLoss
    | others.DroVLoss
    | others.PlDpoLoss
    | others.PairLogisticLoss
    | others.LipoLambdaLoss
    | others.ListnetSoftmaxLoss
    | others.DpoRwLoss
    | others.ExoRwLoss
    | others.D2oLoss
    | others.RrhfLoss
    | others.ProLoss
)
PreferenceLoss = Annotated[_PREFERENCE_LOSSES, Field(discriminator="name"), default_name("dpo")]

# --- reward-model losses (`rlhf rm`) -------------------------------------------------------------------------------


class RewardLossBlock(Block):
    """A loss of reward models and what it asks of the data."""

    rows: ClassVar[Literal["pairs", "lists"]] = "pairs"


class RmBtLoss(RewardLossBlock):
    """Bradley-Terry on score differences, with the row's margin if the data has one (arXiv:2203.02155 eq. 1)."""

    name: Literal["rm_bt"] = "rm_bt"
    center_coef: float = Field(
        0.0, ge=0, description="weight of (score_chosen + score_rejected)^2, which keeps scores near 0; 0.01 is usual"
    )


class RmBtSmoothLoss(RewardLossBlock):
    """Bradley-Terry for labels that are wrong with a known probability."""

    name: Literal["rm_bt_smooth"] = "rm_bt_smooth"
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description="probability that a preference label is wrong")
    center_coef: float = Field(
        0.0, ge=0, description="weight of (score_chosen + score_rejected)^2, which keeps scores near 0; 0.01 is usual"
    )


class RmKwiseLoss(RewardLossBlock):
    """Bradley-Terry on all pairs of a list, each list counting once (arXiv:2203.02155 eq. 1)."""

    rows: ClassVar[Literal["pairs", "lists"]] = "lists"
    name: Literal["rm_kwise"] = "rm_kwise"


class RmSoftmaxLoss(RewardLossBlock):
    """Softmax over a list's scores, the best answer being the right one (arXiv:1909.08593 eq. 1)."""

    rows: ClassVar[Literal["pairs", "lists"]] = "lists"
    name: Literal["rm_softmax"] = "rm_softmax"


RewardLoss = Annotated[
    RmBtLoss | RmBtSmoothLoss | RmKwiseLoss | RmSoftmaxLoss, Field(discriminator="name"), default_name("rm_bt")
]
