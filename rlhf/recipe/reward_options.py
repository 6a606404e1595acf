"""Options of rewards, one block per kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from rlhf.recipe.schema import Block, ModelRef, ZeroBlock


class ModelReward(ModelRef):
    """A trained reward model."""

    kind: Literal["model"] = "model"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    zero: ZeroBlock = Field(ZeroBlock(), description="sharding of the reward model; stage 0 or 3")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="compute type of the reward model")
    statistics: Literal["none", "center", "normalise"] = Field(
        "none",
        description="center: subtract the published mean of its scores; normalise: and divide by their deviation",
    )


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
    timeout: float = Field(60.0, gt=0, description="seconds that one call may take")


class ProcessReward(Block):
    """A Python function of yours that scores every step of an answer; needs --allow-code like `function`."""

    kind: Literal["process"] = "process"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    function: str = Field(
        description="file.py:name; called as name(rows, steps), steps a list of texts per answer -> a score per step"
    )
    separator: str = Field("\n", min_length=1, description="a step ends behind this text, and at the answer's end")
    timeout: float = Field(60.0, gt=0, description="seconds that one call may take")


class HttpReward(Block):
    """A scorer behind an HTTP address: POST {"prompts", "answers", "rows"} -> {"scores": [...]}."""

    kind: Literal["http"] = "http"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    url: str = Field(description="where answers are posted, http:// or https://")
    api_key_env: str | None = Field(
        None, min_length=1, description="environment variable that holds the key; the key itself is written nowhere"
    )
    timeout: float = Field(30.0, gt=0, description="seconds that one request may take")
    retries: int = Field(3, ge=0, le=10, description="further tries of a failed request")
    on_failure: Literal["stop", "unscored"] = Field(
        "stop", description="after the last try; stop: end the run, resumable; unscored: go on without those answers"
    )
    batch_size: int = Field(16, ge=1, description="answers per request")


class DemoGoldReward(Block):
    """The gold reward of the embedded demo, for its prompts only; with noise it is the demo's labeller."""

    kind: Literal["demo_gold"] = "demo_gold"
    weight: float = Field(1.0, description="factor in the weighted sum of rewards")
    noise: float = Field(
        0.0, ge=0, description="scale of the Gumbel noise that is added; 1: comparisons are as noisy as demo:pairs"
    )
    seed: int = Field(0, ge=0, description="seed of the noise")


Reward = Annotated[
    ModelReward
    | ExactReward
    | NumericReward
    | FormatReward
    | LengthReward
    | FunctionReward
    | ProcessReward
    | HttpReward
    | DemoGoldReward,
    Field(discriminator="kind"),
]
