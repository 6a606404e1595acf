"""One recipe per stage: shared blocks plus the stage's own fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.recipe.guard_options import GuardsBlock
from rlhf.recipe.judge_options import Judge
from rlhf.recipe.loss_options import DroVLoss
from rlhf.recipe.merge_options import LinearMerge, MergeChoice, MergedModel
from rlhf.recipe.options import PreferenceLoss, RewardLoss, RmBtLoss
from rlhf.recipe.pair_options import DpoLoss
from rlhf.recipe.policy_options import (
    Aggregation,
    GaeAdvantage,
    GroupAdvantage,
    GrpoAdvantage,
    KlBlock,
    PolicyLoss,
    PpoAdvantage,
    PpoClipLoss,
    PpoValueLoss,
    ScoresBlock,
)
from rlhf.recipe.reward_options import ModelReward, Reward
from rlhf.recipe.schema import (
    MICRO_TOKENS,
    Block,
    CheckpointBlock,
    DataBlock,
    EvalBlock,
    LearnBlock,
    LogBlock,
    ModelBlock,
    ModelRef,
    OnlineTrainBlock,
    OptimBlock,
    RecordBlock,
    SamplingBlock,
    TrainBlock,
    ZeroBlock,
    conflict,
)


class ReferenceBlock(ModelRef):
    """The frozen policy that the trained one is held to. Without a source it is the model the stage starts from."""

    zero: ZeroBlock = Field(ZeroBlock(), description="sharding of the reference; stage 0 or 3")


class CriticBlock(ModelRef, OptimBlock):
    """The value model of PPO: started from a reward model (its head is kept) or from a policy (new head)."""

    from_: str | None = Field(
        "rm", alias="from", description="a stage of this run directory (rm) or of another one (runs/other/rm)"
    )
    lr: float = Field(1e-5, gt=0, description="peak learning rate of the critic")
    zero: ZeroBlock = Field(ZeroBlock(), description="sharding of the critic")
    warmup_rollouts: int = Field(
        0, ge=0, description="rollouts at the start on which the critic learns alone, before the policy moves"
    )

    @model_validator(mode="before")
    @classmethod
    def _path_replaces_default(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("path") and not {"from", "from_"} & values.keys():
            return {**values, "from": None}
        return values


class PromptCriticBlock(ModelRef, OptimBlock):
    """The value model of dro_v: without a source it starts from the policy's model, with a new head."""

    lr: float = Field(1e-5, gt=0, description="peak learning rate of the value model")
    zero: ZeroBlock = Field(ZeroBlock(), description="sharding of the value model")


class PreferenceTrainBlock(TrainBlock):
    """Offline training, with a learning rate for preference losses."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate")


class SFTTrainBlock(TrainBlock):
    """Offline training that may be held to its start."""

    l1: float = Field(
        0.0,
        ge=0,
        description="L1 penalty on what training changes, as a share of lr per step; leaves most weights as they were",
    )


class PPOTrainBlock(OnlineTrainBlock):
    """On-policy training of an actor with a critic."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate of the policy")
    inner_epochs: int = Field(2, ge=1, description="passes over each rollout")
    minibatches: int = Field(2, ge=1, description="optimizer steps per pass; must divide prompts x answers")


class GRPOTrainBlock(OnlineTrainBlock):
    """On-policy training with groups of answers."""

    lr: float = Field(1e-6, gt=0, description="peak learning rate of the policy")
    prompts: int = Field(16, ge=1, description="prompts per rollout, over all devices")
    answers: int = Field(8, ge=1, description="answers per prompt: the group")


class GRPOKlBlock(KlBlock):
    """Distance to the reference policy, as a term of the loss."""

    placement: Literal["reward", "loss"] = Field(
        "loss", description="taken off every token's reward, or added to the loss"
    )
    coef: float = Field(0.04, ge=0, description="weight of the per-token KL penalty; where a controller starts")
    estimator: Literal["k1", "k2", "k3", "abs"] = Field(
        "k3", description="KL estimator from the sampled token's log-probabilities"
    )


class PretrainingData(DataBlock):
    """Rows to keep: documents, or the SFT data."""

    key: ClassVar[str] = "pretraining.data"


