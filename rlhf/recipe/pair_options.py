"""Options of the preference losses on pairs of answers: one block per function of `algo/`, see `loss_options.py`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from rlhf.recipe.loss_options import PULL, SMOOTHING, LossBlock
from rlhf.recipe.schema import conflict

# --- DPO and what changes the inside of its sigmoid -------------------------------------------------------------------


class DpoLoss(LossBlock):
    """Sigmoid DPO (arXiv:2305.18290 eq. 7)."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description=f"{PULL}; 0.01-0.5")


class CdpoLoss(LossBlock):
    """Conservative DPO: labels are flipped with probability label_smoothing (Mitchell 2023, eq. 3)."""

    name: Literal["cdpo"] = "cdpo"
    beta: float = Field(0.1, gt=0, description=f"{PULL}; 0.01-0.5")
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description=SMOOTHING)


class RobustDpoLoss(LossBlock):
    """DPO made unbiased for labels that are flipped with a known probability (arXiv:2403.00409)."""

    name: Literal["robust_dpo"] = "robust_dpo"
    beta: float = Field(0.1, gt=0, description=PULL)
    label_smoothing: float = Field(0.1, ge=0, lt=0.5, description=SMOOTHING)


class IpoLoss(LossBlock):
    """Squared distance to a finite margin, of summed log-probs (arXiv:2310.12036 eq. 17)."""

    name: Literal["ipo"] = "ipo"
    tau: float = Field(
        0.1, gt=0, description="strength of the pull towards the reference: the margin is 1 / (2 tau) nats; 0.01-1"
    )


class IpoAvgLoss(LossBlock):
    """Squared distance to a finite margin, of log-probs per token, as TRL and HALOs have IPO."""

    name: Literal["ipo_avg"] = "ipo_avg"
    tau: float = Field(
        0.1,
        gt=0,
        description="strength of the pull towards the reference: the margin is 1 / (2 tau) nats per token; 0.01-1",
    )


class DpoNormLoss(LossBlock):
    """DPO on log-ratios per token, against a preference for length (arXiv:2411.15124)."""

    name: Literal["dpo_norm"] = "dpo_norm"
    beta: float = Field(5.0, gt=0, description=f"{PULL}; 2-10, since ratios are per token")


class DpoRewardMarginLoss(LossBlock):
    """DPO whose margin grows with the score difference of the pair (arXiv:2402.10571)."""

    needs: ClassVar[tuple[str, ...]] = ("scores",)
    name: Literal["dpo_reward_margin"] = "dpo_reward_margin"
    beta: float = Field(0.1, gt=0, description=PULL)
    kappa: float = Field(1.0, ge=0, description="factor on score_chosen - score_rejected in the margin; 0 is dpo")


class FDpoLoss(LossBlock):
    """DPO under another divergence from the reference than the reverse KL (arXiv:2309.16240)."""

    qualifiers: ClassVar[dict[str, tuple[str, ...]]] = {"divergence": ("alpha",)}
    name: Literal["f_dpo"] = "f_dpo"
    beta: float = Field(0.1, gt=0, description=PULL)
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "js", description="what is held small beside the preferences; reverse_kl is dpo"
    )
    alpha: float | None = Field(
        None, gt=0, lt=1, description="of divergence alpha alone: from reverse_kl at 0 to forward_kl at 1"
    )

    @model_validator(mode="after")
    def _alpha_with_its_divergence(self) -> Self:
        if (self.divergence == "alpha") != (self.alpha is not None):
            found = "none" if self.alpha is None else f"{self.alpha} with divergence {self.divergence}"
            raise conflict(f"expected alpha with divergence alpha and only there, found {found}", "alpha")
        return self


class DpopLoss(LossBlock):
    """DPO with a penalty where the chosen answer becomes unlikelier (arXiv:2402.13228 eq. 3, Smaug)."""

    name: Literal["dpop"] = "dpop"
    beta: float = Field(0.3, gt=0, description=PULL)
    lam: float = Field(
        50.0, ge=0, description="factor on how far the chosen answer has fallen below the reference; 5-50"
    )


class RDpoLoss(LossBlock):
    """DPO regularised against longer answers (arXiv:2403.19159 eq. 9)."""

    name: Literal["r_dpo"] = "r_dpo"
    beta: float = Field(0.1, gt=0, description=PULL)
    alpha: float = Field(0.01, ge=0, description="logit per token of difference in length; 0.005-0.5")


class RpoNllLoss(LossBlock):
    """DPO plus the likelihood of the chosen answer per token (arXiv:2404.19733, 2405.16436)."""

    name: Literal["rpo_nll"] = "rpo_nll"
    beta: float = Field(0.1, gt=0, description=PULL)
    alpha: float = Field(
        1.0, ge=0, description="weight of the chosen answer's negative log-likelihood per token; 0.005-1"
    )


