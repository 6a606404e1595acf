"""Published values and gradients, computed elsewhere by independent code, against ours.

`vectors.json` holds inputs, options and expected numbers, with the released implementations that agreed on them.
Everything runs in float64 and must agree within an absolute 1e-6, gradients included. No vector is ever skipped, and
every expected number of a vector is compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algo.advantages import dr_grpo, gae, grpo, grpo_batch, reinforce_pp, reinforce_pp_baseline, remax, rloo
from rlhf.algo.aggregation import AGGREGATIONS, DENOMINATORS
from rlhf.algo.controllers import adaptive, ppo_penalty_beta
from rlhf.algo.credit import implicit_reward
from rlhf.algo.kl import KL_ESTIMATORS, k1, k2, k3, seq_kl_exact
from rlhf.algo.logprobs import entropy, token_logprobs
from rlhf.algo.masked import masked_mean, moments, row_means, row_sums, whiten, whiten_keeping_mean
from rlhf.algo.merging import linear, ties
from rlhf.algo.policy import gspo, mdloo, ppo_clip, ppo_dual_clip, reinforce, rloo_clip
from rlhf.algo.reward_model import pair_accuracy, rm_bt, rm_bt_smooth
from rlhf.algo.rewards import overlong_punishment, process_scores, shape_rewards
from rlhf.algo.sft import sft
from rlhf.algo.value import ppo_value
from tests.golden.evaluation import COMPUTE as EVALUATION
from tests.golden.preferences import COMPUTE as PREFERENCES
from tests.golden.preferences import gradients
from tests.golden.schemes import COMPUTE as SCHEMES

ATOL = 1e-6
VECTORS: list[dict[str, Any]] = json.loads((Path(__file__).parent / "vectors.json").read_text())
NUM_VECTORS = 128

Inputs = dict[str, Tensor]
Computed = dict[str, Any]


# the vectors' names of the ways to add up
AGGREGATION = {"token_mean": "token_mean", "seq_mean_token_mean": "sequence_mean", "constant": "constant"}


def average(name: str, losses: Tensor, mask: Tensor, length: int = 0) -> Tensor:
    counts = {"tokens": mask.sum(), "sequences": mask.any(-1).sum()}
    return AGGREGATIONS[name].function(losses, mask, length=length) / counts[DENOMINATORS[name]]


def on_tokens(values: Tensor, mask: Tensor) -> Tensor:
    return values.unsqueeze(-1).expand(mask.shape)


def implicit(inputs: Inputs, hyper: Computed) -> Computed:
    tokens, sums = implicit_reward(inputs["logp"], inputs["ref"], inputs["mask"].bool(), beta=hyper["beta"])
    return {"token_reward": tokens, "seq_reward": sums}


def supervised(inputs: Inputs, hyper: Computed) -> Computed:
    labels = inputs["labels"].long()[:, 1:]
    mask = labels != -100
    targets = labels.clamp(min=0)
    losses = sft(token_logprobs(inputs["logits"][:, :-1], targets, temperature=1.0, top_k=0, top_p=1.0), mask)
    token_mean = average("token_mean", losses, mask)
    return {
        "token_mean": token_mean,
        "loss": token_mean,
        "seq_mean": average("sequence_mean", losses, mask),
        "seq_sum": average("sequence_sum", losses, mask),
        "per_example": row_sums(losses, mask),
        "grad": gradients(token_mean, inputs, "logits"),
    }


def reward_model(loss: Callable[..., Tensor], **given: float) -> Callable[[Inputs, Computed], Computed]:
    def compute(inputs: Inputs, hyper: Computed) -> Computed:
        chosen, rejected = inputs["r_w"], inputs["r_l"]
        margin = inputs["margin"] if "margin" in inputs else torch.zeros_like(chosen)
        total = loss(chosen, rejected, margin, **{**given, **hyper}).mean()
        # the vectors list the losses of single pairs before the centring term
        plain = {key: value for key, value in {**given, **hyper}.items() if key != "center_coef"}
        return {
            "per_example": loss(chosen, rejected, margin, center_coef=0.0, **plain),
            "loss": total,
            "accuracy": pair_accuracy(chosen, rejected).mean(),
            "grad": gradients(total, inputs, "r_w", "r_l"),
        }

    return compute


def estimators(inputs: Inputs, hyper: Computed) -> Computed:
    mask = inputs["mask"].bool()
    values = {name: KL_ESTIMATORS[name].function(inputs["logp"], inputs["ref"]) for name in ("k1", "k2", "k3")}
    means = {f"{name}_mean": masked_mean(value, mask) for name, value in values.items()}
    return values | means | {"seq_kl_k1": row_sums(values["k1"], mask).mean()}


def exact_kl(inputs: Inputs, hyper: Computed) -> Computed:
    values = seq_kl_exact(inputs["policy_logits"], inputs["ref_logits"], inputs["mask"].bool())
    return {"seq_kl": values, "mean": values.mean()}


def token_entropy(inputs: Inputs, hyper: Computed) -> Computed:
    values = entropy(inputs["logits"])
    return {"entropy": values, "mean": masked_mean(values, inputs["mask"].bool())}


def shaped_rewards(inputs: Inputs, hyper: Computed) -> Computed:
    mask = inputs["mask"].bool()
    scores = process_scores(
        inputs["score"],
        inputs["has_eos"].bool(),
        mask.sum(-1),
        mask.shape[1],
        clip=hyper.get("score_clip"),
        missing_eos_penalty=hyper.get("eos_penalty", 0.0),
        missing_eos_score=None,
        length_penalty=0.0,
        overlong_buffer=0,
        overlong_penalty=1.0,
    )
    kl = k1(inputs["logp"], inputs["ref"])
    return {"rewards": shape_rewards(scores, kl, mask, kl_coef=hyper["beta"])}


def advantages(inputs: Inputs, hyper: Computed) -> Computed:
    values, returns = gae(inputs["rewards"], inputs["values"], inputs["mask"].bool(), **hyper)
    return {"advantages": values, "returns": returns}


def whitening(inputs: Inputs, hyper: Computed) -> Computed:
    mask = inputs["mask"].bool()
    found = moments(inputs["x"], mask)
    function = whiten if hyper.get("shift_mean", True) else whiten_keeping_mean
    y = function(inputs["x"], mask, found, unbiased=hyper["unbiased"])
    return {"y": y, "mean": found.mean(), "var": found.variance(unbiased=hyper["unbiased"])}


def policy(inputs: Inputs, hyper: Computed) -> Computed:
    mask = inputs["mask"].bool()
    given = (inputs["logp"], inputs["old"], inputs["adv"], mask)
    clip = {"clip_low": hyper["eps_low"], "clip_high": hyper["eps_high"]}
    losses, clipped = ppo_clip(*given, **clip)
    # the vectors' clipfrac does not count the dual clip
    if "dual_clip" in hyper:
        losses, _ = ppo_dual_clip(*given, **clip, dual_clip=hyper["dual_clip"])
    loss = average(AGGREGATION[hyper["agg"]], losses, mask)
    return {
        "loss": loss,
        "clipfrac": masked_mean(clipped, mask),
        "approx_kl_k1": masked_mean(k1(inputs["old"], inputs["logp"]), mask),
        "approx_kl_k2": masked_mean(k2(inputs["old"], inputs["logp"]), mask),
        "grad": gradients(loss, inputs, "logp"),
    }


def critic(inputs: Inputs, hyper: Computed) -> Computed:
    mask = inputs["mask"].bool()
    losses, clipped = ppo_value(inputs["values"], inputs["old_values"], inputs["returns"], mask, **hyper)
    loss = average("token_mean", losses, mask)
    return {"loss": loss, "clipfrac": masked_mean(clipped, mask), "grad": gradients(loss, inputs, "values")}


def group_advantages(inputs: Inputs, hyper: Computed) -> Computed:
    scale, returns = hyper["scale"], inputs["r"]
    if scale == "none":
        return {"advantages": dr_grpo(returns)}
    return {"advantages": {"group": grpo, "batch": grpo_batch}[scale](returns, eps=hyper["eps"])}


def leave_one_out(inputs: Inputs, hyper: Computed) -> Computed:
    found = rloo(inputs["r"])
    return {"advantages": found, "baseline": inputs["r"] - found}


def greedy_baseline(inputs: Inputs, hyper: Computed) -> Computed:
    penalties = -hyper["beta"] * k1(inputs["logp"], inputs["ref"])
    return {"advantages": remax(inputs["r"], inputs["r_greedy"], penalties, inputs["mask"].bool())}


def plus_plus(inputs: Inputs, hyper: Computed) -> Computed:
    assert hyper["unbiased"]
    mask = inputs["mask"].bool()
    rewards = shape_rewards(inputs["score"], k1(inputs["logp"], inputs["ref"]), mask, kl_coef=hyper["beta"])
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=hyper["gamma"], lam=1.0)
    return {"returns": returns, "advantages": reinforce_pp(rewards, mask, gamma=hyper["gamma"])}


def plus_plus_baseline(inputs: Inputs, hyper: Computed) -> Computed:
    assert hyper["unbiased"]
    return {"advantages": reinforce_pp_baseline(inputs["r"], inputs["mask"].bool())}


def group_loss(inputs: Inputs, hyper: Computed) -> Computed:
    mask = inputs["mask"].bool()
    function = {"token": ppo_clip, "sequence": gspo}[hyper["level"]]
    given = (inputs["logp"], inputs["old"], on_tokens(inputs["adv"], mask), mask)
    losses, _ = function(*given, clip_low=hyper["eps_low"], clip_high=hyper["eps_high"])
    kl = k3(inputs["logp"], inputs["ref"])
    how, length = AGGREGATION[hyper["agg"]], int(hyper.get("L", 0))
    loss = average(how, losses, mask, length) + hyper["beta"] * average(how, kl, mask, length)
    return {"loss": loss, "kl": masked_mean(kl, mask), "grad": gradients(loss, inputs, "logp")}


def score_function(inputs: Inputs, hyper: Computed) -> Computed:
    mask = inputs["mask"].bool()
    losses, _ = reinforce(inputs["logp"], torch.full(mask.shape, torch.nan), on_tokens(inputs["adv"], mask), mask)
    loss = average("sequence_sum", losses, mask)
    return {"per_example": row_sums(losses, mask), "loss": loss, "grad": gradients(loss, inputs, "logp")}


def sequence_clip(inputs: Inputs, hyper: Computed) -> Computed:
    mask = inputs["mask"].bool()
    given = (inputs["logp"], inputs["old"], on_tokens(inputs["adv"], mask), mask)
    losses, _ = rloo_clip(*given, clip_low=hyper["eps"], clip_high=hyper["eps"])
    loss = average("sequence_mean", losses, mask)
    return {"per_example": row_means(losses, mask), "loss": loss, "grad": gradients(loss, inputs, "logp")}


def mirror_descent(inputs: Inputs, hyper: Computed) -> Computed:
    """The vector's log-probs are sums of answers: answers of one token each."""
    advantages = rloo(inputs["r"] - hyper["beta"] * k1(inputs["old"], inputs["ref"]))
    logprobs, old, columns = (x.reshape(-1, 1) for x in (inputs["logp"], inputs["old"], advantages.detach()))
    mask = torch.ones_like(old, dtype=torch.bool)
    loss, without = (mdloo(logprobs, old, columns, mask, gamma=gamma)[0].mean() for gamma in (hyper["gamma"], 0.0))
    return {
        "advantages": advantages,
        "surrogate": -without,
        "kl": (loss - without) / hyper["gamma"],
        "loss": loss,
        "grad": gradients(loss, inputs, "logp"),
    }


