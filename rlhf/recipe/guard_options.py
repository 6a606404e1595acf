"""Options of the running alarms of on-policy stages: when each goes off, and whether it warns or stops the run."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from rlhf.recipe.schema import Block


class Guard(Block):
    """One alarm."""

    metric: ClassVar[str]  # what it looks at
    on_alarm: Literal["warn", "stop"] = Field(
        "warn", description="warn: say it in the log and go on; stop: checkpoint and end the run"
    )


class KlSpikeGuard(Guard):
    """The policy has left the reference."""

    metric: ClassVar[str] = "rollout/kl_ref"
    threshold: float = Field(50.0, gt=0, description="KL to the reference, in nats per answer")


class EntropyCollapseGuard(Guard):
    """The policy says the same whatever is drawn."""

    metric: ClassVar[str] = "policy/entropy"
    threshold: float = Field(0.1, gt=0, lt=1, description="entropy, as a share of the first rollout's")


class EosRateGuard(Guard):
    """Answers no longer end by themselves."""

    metric: ClassVar[str] = "rollout/finished"
    threshold: float = Field(
        0.5, gt=0, le=1, description="share of finished answers, as a share of the first rollout's"
    )


class LengthDriftGuard(Guard):
    """Answers have become much longer or shorter."""

    metric: ClassVar[str] = "rollout/length_mean"
    threshold: float = Field(3.0, gt=1, description="factor to the first rollout's mean length, up or down")


class FlatRewardGuard(Guard):
    """All answers have the same score: there is nothing to learn."""

    metric: ClassVar[str] = "reward/score_std"
    rollouts: int = Field(3, ge=1, description="so many rollouts in a row with a reward deviation of 0")


class AllClippedGuard(Guard):
    """No answer ends: max_new_tokens cuts every one off."""

    metric: ClassVar[str] = "rollout/finished"
    rollouts: int = Field(3, ge=1, description="so many rollouts in a row without a finished answer")


class ExplainedVarianceGuard(Guard):
    """The critic predicts worse than a constant."""

    metric: ClassVar[str] = "value/explained_variance"
    rollouts: int = Field(5, ge=1, description="so many rollouts in a row with a negative explained variance")


class RepeatedAnswersGuard(Guard):
    """Different prompts and draws get the same answers."""

    metric: ClassVar[str] = "rollout/repeated"
    threshold: float = Field(0.5, gt=0, le=1, description="share of answers that another answer repeats word for word")


class GuardsBlock(Block):
    """Running alarms. Each says what was seen, three likely causes, and the metric to look at."""

    kl_spike: KlSpikeGuard = Field(KlSpikeGuard(), description="the KL to the reference is out of bounds")
    entropy_collapse: EntropyCollapseGuard = Field(
        EntropyCollapseGuard(), description="the entropy has fallen to a fraction of what it was"
    )
    eos_rate: EosRateGuard = Field(EosRateGuard(), description="fewer answers end by themselves than at the start")
    length_drift: LengthDriftGuard = Field(LengthDriftGuard(), description="answers are much longer or shorter")
    flat_reward: FlatRewardGuard = Field(FlatRewardGuard(), description="every answer has the same score")
    all_clipped: AllClippedGuard = Field(AllClippedGuard(), description="max_new_tokens cuts off every answer")
    explained_variance: ExplainedVarianceGuard = Field(
        ExplainedVarianceGuard(), description="the critic explains less than nothing"
    )
    repeated_answers: RepeatedAnswersGuard = Field(
        RepeatedAnswersGuard(), description="answers to different prompts are the same"
    )


def metric_of_alarms() -> dict[str, str]:
    """Name of each alarm -> the metric it looks at."""
    return {name: type(field.default).metric for name, field in GuardsBlock.model_fields.items()}