class PretrainingBlock(Block):
    """PPO-ptx: supervised rows mixed into every update of the policy (arXiv:2203.02155 eq. 2)."""

    coef: float = Field(1.0, gt=0, description="weight of the supervised loss, averaged over its tokens")
    data: PretrainingData = Field(description="rows to keep: documents, or the SFT data")


class EmaBlock(Block):
    """A second policy whose weights follow the trained one's slowly; published beside it as `ema/`."""

    decay: float = Field(0.99, ge=0, lt=1, description="weight of the past at every optimizer step")


class RsoBlock(Block):
    """Statistical rejection sampling: answers as from a policy that is better by the rewards (arXiv:2309.06657)."""

    accept: int = Field(8, ge=2, description="answers accepted per prompt, an even number: they meet two by two")
    beta: float = Field(0.5, gt=0, description="how far below the best an accepted score may be, in units of the score")


class LabelBlock(Block):
    """Which answers are compared, and how many are made at a time."""

    answers: int = Field(4, ge=2, description="answers sampled per prompt, to be compared with each other")
    pairs: Literal["best_worst", "all", "rso"] = Field(
        "best_worst",
        description="best_worst: a prompt's best answer with its worst; all: every two of its answers; rso: those that"
        " rejection sampling accepts, two by two",
    )
    rso: RsoBlock = Field(RsoBlock(), description="what rejection sampling accepts")
    min_margin: float = Field(
        0.0, ge=0, description="only answers whose scores differ by more than this make a pair; equal ones never do"
    )
    unfinished: Literal["drop", "keep"] = Field(
        "drop", description="answers that did not end by themselves: compared with nothing, or like others"
    )
    batch: int = Field(
        256, ge=1, description="prompts per step, over all devices: sampled, scored and written together"
    )
    rollout_batch: int = Field(64, ge=1, description="answers sampled together on a device")
    micro_tokens: int = Field(
        MICRO_TOKENS, ge=1, description="tokens per forward pass of a reward model; a longer answer goes alone"
    )
    micro_batch: int | None = Field(None, ge=1, description="answers per forward pass of a reward model at most")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of the answers")

    def prompts_together(self) -> int:
        """Prompts whose answers are sampled together on a device."""
        return min(max(1, self.rollout_batch // self.answers), self.batch)


class AnyRecipe(Block):
    """What a subcommand is given: no key is common to all."""

    # Keys that say how a run is carried out, not what comes of it: a run that goes on may have others.
    of_the_process: ClassVar[frozenset[str]] = frozenset({"max_minutes", "checkpoint", "log"})


class Recipe(AnyRecipe):
    """What every stage with a model and data has."""

    model: ModelBlock = Field(description="the model to train")
    data: DataBlock = Field(description="what to learn from, or the prompts to answer")
    zero: ZeroBlock = Field(ZeroBlock(), description="sharding of the trained model")
    log: RecordBlock = Field(RecordBlock(), description="what is recorded")
    max_minutes: float | None = Field(
        None,
        gt=0,
        description="minutes after which this start of the stage stops as at SIGTERM, exit code 75; the same command"
        " resumes",
    )


class LearningRecipe(Recipe):
    """What every stage that trains has."""

    checkpoint: CheckpointBlock = Field(CheckpointBlock(), description="checkpoints for resuming")
    log: LogBlock = Field(LogBlock(), description="what is shown and recorded")
    train: LearnBlock = Field(LearnBlock(), description="optimisation")


class SFTRecipe(LearningRecipe):
    """Supervised fine-tuning on completions."""

    train: SFTTrainBlock = Field(SFTTrainBlock(), description="optimisation")
    eval: EvalBlock = Field(EvalBlock(), description="held-out loss while training")
    sampling: SamplingBlock = Field(SamplingBlock(), description="how the sample generations are drawn")


class RewardRecipe(LearningRecipe):
    """Reward model on preference pairs."""

    loss: RewardLoss = Field(RmBtLoss(), description="the loss and its options")
    train: TrainBlock = Field(TrainBlock(), description="optimisation")
    eval: EvalBlock = Field(EvalBlock(), description="held-out accuracy while training")


class PreferenceRecipe(LearningRecipe):
    """DPO and its family: losses on pairs, on single labelled answers, or on lists of scored answers."""

    loss: PreferenceLoss = Field(DpoLoss(), description="the loss and its options")
    further_losses: list[PreferenceLoss] = Field(
        [], description="losses on the same rows, added with their weights, e.g. [{name: preferred_ft, weight: 0.1}]"
    )
    reference: ReferenceBlock = Field(ReferenceBlock(), description="the frozen reference policy")
    critic: PromptCriticBlock = Field(PromptCriticBlock(), description="dro_v: the value model and its optimisation")
    train: PreferenceTrainBlock = Field(PreferenceTrainBlock(), description="optimisation")
    eval: EvalBlock = Field(EvalBlock(), description="held-out loss and accuracy while training")
    sampling: SamplingBlock = Field(SamplingBlock(), description="how the sample generations are drawn")

    @property
    def losses(self) -> tuple[PreferenceLoss, ...]:
        """The terms of the sum that is minimised."""
        return (self.loss, *self.further_losses)

    @property
    def learns_value(self) -> bool:
        """Whether a second network learns beside the policy."""
        return any(isinstance(block, DroVLoss) for block in self.losses)


class OnlineRecipe(LearningRecipe):
    """What PPO and GRPO share."""

    train: OnlineTrainBlock = Field(OnlineTrainBlock(), description="rollouts and optimisation of the policy")
    reference: ReferenceBlock = Field(ReferenceBlock(), description="the frozen reference policy")
    rewards: list[Reward] = Field(
        [ModelReward(from_="rm")], min_length=1, description="scores, added up with their weights"
    )
    sampling: SamplingBlock = Field(SamplingBlock(), description="how answers are sampled")
    test_rewards: list[Reward] = Field(
        [],
        description="scored on the same answers, never learned from: the gap to `rewards` shows over-optimisation",
    )
    scores: ScoresBlock = Field(ScoresBlock(), description="what happens to scores before they become rewards")
    kl: KlBlock = Field(KlBlock(), description="distance to the reference policy")
    whiten_rewards: bool = Field(
        False, description="give the rollout's token rewards variance 1, over all devices; their mean stays"
    )
    whiten_advantages: bool = Field(
        False, description="give the rollout's advantages mean 0 and variance 1, over all devices"
    )
    advantage: GroupAdvantage = Field(GrpoAdvantage(), description="advantage estimator")
    policy_loss: PolicyLoss = Field(PpoClipLoss(), description="the policy loss and its options")
    aggregation: Aggregation = Field(
        "token_mean",
        description="average over all tokens of the minibatch, over each answer's tokens and then over answers, over"
        " answers of their sums, or the sum over answers x sampling.max_new_tokens (constant)",
    )
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus in the loss")
    pretraining: PretrainingBlock | None = Field(None, description="supervised rows mixed into every update")
    ema: EmaBlock | None = Field(None, description="also publish an average of the policy over the updates")
    guards: GuardsBlock = Field(GuardsBlock(), description="running alarms: when they go off, warn or stop")
    share_base: bool = Field(
        False, description="LoRA: policy, reference, critic and reward model as adapters on one frozen base"
    )


class PPORecipe(OnlineRecipe):
    """PPO with a critic."""

    train: PPOTrainBlock = Field(PPOTrainBlock(), description="rollouts and optimisation of the policy")
    critic: CriticBlock = Field(CriticBlock(), description="the value model and its optimisation")
    advantage: PpoAdvantage = Field(GaeAdvantage(), description="advantage estimator")
    whiten_advantages: bool = Field(
        True, description="give the rollout's advantages mean 0 and variance 1, over all devices"
    )
    value_loss: PpoValueLoss = Field(PpoValueLoss(), description="the critic's loss and its options")


class OpponentBlock(Block):
    """Nash-MD: an answer's score is how sure it is preferred to one of a mixture policy (arXiv:2312.00886 sec. 7)."""

    mixture: float = Field(
        0.25, ge=0, le=1, description="share of the reference in the mixture policy^(1 - mixture) reference^mixture"
    )


class GRPORecipe(OnlineRecipe):
    """GRPO and its family, without a critic: answers are compared with each other or with a baseline."""

    train: GRPOTrainBlock = Field(GRPOTrainBlock(), description="rollouts and optimisation of the policy")
    kl: GRPOKlBlock = Field(GRPOKlBlock(), description="distance to the reference policy")
    opponent: OpponentBlock | None = Field(
        None, description="score each answer by sigmoid(its reward - that of a mixture's answer) - 1/2 (Nash-MD)"
    )
    aggregation: Aggregation = Field(
        "sequence_mean",
        description="average over all tokens of the minibatch, over each answer's tokens and then over answers, over"
        " answers of their sums, or the sum over answers x sampling.max_new_tokens (constant)",
    )


class LabelRecipe(Recipe):
    """Comparisons from a policy: answers are sampled, scored and paired. Nothing is trained."""

    alternatives: ClassVar[tuple[tuple[str, ...], ...]] = (("rewards", "judge"),)

    model: ModelBlock = Field(description="the policy that answers")
    zero: ZeroBlock = Field(ZeroBlock(), description="sharding of the policy; stage 0 or 3")
    rewards: list[Reward] = Field([], description="the labeller: scores, added up with their weights")
    judge: Judge | None = Field(
        None, description="the labeller instead: a language model that compares or gives points"
    )
    sampling: SamplingBlock = Field(SamplingBlock(), description="how answers are sampled")
    label: LabelBlock = Field(LabelBlock(), description="which answers are compared")


class MergeRecipe(AnyRecipe):
    """One policy from several that were trained from the same base, without data and without training."""

    base: ModelRef = Field(description="the policy that all models were trained from")
    models: list[MergedModel] = Field(min_length=1, description="policies trained from the base, with their weights")
    method: MergeChoice = Field(LinearMerge(), description="how their changes are put together")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="type of the published weights; arithmetic is fp32")


ScoringRecipe = OnlineRecipe | LabelRecipe  # answers are sampled and scored


def data_blocks(recipe: AnyRecipe) -> Iterator[DataBlock]:
    """The datasets of a recipe."""
    if isinstance(recipe, Recipe):
        yield recipe.data
    if isinstance(recipe, OnlineRecipe) and recipe.pretraining is not None:
        yield recipe.pretraining.data


RECIPES: dict[str, type[AnyRecipe]] = {
    "sft": SFTRecipe,
    "rm": RewardRecipe,
    "ppo": PPORecipe,
    "grpo": GRPORecipe,
    "dpo": PreferenceRecipe,
    "label": LabelRecipe,
    "merge": MergeRecipe,
}


class Expectation(Block):
    """How a metric must have moved when a stage is done: the mean of its last tenth of rows against the first tenth."""

    metric: str = Field(description="a name in metrics.jsonl, e.g. train/loss")
    direction: Literal["rises", "falls"] = Field(description="which way")
    by: float = Field(ge=0, description="at least this much")


class PipelineStep(Block):
    """One command of a pipeline: `rlhf STAGE RECIPE --name NAME --set ...`."""

    stage: Literal["sft", "rm", "ppo", "grpo", "dpo", "label", "merge"] = Field(description="the subcommand")
    recipe: str = Field(description="its recipe, relative to the pipeline file")
    name: str | None = Field(None, description="stage folder; default: the subcommand")
    set: dict[str, Any] = Field({}, description="overrides, e.g. {kl.coef: 0.02}")
    expect: Expectation | None = Field(None, description="the pipeline stops if this does not come true")


class Pipeline(Block):
    """What `rlhf run` does: stages in order, finished ones skipped; `rounds.py` has written repeated ones out."""

    stages: list[PipelineStep] = Field(min_length=1, description="commands, in order")

    @field_validator("stages")
    @classmethod
    def _own_folders(cls, steps: list[PipelineStep]) -> list[PipelineStep]:
        names = [step.name or step.stage for step in steps]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise conflict(f"expected a different name for every stage, found {', '.join(twice)} more than once")
        return steps
