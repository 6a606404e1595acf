"""Options of the preference losses on single answers and on lists of answers, and what all loss blocks have.

`pair_options.py` has those on pairs, `options.py` the choices. A block's fields are the keyword-only arguments of the
function of the same name in `algo/` and of its coupling; a test holds both sides against each other. What a loss needs
of the data and of the rest of the recipe stands beside its options, for the rules to read.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from rlhf.recipe.schema import Block, conflict

PULL = "strength of the pull towards the reference, in 1/nats"
SMOOTHING = "probability that a preference label is wrong"


class LossBlock(Block):
    """A preference loss and what it asks of the data and of the recipe."""

    rows: ClassVar[Literal["pairs", "answers", "lists"]] = "pairs"
    reference: ClassVar[bool] = True  # compares with a reference policy
    needs: ClassVar[
        tuple[str, ...]
    ] = ()  # columns beside the answers: scores or win_rates of pairs, rewards of answers
    unit_scores: ClassVar[bool] = False  # the scores of its lists must lie in [0, 1]
    whole: ClassVar[bool] = False  # needs the reference's whole distribution: stored log-probs will not do
    weight: float = Field(1.0, gt=0, description="weight of this loss in a sum of several")


class AnswerLossBlock(LossBlock):
    """A loss on single answers."""

    rows: ClassVar[Literal["pairs", "answers", "lists"]] = "answers"


class ListLossBlock(LossBlock):
    """A loss on lists of scored answers to a prompt."""

    rows: ClassVar[Literal["pairs", "answers", "lists"]] = "lists"


# --- single answers ---------------------------------------------------------------------------------------------------


class KtoLoss(AnswerLossBlock):
    """Prospect theory: good and bad answers against a common reference point (arXiv:2402.01306 eq. 7-8)."""

    name: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description=PULL)
    lambda_d: float = Field(
        1.0, gt=0, description="weight of good answers; lambda_d x good / (lambda_u x bad) in 1-1.33 is usual"
    )
    lambda_u: float = Field(1.0, gt=0, description="weight of bad answers")


class ApoZeroUnpairedLoss(AnswerLossBlock):
    """Good answers up and bad ones down, each against the reference (arXiv:2408.06266 eq. 7)."""

    name: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    beta: float = Field(0.1, gt=0, description=PULL)


class BcoLoss(AnswerLossBlock):
    """A classifier of good and bad answers, with a running reward shift (arXiv:2404.04656)."""

    name: Literal["bco"] = "bco"
    beta: float = Field(0.1, gt=0, description=f"{PULL}; 0.01-0.1")
    min_density_ratio: float = Field(
        0.5, gt=0, description="smallest weight of a bad answer, where the data has P(good | prompt)"
    )
    max_density_ratio: float = Field(
        10.0, gt=0, description="largest weight of a bad answer, where the data has P(good | prompt)"
    )

    @model_validator(mode="after")
    def _smallest_before_largest(self) -> Self:
        if self.min_density_ratio > self.max_density_ratio:
            found = f"{self.min_density_ratio} > {self.max_density_ratio}"
            raise conflict(f"expected min_density_ratio <= max_density_ratio, found {found}", "min_density_ratio")
        return self


class AotUnpairedLoss(AnswerLossBlock):
    """DPO on good and bad answers of equal rank: distributions compared (arXiv:2406.05882)."""

    name: Literal["aot_unpaired"] = "aot_unpaired"
    beta: float = Field(0.1, gt=0, description=PULL)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description=SMOOTHING)


class NpoLoss(AnswerLossBlock):
    """Unlearning of bad answers that fades as they become unlikely (arXiv:2404.05868)."""

    name: Literal["npo"] = "npo"
    beta: float = Field(0.1, gt=0, description=PULL)


class CringeLoss(AnswerLossBlock):
    """Good answers up, tokens of bad ones below the best others (arXiv:2211.05826)."""

    reference: ClassVar[bool] = False
    not_arguments: ClassVar[tuple[str, ...]] = ("k",)
    name: Literal["cringe"] = "cringe"
    alpha: float = Field(1.0, ge=0, description="weight of the bad answers' contrast")
    k: int = Field(5, ge=1, description="best other tokens that a token to be pushed down is held against")


class DroVLoss(AnswerLossBlock):
    """Squared error of reward against log-ratio and a learned value of the prompt (arXiv:2405.19107)."""

    needs: ClassVar[tuple[str, ...]] = ("rewards",)
    name: Literal["dro_v"] = "dro_v"
    tau: float = Field(
        1.0, gt=0, description="strength of the pull towards the reference, in reward per nat; to be swept"
    )


# --- lists of answers -------------------------------------------------------------------------------------------------


class PlDpoLoss(ListLossBlock):
    """DPO on rankings: the Plackett-Luce likelihood (arXiv:2305.18290 app. A.3)."""

    name: Literal["pl_dpo"] = "pl_dpo"
    beta: float = Field(0.1, gt=0, description=PULL)


class PairLogisticLoss(ListLossBlock):
    """DPO on all pairs of a list (arXiv:2402.01878 eq. 5)."""

    name: Literal["pair_logistic"] = "pair_logistic"
    beta: float = Field(0.05, gt=0, description=PULL)


class LipoLambdaLoss(ListLossBlock):
    """DPO on all pairs of a list, mistakes at the top weighing most (arXiv:2402.01878 eq. 8)."""

    unit_scores: ClassVar[bool] = True
    name: Literal["lipo_lambda"] = "lipo_lambda"
    beta: float = Field(0.05, gt=0, description=PULL)


class ListnetSoftmaxLoss(ListLossBlock):
    """Cross-entropy to the shares of the scores (arXiv:2402.01878 eq. 11)."""

    unit_scores: ClassVar[bool] = True
    name: Literal["listnet_softmax"] = "listnet_softmax"
    beta: float = Field(0.05, gt=0, description=PULL)


class DpoRwLoss(ListLossBlock):
    """Cross-entropy to the softmax of the scores (arXiv:2402.00856)."""

    name: Literal["dpo_rw"] = "dpo_rw"
    beta_pi: float = Field(0.1, gt=0, description=PULL)
    beta_r: float = Field(0.1, gt=0, description="temperature of the scores")


class ExoRwLoss(ListLossBlock):
    """Reverse KL to the softmax of the scores (arXiv:2402.00856)."""

    name: Literal["exo_rw"] = "exo_rw"
    beta_pi: float = Field(0.1, gt=0, description=PULL)
    beta_r: float = Field(0.1, gt=0, description="temperature of the scores")


class D2oLoss(ListLossBlock):
    """The worst answer against the model's own samples: alignment from bad answers (arXiv:2403.03419 eq. 3)."""

    name: Literal["d2o"] = "d2o"
    beta: float = Field(0.1, gt=0, description="factor on the mean log-ratio of the other answers, in 1/nats")
    alpha: float = Field(0.1, gt=0, description="factor on the log-ratio of the worst answer, in 1/nats")


class RrhfLoss(ListLossBlock):
    """Hinge on the order of average log-probs, plus the best answer's likelihood (arXiv:2304.05302 eq. 1-4)."""

    reference: ClassVar[bool] = False
    name: Literal["rrhf"] = "rrhf"
    length_penalty: float = Field(1.0, ge=0, description="power of the length that log-probs are divided by")
    rank_weight: float = Field(1.0, ge=0, description="weight of the ranking term")


class ProLoss(ListLossBlock):
    """Ranking by softmaxes that the score differences sharpen, plus the best answer (arXiv:2306.17492)."""

    reference: ClassVar[bool] = False
    name: Literal["pro"] = "pro"
    sft_weight: float = Field(
        0.05, ge=0, description="weight of the best answer's negative log-likelihood, times (K - 1)^2"
    )
