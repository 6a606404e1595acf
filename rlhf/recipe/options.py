"""Options of the named choices: one block per registered function, the function's keyword-only arguments as fields.

A block is chosen by its `name` (losses, estimators) or `kind` (rewards). `algo/` and `rewards/` hold the functions; a
test holds both sides against each other.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rlhf.recipe.schema import Block, ModelRef, ZeroBlock


def _default_name(name: str) -> BeforeValidator:
    """Lets a block leave out its `name`: `{beta: 0.05}` keeps the stage's default choice."""

    def fill(value: Any) -> Any:
        return {"name": name, **value} if isinstance(value, dict) else value

    return BeforeValidator(fill)


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


PreferenceLoss = Annotated[DpoLoss | CdpoLoss, Field(discriminator="name"), _default_name("dpo")]

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


RewardLoss = Annotated[RmBtLoss | RmBtSmoothLoss, Field(discriminator="name"), _default_name("rm_bt")]

# --- on-policy pieces (`rlhf ppo`, `rlhf grpo`) --------------------------------------------------------------------


class GaeAdvantage(Block):
    """Generalised advantage estimation with a critic (arXiv:1506.02438 eq. 16)."""

    name: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="bias-variance trade-off: 0 one-step, 1 full return")


class GrpoAdvantage(Block):
    """Score minus the group's mean, over the group's standard deviation (arXiv:2402.03300)."""

    name: Literal["grpo"] = "grpo"
    eps: float = Field(1e-4, gt=0, description="added to the standard deviation")


class PpoClipLoss(Block):
    """Clipped surrogate (arXiv:1707.06347 eq. 7)."""

    name: Literal["ppo_clip"] = "ppo_clip"
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped above at 1 + clip_high")


class PpoValueLoss(Block):
    """Clipped squared error of the critic (arXiv:1707.06347, openai/baselines)."""

    name: Literal["ppo_value"] = "ppo_value"
    clip: float = Field(0.2, gt=0, description="values move at most this far from the rollout's values")


class KlBlock(Block):
    """Distance to the reference policy."""

    coef: float = Field(0.05, ge=0, description="weight of the per-token KL penalty")
    estimator: Literal["k1", "k2", "k3", "abs"] = Field(
        "k1", description="KL estimator from the sampled token's log-probabilities"
    )


class ScoresBlock(Block):
    """What happens to a score before it becomes a reward."""

    clip: float | None = Field(None, gt=0, description="clip scores to +- this")
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="taken off the score of an answer that did not end by itself"
    )


# --- rewards -------------------------------------------------------------------------------------------------------


class ModelReward(ModelRef):
    """A trained reward model."""

    kind: Literal["model"] = "model"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    zero: ZeroBlock = Field(ZeroBlock(), description="sharding of the reward model; stage 0 or 3")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute type of the reward model")


class ExactReward(Block):
    """1 if the answer equals the row's reference answer, else 0; white space and letter case are normalised."""

    kind: Literal["exact"] = "exact"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    answer: str = Field("answer", description="column with the reference answer")


class NumericReward(Block):
    """1 if the number after the marker equals the reference's number, else 0; an unparsable answer scores 0."""

    kind: Literal["numeric"] = "numeric"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    answer: str = Field("answer", description="column with the reference answer")
    marker: str = Field("####", description="the result stands after the last occurrence of this text")
    tolerance: float = Field(1e-6, ge=0, description="largest relative difference that counts as equal")


class FormatReward(Block):
    """1 if the pattern is found in the answer, else 0."""

    kind: Literal["format"] = "format"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    pattern: str = Field(r"#### ?-?\d[\d,]*(\.\d+)?\s*$", description="regular expression searched in the answer")


class LengthReward(Block):
    """1 at the target length, falling linearly to 0 at `scale` words away."""

    kind: Literal["length"] = "length"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    target: int = Field(50, ge=0, description="length in words that scores 1")
    scale: int = Field(50, ge=1, description="distance in words at which the score reaches 0")


class FunctionReward(Block):
    """A Python function of yours, `file.py:name`; the file must also be named on the command line with --allow-code."""

    kind: Literal["function"] = "function"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    function: str = Field(
        description="file.py:name; called as name(rows, answers) -> list of floats or None (unscored)"
    )


Reward = Annotated[
    ModelReward | ExactReward | NumericReward | FormatReward | LengthReward | FunctionReward,
    Field(discriminator="kind"),
]