class Tdpo1Loss(LossBlock):
    """DPO with the difference of both answers' KL to the reference in the margin (arXiv:2404.11999)."""

    whole: ClassVar[bool] = True
    name: Literal["tdpo1"] = "tdpo1"
    beta: float = Field(0.1, gt=0, description=PULL)


class Tdpo2Loss(LossBlock):
    """TDPO that weighs the KL and leaves the chosen answer's alone (arXiv:2404.11999)."""

    whole: ClassVar[bool] = True
    name: Literal["tdpo2"] = "tdpo2"
    beta: float = Field(0.1, gt=0, description=PULL)
    alpha: float = Field(0.5, ge=0, description="weight of the difference in KL")


class BetaDpoLoss(LossBlock):
    """DPO whose beta follows the gaps of the batch, outlying ones dropped (arXiv:2407.08639)."""

    name: Literal["beta_dpo"] = "beta_dpo"
    beta: float = Field(0.1, gt=0, description=f"{PULL}; where the batch is like the ones before")
    a: float = Field(
        0.6, ge=0, description="how much beta grows per nat by which the batch's gap exceeds the running mean"
    )
    momentum: float = Field(
        0.9, ge=0, lt=1, description="weight of the past in the running mean and deviation of the gaps"
    )
    keep: float = Field(
        0.8,
        gt=0,
        le=1,
        description="share of the batch that is kept, by weights that fall with the distance from the mean",
    )


class AotLoss(LossBlock):
    """DPO on sorted differences: the distribution is aligned, not each pair (arXiv:2406.05882)."""

    name: Literal["aot"] = "aot"
    beta: float = Field(0.1, gt=0, description=PULL)
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description=SMOOTHING)


# --- other shapes -----------------------------------------------------------------------------------------------------


class RsoHingeLoss(LossBlock):
    """Hinge on the gap, zero beyond a margin of 1 / gamma (arXiv:2309.06657 eq. 10; SLiC with a reference)."""

    name: Literal["rso_hinge"] = "rso_hinge"
    gamma: float = Field(
        0.05, gt=0, description="strength of the pull towards the reference, in 1/nats: the margin is 1 / gamma"
    )


class GpoExponentialLoss(LossBlock):
    """Exponential of the gap (arXiv:2402.05749 table 1)."""

    name: Literal["gpo_exponential"] = "gpo_exponential"
    beta: float = Field(0.1, gt=0, description=PULL)


class GpoTruncatedQuadraticLoss(LossBlock):
    """Squared hinge on the gap (arXiv:2402.05749 table 1)."""

    name: Literal["gpo_truncated_quadratic"] = "gpo_truncated_quadratic"
    beta: float = Field(0.1, gt=0, description=PULL)


class GpoSavageLoss(LossBlock):
    """Squared sigmoid of the gap: bounded, so that mislabelled pairs count little (arXiv:2402.05749 table 1)."""

    name: Literal["gpo_savage"] = "gpo_savage"
    beta: float = Field(0.1, gt=0, description=PULL)


class GpoSquaredLoss(LossBlock):
    """Squared distance of the scaled gap to 1: IPO up to a factor (arXiv:2402.05749 table 1)."""

    name: Literal["gpo_squared"] = "gpo_squared"
    beta: float = Field(0.1, gt=0, description=PULL)


class ExoPrefLoss(LossBlock):
    """Reverse KL from the preference that the policy implies to the labels (arXiv:2402.00856 eq. 16)."""

    name: Literal["exo_pref"] = "exo_pref"
    beta: float = Field(0.1, gt=0, description=PULL)
    label_smoothing: float = Field(0.001, gt=0, lt=0.5, description=SMOOTHING)


class DiscopopLoss(LossBlock):
    """A mix of the logistic and the exponential loss, found by a search (arXiv:2406.08414 eq. 5)."""

    name: Literal["discopop"] = "discopop"
    beta: float = Field(0.1, gt=0, description=PULL)
    tau: float = Field(0.05, gt=0, description="how softly the two are mixed")


class NcaPairLoss(LossBlock):
    """Noise contrast of each answer: a finite reward for the chosen one (arXiv:2402.05369)."""

    name: Literal["nca_pair"] = "nca_pair"
    beta: float = Field(0.1, gt=0, description=PULL)


class ApoZeroLoss(LossBlock):
    """Chosen up and rejected down, each against the reference (arXiv:2408.06266 eq. 7)."""

    name: Literal["apo_zero"] = "apo_zero"
    beta: float = Field(0.1, gt=0, description=PULL)


class ApoDownLoss(LossBlock):
    """Both down, the chosen answer less: for a policy that is better than its data (arXiv:2408.06266 eq. 8)."""

    name: Literal["apo_down"] = "apo_down"
    beta: float = Field(0.1, gt=0, description=PULL)


