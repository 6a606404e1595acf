"""Options of on-policy learning: advantages, policy and value losses, KL, scores. One block per registered function.

A block's fields are the keyword-only arguments of the function of the same name in `algo/`; a test holds both sides
against each other. What a choice needs of the rest of the recipe stands beside its options, for the rules to read.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlhf.recipe.schema import Block, default_name

# --- advantage estimators ------------------------------------------------------------------------------------------


class Estimator(Block):
    """An advantage estimator and what it asks of the recipe."""

    needs_critic: ClassVar[bool] = False
    needs_group: ClassVar[bool] = False  # at least two answers per prompt
    needs_greedy: ClassVar[bool] = False  # a greedy answer per prompt, scored too
    needs_steps: ClassVar[bool] = False  # a reward that scores steps
    per_token: ClassVar[bool] = False  # uses when, not only that, a reward came


class GaeAdvantage(Estimator):
    """Generalised advantage estimation with a critic (arXiv:1506.02438 eq. 16)."""

    needs_critic: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    name: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")
    lam: float = Field(0.95, ge=0, le=1, description="bias-variance trade-off: 0 one-step, 1 full return")


class GrpoAdvantage(Estimator):
    """Score minus the group's mean, over the group's standard deviation (arXiv:2402.03300)."""

    needs_group: ClassVar[bool] = True
    name: Literal["grpo"] = "grpo"
    eps: float = Field(1e-4, gt=0, description="added to the standard deviation")


class GrpoBatchAdvantage(Estimator):
    """Score minus the group's mean, over the standard deviation of the whole batch (arXiv:2508.08221)."""

    needs_group: ClassVar[bool] = True
    name: Literal["grpo_batch"] = "grpo_batch"
    eps: float = Field(1e-4, gt=0, description="added to the standard deviation")


class DrGrpoAdvantage(Estimator):
    """Score minus the group's mean, not divided by anything (arXiv:2503.20783)."""

    needs_group: ClassVar[bool] = True
    name: Literal["dr_grpo"] = "dr_grpo"


class ProcessGrpoAdvantage(Estimator):
    """Step scores normalised over all steps of the group, summed from each token on (arXiv:2402.03300 sec. 4.1.3)."""

    needs_group: ClassVar[bool] = True
    needs_steps: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    name: Literal["process_grpo"] = "process_grpo"
    eps: float = Field(1e-4, gt=0, description="added to the standard deviation")


class RlooAdvantage(Estimator):
    """Score minus the mean of the group's other answers (arXiv:2402.14740)."""

    needs_group: ClassVar[bool] = True
    name: Literal["rloo"] = "rloo"


class ReinforceAdvantage(Estimator):
    """Score minus a running mean of earlier rollouts' scores (Williams 1992)."""

    name: Literal["reinforce"] = "reinforce"
    decay: float = Field(0.9, ge=0, lt=1, description="weight of the past in the running mean")


class ReinforcePpAdvantage(Estimator):
    """Discounted reward-to-go, whitened over all tokens of the rollout (arXiv:2501.03262)."""

    per_token: ClassVar[bool] = True
    name: Literal["reinforce_pp"] = "reinforce_pp"
    gamma: float = Field(1.0, ge=0, le=1, description="discount per token")


class ReinforcePpBaselineAdvantage(Estimator):
    """Score minus the group's mean, whitened over all tokens of the rollout (arXiv:2501.03262)."""

    needs_group: ClassVar[bool] = True
    name: Literal["reinforce_pp_baseline"] = "reinforce_pp_baseline"


class RemaxAdvantage(Estimator):
    """Score minus the score of the greedy answer to the same prompt (arXiv:2310.10505)."""

    needs_greedy: ClassVar[bool] = True
    name: Literal["remax"] = "remax"


_ADVANTAGES = (
    GaeAdvantage
    | GrpoAdvantage
    | GrpoBatchAdvantage
    | DrGrpoAdvantage
    | ProcessGrpoAdvantage
    | RlooAdvantage
    | ReinforceAdvantage
    | ReinforcePpAdvantage
    | ReinforcePpBaselineAdvantage
    | RemaxAdvantage
)
PpoAdvantage = Annotated[_ADVANTAGES, Field(discriminator="name"), default_name("gae")]
GroupAdvantage = Annotated[_ADVANTAGES, Field(discriminator="name"), default_name("grpo")]

# --- KL ------------------------------------------------------------------------------------------------------------


class FixedKl(Block):
    """The coefficient stays what it is."""

    name: Literal["fixed"] = "fixed"


class AdaptiveKl(Block):
    """The coefficient follows the measured KL towards a target (arXiv:1909.08593 sec. 2.2)."""

    name: Literal["adaptive"] = "adaptive"
    target: float = Field(6.0, gt=0, description="KL to the reference to hold, in nats per answer")
    horizon: float = Field(10_000.0, gt=0, description="answers over which the coefficient moves by the relative error")


KlController = Annotated[FixedKl | AdaptiveKl, Field(discriminator="name"), default_name("fixed")]