def controller(function: Callable[..., float], *options: str) -> Callable[[Inputs, Computed], Computed]:
    def compute(inputs: Inputs, hyper: Computed) -> Computed:
        coef, found = hyper["beta"], []
        for kl in inputs["kl"].tolist():
            coef = function(coef, kl, int(hyper.get("n_steps", 0)), **{name: hyper[name] for name in options})
            found.append(coef)
        return {"beta": torch.tensor(found, dtype=torch.float64)}

    return compute


def overlong(inputs: Inputs, hyper: Computed) -> Computed:
    limit, buffer = int(hyper["L_max"]), int(hyper["L_cache"])
    return {"penalty": overlong_punishment(inputs["length"], limit, buffer=buffer, penalty=1.0)}


def merged(inputs: Inputs, hyper: Computed) -> Computed:
    models = torch.stack([inputs["sft"], inputs["dpo"]])
    if "density" in hyper:
        weights = torch.ones(2, dtype=torch.float64)
        return {"theta": ties(inputs["base"], models, weights, density=hyper["density"], scale=hyper["lam"])}
    return {"theta": linear(inputs["base"], models, torch.tensor([hyper["w_sft"], hyper["w_dpo"]]))}


COMPUTE: dict[str, Callable[[Inputs, Computed], Computed]] = {
    **PREFERENCES,
    "implicit_reward": implicit,
    "sft": supervised,
    "rm_bt": reward_model(rm_bt, center_coef=0.0),
    "rm_bt_margin": reward_model(rm_bt, center_coef=0.0),
    "rm_bt_smooth": reward_model(rm_bt_smooth, center_coef=0.0),
    "rm_bt_center": reward_model(rm_bt),
    "kl_estimators": estimators,
    "seq_kl_exact": exact_kl,
    "entropy": token_entropy,
    "kl_shaped_rewards": shaped_rewards,
    "gae": advantages,
    "whiten": whitening,
    "ppo_policy": policy,
    "ppo_value": critic,
    "grpo_advantage": group_advantages,
    "grpo": group_loss,
    "dr_grpo": group_loss,
    "dapo": group_loss,
    "gspo": group_loss,
    "rloo": leave_one_out,
    "remax": greedy_baseline,
    "reinforce_pp": plus_plus,
    "reinforce_pp_baseline": plus_plus_baseline,
    "reinforce": score_function,
    "rloo_loss": sequence_clip,
    "mdloo": mirror_descent,
    "adaptive_kl": controller(adaptive, "target", "horizon"),
    "ppo_penalty_beta": controller(ppo_penalty_beta, "target"),
    "dapo_overlong": overlong,
    **SCHEMES,
    **EVALUATION,
    "merge_linear": merged,
    "merge_ties": merged,
}


def compare(computed: Any, expected: Any, where: str) -> None:
    """Every expected number, however deep, within ATOL; nothing computed may be left without an expectation."""
    if isinstance(expected, dict):
        assert set(computed) == set(expected), where
        for key, value in expected.items():
            compare(computed[key], value, f"{where}.{key}")
        return
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(computed.detach().double(), wanted, atol=ATOL, rtol=0, msg=lambda m: f"{where}: {m}")


@pytest.mark.parametrize("number", range(NUM_VECTORS))
def test_vector(number: int) -> None:
    vector = VECTORS[number]
    # labels and masks are numbers in the file; they are cast where they are used
    inputs = {name: torch.tensor(value, dtype=torch.float64) for name, value in vector["inputs"].items()}
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    compare(COMPUTE[vector["algo"]](inputs, vector["hyper"]), vector["expected"], f"{number} {vector['algo']}")


def test_every_vector_and_every_algorithm_is_there() -> None:
    assert len(VECTORS) == NUM_VECTORS
    assert {vector["algo"] for vector in VECTORS} == set(COMPUTE)
    assert all(vector["tol"] == ATOL for vector in VECTORS)