class BcoPairLoss(LossBlock):
    """A classifier of each answer of a pair, without reward shift (arXiv:2404.04656; TRL)."""

    name: Literal["bco_pair"] = "bco_pair"
    beta: float = Field(0.1, gt=0, description=PULL)


# --- targets from scores ----------------------------------------------------------------------------------------------


class SppoLoss(LossBlock):
    """Self-play: log-ratios move to the estimated win rates (arXiv:2405.00675 eq. 4.7)."""

    needs: ClassVar[tuple[str, ...]] = ("win_rates",)
    name: Literal["sppo"] = "sppo"
    beta: float = Field(0.001, gt=0, description=f"{PULL}; targets are +-1 / (2 beta)")


class SppoHardLoss(LossBlock):
    """Self-play with win rates of 1 for the chosen and 0 for the rejected answer (arXiv:2405.00675; TRL)."""

    name: Literal["sppo_hard"] = "sppo_hard"
    beta: float = Field(0.001, gt=0, description=f"{PULL}; targets are +-1 / (2 beta)")


class DnoLoss(LossBlock):
    """DPO with soft labels from the score difference (arXiv:2404.03715 alg. 1)."""

    needs: ClassVar[tuple[str, ...]] = ("scores",)
    name: Literal["dno"] = "dno"
    eta: float = Field(0.1, gt=0, description=PULL)


# --- no reference -----------------------------------------------------------------------------------------------------


class SimpoLoss(LossBlock):
    """Average log-probs, a margin, no reference (arXiv:2405.14734 eq. 6)."""

    reference: ClassVar[bool] = False
    name: Literal["simpo"] = "simpo"
    beta: float = Field(2.0, gt=0, description="scale of the difference of mean log-probs; 2-10")
    gamma: float = Field(
        1.0, ge=0, description="margin in units of the logit; the released recipes give gamma / beta, 0.1-0.8"
    )


class OrpoLoss(LossBlock):
    """Supervised learning plus the log odds ratio, in one stage, no reference (arXiv:2403.07691 eq. 6-7)."""

    reference: ClassVar[bool] = False
    name: Literal["orpo"] = "orpo"
    lam: float = Field(0.1, ge=0, description="weight of the odds-ratio term")


class CpoLoss(LossBlock):
    """DPO with a uniform reference, plus the likelihood of the chosen answer (arXiv:2401.08417 eq. 3-5)."""

    reference: ClassVar[bool] = False
    name: Literal["cpo"] = "cpo"
    beta: float = Field(0.1, gt=0, description="scale of the difference of log-probs, in 1/nats")
    alpha: float = Field(1.0, ge=0, description="weight of the chosen tokens' negative log-likelihood")


class SlicHfLoss(LossBlock):
    """Calibration: a hinge on summed log-probs, plus the chosen answer's likelihood (arXiv:2305.10425 eq. 1)."""

    reference: ClassVar[bool] = False
    name: Literal["slic_hf"] = "slic_hf"
    delta: float = Field(1.0, ge=0, description="margin in nats")
    lam: float = Field(0.1, ge=0, description="weight of the chosen answer's negative log-likelihood")


class UnlikelihoodSeqLoss(LossBlock):
    """Chosen answer up, rejected answer down, without a bound: a baseline (arXiv:2305.18290 sec. 6)."""

    reference: ClassVar[bool] = False
    name: Literal["unlikelihood_seq"] = "unlikelihood_seq"
    alpha: float = Field(0.1, ge=0, le=1, description="weight of the rejected answer; 0.05-1")


class UnlikelihoodTokenLoss(LossBlock):
    """Chosen answer up, every rejected token less likely by itself (arXiv:1908.04319)."""

    reference: ClassVar[bool] = False
    name: Literal["unlikelihood_token"] = "unlikelihood_token"
    alpha: float = Field(1.0, ge=0, description="weight of the rejected tokens")


class PreferredFtLoss(LossBlock):
    """Supervised learning on the chosen answers alone: a baseline (arXiv:2305.18290 sec. 6)."""

    reference: ClassVar[bool] = False
    name: Literal["preferred_ft"] = "preferred_ft"


class PairwiseCringeLoss(LossBlock):
    """Chosen answer up, rejected tokens against better ones, gated by the gap (arXiv:2312.16682)."""

    reference: ClassVar[bool] = False
    not_arguments: ClassVar[tuple[str, ...]] = ("k",)
    name: Literal["pairwise_cringe"] = "pairwise_cringe"
    b: float = Field(
        -10.0, description="log policy(chosen) - log policy(rejected), in nats, at which the gate is half open"
    )
    tau: float = Field(10.0, gt=0, description="nats over which the gate closes")
    alpha: float = Field(0.005, ge=0, description="weight of the rejected answer's contrast")
    k: int = Field(5, ge=1, description="best other tokens that a token to be pushed down is held against")
