"""Losses on pairs of a better and a worse answer, from summed log-probs; one loss per pair, nothing averaged.

h = (log policy - log reference)(chosen) - (log policy - log reference)(rejected), in nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.algo.masked import at_least_float32
from rlhf.algo.registry import Registry
from rlhf.batch import PairLogprobs

PREFERENCE_LOSSES = Registry("preference loss")


def log_ratios(pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
    """log policy - log reference of the chosen and of the rejected side, both (B,), at least float32."""
    pairs = pairs.map(at_least_float32)
    return pairs.chosen - pairs.ref_chosen, pairs.rejected - pairs.ref_rejected


def implicit_rewards(pairs: PairLogprobs, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta * log(policy / reference) of the chosen and of the rejected side, both (B,).    [arXiv:2305.18290 sec. 4]"""
    chosen, rejected = log_ratios(pairs)
    return beta * chosen, beta * rejected


@PREFERENCE_LOSSES.register("dpo", paper="arXiv:2305.18290 eq. 7")
def dpo(pairs: PairLogprobs, *, beta: float) -> Tensor:
    """-log sigmoid(beta h): (B,), each pair's loss; log 2 where policy and reference agree."""
    chosen, rejected = log_ratios(pairs)
    return -logsigmoid(beta * (chosen - rejected))


@PREFERENCE_LOSSES.register("cdpo", paper="Mitchell 2023, ericmitchell.ai/cdpo.pdf eq. 3")
def cdpo(pairs: PairLogprobs, *, beta: float, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h): (B,), with e = label_smoothing.

    Smallest at beta h = log((1 - e) / e): a finite margin, beyond which the gradient turns around.
    """
    chosen, rejected = log_ratios(pairs)
    logit = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)
