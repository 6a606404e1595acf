"""How each published vector of a sampling scheme is computed with ours; `test_vectors.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.advantages import reinforce as less_baseline
from rlhf.algo.advantages import remax
from rlhf.algo.kl import k1
from rlhf.algo.masked import row_sums
from rlhf.algo.policy import reinforce
from rlhf.algo.selection import bon_expected, bon_kl, rso_accept

Inputs = dict[str, Tensor]
Computed = dict[str, Any]
Compute = Callable[[Inputs, Computed], Computed]


def accepted(inputs: Inputs, hyper: Computed) -> Computed:
    probabilities, taken = rso_accept(inputs["r"], inputs["u"], beta=hyper["beta"])
    return {"prob": probabilities, "accepted": taken}


def best_bound(inputs: Inputs, hyper: Computed) -> Computed:
    return {"kl": bon_kl(inputs["n"])}


def best_expected(inputs: Inputs, hyper: Computed) -> Computed:
    return {"value": bon_expected(inputs["scores"], n=int(hyper["n"]))}


def nash(inputs: Inputs, hyper: Computed) -> Computed:
    """As the stage computes it: score P - 1/2, the KL in the reward, the policy gradient of whole answers."""
    mask = inputs["mask"].bool()
    penalties = -hyper["tau"] * k1(inputs["logp"], inputs["ref"]).detach()
    returns = (inputs["p"] - 0.5 + row_sums(penalties, mask)).unsqueeze(-1)
    weight, _ = less_baseline(returns, torch.tensor(torch.nan, dtype=torch.float64), decay=0.9)
    return {**gradient_of(inputs, weight.expand(mask.shape), mask), "weight": weight.squeeze(-1)}


def nash_with_token_penalties(inputs: Inputs, hyper: Computed) -> Computed:
    """TRL's variant: a token is weighted by its own share of the KL instead of the answer's, which is biased."""
    mask = inputs["mask"].bool()
    penalties = -hyper["tau"] * k1(inputs["logp"], inputs["ref"]).detach()
    half = torch.full_like(inputs["p"], 0.5)
    return gradient_of(inputs, remax(inputs["p"], half, penalties, mask), mask)


def gradient_of(inputs: Inputs, advantages: Tensor, mask: Tensor) -> Computed:
    losses, _ = reinforce(inputs["logp"], torch.full(mask.shape, torch.nan), advantages.detach(), mask)
    per_example = row_sums(losses, mask)
    (gradient,) = torch.autograd.grad(per_example.mean(), inputs["logp"])
    return {"per_example": per_example, "loss": per_example.mean(), "grad": {"logp": gradient}}


COMPUTE: dict[str, Compute] = {
    "rso_accept": accepted,
    "bon_kl": best_bound,
    "bon_expected": best_expected,
    "nash_md_pg": nash,
    "nash_md_trl": nash_with_token_penalties,
}
