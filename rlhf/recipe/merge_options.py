"""Options of `rlhf merge`: the models, and one block per registered function of `algo/merging.py`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf.recipe.schema import Block, ModelRef, default_name


class MergedModel(ModelRef):
    """A policy that was trained from the base."""

    weight: float = Field(ge=0, description="its share; 1/n each is the average of n models")


class MergeMethod(Block):
    """A way to merge, and what it asks of the recipe."""

    only_two: ClassVar[bool] = False  # defined between two models


class LinearMerge(MergeMethod):
    """base + sum of weight x (model - base), weights as they are (arXiv:2212.04089)."""

    name: Literal["linear"] = "linear"


class TiesMerge(MergeMethod):
    """Largest entries, elected signs, mean of those that agree (arXiv:2306.01708)."""

    name: Literal["ties"] = "ties"
    density: float = Field(0.2, gt=0, le=1, description="share of each tensor's changes that stays: the largest")
    scale: float = Field(1.0, gt=0, description="multiplies the merged change before it is added to the base")


class DareMerge(MergeMethod):
    """Changes dropped at random, the others rescaled, then linear (arXiv:2311.03099)."""

    not_arguments: ClassVar[tuple[str, ...]] = ("seed",)
    name: Literal["dare"] = "dare"
    density: float = Field(0.1, gt=0, le=1, description="share of the changes that stays, drawn at random")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of the draws")


class SlerpMerge(MergeMethod):
    """Along the arc between two changes, tensor by tensor; only the ratio of the weights counts."""

    only_two: ClassVar[bool] = True
    name: Literal["slerp"] = "slerp"


MergeChoice = Annotated[
    LinearMerge | TiesMerge | DareMerge | SlerpMerge, Field(discriminator="name"), default_name("linear")
]