class KlBlock(Block):
    """Distance to the reference policy."""

    placement: Literal["reward", "loss"] = Field(
        "reward", description="taken off every token's reward, or added to the loss"
    )
    coef: float = Field(0.05, ge=0, description="weight of the per-token KL penalty; where a controller starts")
    estimator: Literal["k1", "k2", "k3", "abs"] = Field(
        "k1", description="KL estimator from the sampled token's log-probabilities"
    )
    controller: KlController = Field(FixedKl(), description="how the coefficient changes while training")


# --- policy losses -------------------------------------------------------------------------------------------------


class PolicyLossBlock(Block):
    """A policy loss and what it asks of the recipe."""

    per_sequence: ClassVar[bool] = False  # one number per answer: averaging over tokens would weigh answers by length
    only_fresh: ClassVar[bool] = False  # knows no probability ratio: right for the first update on a rollout only


class PpoClipLoss(PolicyLossBlock):
    """Clipped surrogate (arXiv:1707.06347 eq. 7); clip_high > clip_low is DAPO's clip-higher (arXiv:2503.14476)."""

    name: Literal["ppo_clip"] = "ppo_clip"
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped above at 1 + clip_high")


class PpoDualClipLoss(PolicyLossBlock):
    """Clipped surrogate whose loss at negative advantages is bounded too (arXiv:1912.09729 eq. 5)."""

    name: Literal["ppo_dual_clip"] = "ppo_dual_clip"
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped above at 1 + clip_high")
    dual_clip: float = Field(3.0, gt=1, description="the loss at a negative advantage is at most this times it")


class PpoPenaltyLoss(PolicyLossBlock):
    """Unclipped surrogate with a penalty on the KL to the policy that sampled (arXiv:1707.06347 sec. 4)."""

    not_arguments: ClassVar[tuple[str, ...]] = ("target",)
    name: Literal["ppo_penalty"] = "ppo_penalty"
    beta: float = Field(1.0, gt=0, description="weight of KL(old policy || policy) at the start")
    target: float = Field(
        0.01, gt=0, description="KL that a rollout may move the policy, in nats per token: beyond 1.5 x, beta doubles"
    )


class ReinforceLoss(PolicyLossBlock):
    """Log-probability times advantage: the plain policy gradient (Williams 1992)."""

    only_fresh: ClassVar[bool] = True
    name: Literal["reinforce"] = "reinforce"


class RlooClipLoss(PolicyLossBlock):
    """Clipped surrogate on the ratio of whole answers' probabilities (arXiv:2402.14740; TRL)."""

    per_sequence: ClassVar[bool] = True
    name: Literal["rloo_clip"] = "rloo_clip"
    clip_low: float = Field(0.2, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(0.2, gt=0, description="the ratio is clipped above at 1 + clip_high")


class GspoLoss(PolicyLossBlock):
    """Clipped surrogate on the length-normalised ratio of whole answers (arXiv:2507.18071 eq. 5)."""

    per_sequence: ClassVar[bool] = True
    name: Literal["gspo"] = "gspo"
    clip_low: float = Field(3e-4, gt=0, lt=1, description="the ratio is clipped below at 1 - clip_low")
    clip_high: float = Field(4e-4, gt=0, description="the ratio is clipped above at 1 + clip_high")


class CispoLoss(PolicyLossBlock):
    """Policy gradient weighted by the clipped ratio, so that no token loses its gradient (arXiv:2506.13585 eq. 4)."""

    name: Literal["cispo"] = "cispo"
    max_ratio: float = Field(5.0, gt=1, description="the ratio's weight is at most this")


class MdlooLoss(PolicyLossBlock):
    """Mirror descent: importance-weighted advantage with a KL to the policy that sampled (arXiv:2407.21075)."""

    per_sequence: ClassVar[bool] = True
    name: Literal["mdloo"] = "mdloo"
    gamma: float = Field(1.0, gt=0, description="weight of KL(policy || old policy), per answer")


PolicyLoss = Annotated[
    PpoClipLoss | PpoDualClipLoss | PpoPenaltyLoss | ReinforceLoss | RlooClipLoss | GspoLoss | CispoLoss | MdlooLoss,
    Field(discriminator="name"),
    default_name("ppo_clip"),
]
Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "constant"]


class PpoValueLoss(Block):
    """Clipped squared error of the critic (arXiv:1707.06347, openai/baselines)."""

    name: Literal["ppo_value"] = "ppo_value"
    clip: float = Field(0.2, gt=0, description="values move at most this far from the rollout's values")


# --- scores --------------------------------------------------------------------------------------------------------


class ScoresBlock(Block):
    """What happens to a score before it becomes a reward, in this order."""

    normalise: Literal["none", "running"] = Field(
        "none", description="running: less the mean, over the standard deviation, of all scores so far"
    )
    clip: float | None = Field(None, gt=0, description="clip scores to +- this")
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="taken off the score of an answer that did not end by itself"
    )
    missing_eos_score: float | None = Field(
        None, description="replaces the score of an answer that did not end by itself"
    )
    length_penalty: float = Field(0.0, ge=0, description="taken off per token of the answer")
    overlong_buffer: int = Field(
        0, ge=0, description="the last so many tokens before max_new_tokens cost a penalty that rises linearly; 0: off"
    )
    overlong_penalty: float = Field(1.0, gt=0, description="the penalty at max_new_tokens")
    drop_unfinished: bool = Field(
        False, description="leave answers that did not end by themselves out of the loss (DAPO's overlong filtering)"
    )
