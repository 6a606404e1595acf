"""How each published vector of a preference loss is computed with ours; `test_vectors.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.coupling import gap_log_weights
from rlhf.algo.listwise import best_nll
from rlhf.algo.logprobs import token_contrast, token_forward_kl
from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.algo.masked import row_sums
from rlhf.algo.pairwise import cringe_gate, log_odds
from rlhf.algo.preference import displacement, gap, implicit_rewards
from rlhf.algo.reward_model import rm_kwise, rm_softmax
from rlhf.algo.unpaired import answer_ratios, dro_surrogate, dro_value
from rlhf.batch import AnswerLogprobs, ListLogprobs, PairLogprobs, TokenLogprobs

Inputs = dict[str, Tensor]
Computed = dict[str, Any]
Compute = Callable[[Inputs, Computed], Computed]


def gradients(loss: Tensor, inputs: Inputs, *names: str) -> Inputs:
    return dict(zip(names, torch.autograd.grad(loss, [inputs[name] for name in names], retain_graph=True), strict=True))


def pairs_of(inputs: Inputs) -> PairLogprobs:
    """The vector's pairs; lengths of 1 where it has none, no reference where it has none."""
    ones = torch.ones_like(inputs["pi_w"]).detach()
    reference = (inputs["ref_w"], inputs["ref_l"]) if "ref_w" in inputs else (None, None)
    lengths = (inputs["len_w"], inputs["len_l"]) if "len_w" in inputs else (ones, ones)
    return PairLogprobs(inputs["pi_w"], inputs["pi_l"], *reference, *lengths)


def answers_of(inputs: Inputs) -> AnswerLogprobs:
    """The vector's answers; all of them bad where it has no labels."""
    label = inputs["label"] if "label" in inputs else torch.zeros_like(inputs["pi"])
    return AnswerLogprobs(inputs["pi"], inputs["ref"], torch.ones_like(label), label.bool())


def lists_of(logprobs: Tensor, reference: Tensor | None, scores: Tensor, length: Tensor | None = None) -> ListLogprobs:
    length = torch.ones_like(logprobs) if length is None else length
    return ListLogprobs(logprobs, reference, length, scores.detach(), torch.ones_like(scores, dtype=torch.bool))


def loss_of(name: str, *inputs: Any, **options: Any) -> Any:
    return PREFERENCE_LOSSES[name].function(*inputs, **options)


def couple(name: str, *given: Any, **options: Any) -> tuple[Inputs, dict[str, float]]:
    """What a loss needs of the batch, from a view without gradient."""
    found = PREFERENCE_LOSSES[name].traits.couple
    assert found is not None
    view = given[0].map(torch.Tensor.detach)
    inputs, state = found(view, *given[1:], **options)
    return inputs, state


def pairwise(name: str, *columns: str, **fixed: Any) -> Compute:
    """columns: the vector's names of what becomes a (B, 2) input."""

    def compute(inputs: Inputs, hyper: Computed) -> Computed:
        further = [torch.stack([inputs[column] for column in columns], -1).detach()] if columns else []
        losses = loss_of(name, pairs_of(inputs), *further, **{**fixed, **hyper})
        grad = gradients(losses.mean(), inputs, "pi_w", "pi_l")
        return {"per_example": losses, "loss": losses.mean(), "grad": grad}

    return compute


def dpo(inputs: Inputs, hyper: Computed) -> Computed:
    reward_w, reward_l = implicit_rewards(pairs_of(inputs), beta=hyper["beta"])
    return pairwise("dpo")(inputs, hyper) | {"reward_w": reward_w, "reward_l": reward_l}


def dpop(inputs: Inputs, hyper: Computed) -> Computed:
    computed = pairwise("dpop")(inputs, hyper) | {"penalty": displacement(pairs_of(inputs))}
    if bool((inputs["pi_w"] == inputs["ref_w"]).all()):
        del computed["grad"]  # the vector at the kink has none
    return computed


def rpo_nll(inputs: Inputs, hyper: Computed) -> Computed:
    pairs = pairs_of(inputs)
    without = loss_of("rpo_nll", pairs, beta=hyper["beta"], alpha=0.0)
    nll = (loss_of("rpo_nll", pairs, **hyper) - without) / hyper["alpha"]
    return pairwise("rpo_nll")(inputs, hyper) | {"dpo": without, "nll": nll}


def orpo(inputs: Inputs, hyper: Computed) -> Computed:
    pairs = pairs_of(inputs)
    losses, nll = loss_of("orpo", pairs, **hyper), loss_of("orpo", pairs, lam=0.0)
    ratio = ((losses - nll) / hyper["lam"]).mean()
    more = {"odds_ratio_loss": ratio, "log_odds": log_odds(pairs), "nll": nll.mean()}
    return pairwise("orpo")(inputs, hyper) | more


def cpo(inputs: Inputs, hyper: Computed) -> Computed:
    """The vector's loss per example is the preference term alone; the other term is a mean over tokens."""
    found = loss_of("cpo", pairs_of(inputs), **hyper)
    nll = found["chosen_tokens"].sum() / inputs["len_w"].sum()
    loss = found["rows"].mean() + nll
    grad = gradients(loss, inputs, "pi_w", "pi_l")
    values = {"per_example": found["rows"], "prefer": found["rows"].mean(), "nll": nll / hyper["alpha"], "loss": loss}
    return values | {"grad": grad}


def slic_hf(inputs: Inputs, hyper: Computed) -> Computed:
    """The vector's target is an input of its own with the chosen answer's numbers; ours is the chosen answer."""
    assert torch.equal(inputs["pi_w"], inputs["pi_target"])
    losses, hinge = (loss_of("slic_hf", pairs_of(inputs), **{**hyper, "lam": lam}) for lam in (hyper["lam"], 0.0))
    grad = gradients(hinge.mean(), inputs, "pi_w", "pi_l")
    grad["pi_target"] = gradients((losses - hinge).mean(), inputs, "pi_w")["pi_w"]
    return {"per_example": losses, "loss": losses.mean(), "cal": hinge.mean(), "grad": grad}


def unlikelihood_token(inputs: Inputs, hyper: Computed) -> Computed:
    masks = [inputs[name].bool() for name in ("mask_w", "mask_l")]
    sums = [row_sums(inputs[name], mask) for name, mask in zip(("logp_w", "logp_l"), masks, strict=True)]
    lengths = [mask.sum(-1) for mask in masks]
    pairs, rejected = PairLogprobs(*sums, None, None, *lengths), TokenLogprobs(inputs["logp_l"], masks[1])
    losses, nll = (loss_of("unlikelihood_token", pairs, rejected, alpha=alpha) for alpha in (hyper["alpha"], 0.0))
    return {"per_example": losses, "loss": losses.mean(), "unlikelihood": (losses - nll) / hyper["alpha"]}


def pairwise_cringe(inputs: Inputs, hyper: Computed) -> Computed:
    """The vector's cross-entropy is an input of its own; ours is -pi_w, so pi_w's gradient has both parts."""
    assert torch.equal(inputs["ce_w"], -inputs["pi_w"])
    pairs = pairs_of(inputs)
    losses = loss_of("pairwise_cringe", pairs, inputs["cr_l"], **hyper)
    gate = cringe_gate(pairs, b=hyper["b"], tau=hyper["tau"])
    grad = gradients(losses.mean(), inputs, "pi_w", "pi_l", "cr_l")
    grad["ce_w"] = gate.detach() / len(gate)
    grad["pi_w"] = grad["pi_w"] + grad["ce_w"]
    return {"per_example": losses, "loss": losses.mean(), "gate": gate, "grad": grad}


def beta_dpo(inputs: Inputs, hyper: Computed) -> Computed:
    """The vector gives the kept rows: three of four, which these draws keep."""
    pairs, names = pairs_of(inputs), ("beta", "a", "momentum")
    draws = torch.where(inputs["selected"].bool(), 0.99, 0.01)
    options = {name: hyper[name] for name in names}
    state = {"mean": hyper["M0"], "std": hyper["sigma"]}
    found, state = couple("beta_dpo", pairs, state, draws, **options, keep=0.8)
    assert torch.equal(found["selected"], inputs["selected"].bool())
    loss = loss_of("beta_dpo", pairs, **found)["selected"].sum() / found["selected"].sum()
    everything = torch.ones_like(found["selected"])
    return {
        "per_example": loss_of("beta_dpo", pairs, everything, found["batch_beta"])["selected"],
        "loss": loss,
        "M0": torch.tensor(state["mean"]),
        "sigma": torch.tensor(state["std"]),
        "weights": gap_log_weights(gap(pairs), **state).exp(),
        "beta_used": found["batch_beta"],
        "grad": gradients(loss, inputs, "pi_w", "pi_l"),
    }


def aot(inputs: Inputs, hyper: Computed) -> Computed:
    """The vector lists the losses in the order of the policy's differences."""
    pairs = pairs_of(inputs)
    found, _ = couple("aot", pairs, {}, torch.rand(len(pairs)))
    losses = loss_of("aot", pairs, **found, **hyper)
    order = (inputs["pi_w"] - inputs["pi_l"]).argsort()
    grad = gradients(losses.mean(), inputs, "pi_w", "pi_l")
    return {"per_example": losses[order], "loss": losses.mean(), "grad": grad}


def aot_unpaired(inputs: Inputs, hyper: Computed) -> Computed:
    """Chosen answers are the good ones; the vector lists the losses in the order of their log-ratios."""
    both = [torch.cat([inputs[f"{whose}_w"], inputs[f"{whose}_l"]]) for whose in ("pi", "ref")]
    rows = len(inputs["pi_w"])
    answers = AnswerLogprobs(*both, torch.ones(2 * rows), torch.arange(2 * rows) < rows)
    found, _ = couple("aot_unpaired", answers, {}, torch.rand(2 * rows))
    losses = loss_of("aot_unpaired", answers, **found, **hyper)
    loss = losses["good"].sum() / rows + losses["bad"].sum() / rows
    order = (inputs["pi_w"] - inputs["ref_w"]).argsort()
    return {"per_example": losses["good"][:rows][order], "loss": loss, "grad": gradients(loss, inputs, "pi_w", "pi_l")}


def tdpo(name: str) -> Compute:
    """The vector has logits: chosen rows above rejected ones."""

    def compute(inputs: Inputs, hyper: Computed) -> Computed:
        labels = inputs["labels"].long()[:, 1:]
        mask = labels != -100
        policy, reference = (inputs[f"{whose}_logits"][:, :-1].log_softmax(-1) for whose in ("policy", "ref"))
        tokens = labels.clamp(min=0).unsqueeze(-1)
        sums = [row_sums(x.gather(-1, tokens).squeeze(-1), mask) for x in (policy, reference)]
        seq_kl = row_sums(token_forward_kl(reference, policy), mask)
        chosen, rejected = sums[0].chunk(2)
        pairs = PairLogprobs(chosen, rejected, *sums[1].chunk(2), *mask.sum(-1).chunk(2))
        options = {key: value for key, value in hyper.items() if key != "variant"}
        losses = loss_of(name, pairs, torch.stack(seq_kl.chunk(2), -1), **options)
        grad = gradients(losses.mean(), inputs, "policy_logits")
        values = {"per_example": losses, "loss": losses.mean(), "margin": sums[0] - sums[1], "seq_kl": seq_kl}
        return values | {"grad": grad}

    return compute


def kto(inputs: Inputs, hyper: Computed) -> Computed:
    answers = answers_of(inputs)
    mismatched = (inputs["kl_pi"] - inputs["kl_ref"]).detach()
    found, _ = couple("kto", answers, {}, mismatched, torch.rand(len(answers)))
    losses = loss_of("kto", answers, **found, **hyper)
    return {"per_example": losses, "loss": losses.mean(), **found, "grad": gradients(losses.mean(), inputs, "pi")}


def bco(inputs: Inputs, hyper: Computed) -> Computed:
    answers = answers_of(inputs)
    density = inputs["p_desirable"] if "p_desirable" in inputs else torch.full_like(inputs["pi"], 0.5)
    found, _ = couple("bco", answers, {}, torch.rand(len(answers)), beta=hyper["beta"])
    options = {"min_density_ratio": 0.5, "max_density_ratio": 10.0, **hyper}
    losses = loss_of("bco", answers, found["shift"], density.detach(), **options)
    grad = gradients(losses.mean(), inputs, "pi")
    return {"per_example": losses, "loss": losses.mean(), "delta": found["shift"], "grad": grad}


def unpaired(name: str) -> Compute:
    def compute(inputs: Inputs, hyper: Computed) -> Computed:
        losses = loss_of(name, answers_of(inputs), **hyper)
        losses = losses["bad"] if isinstance(losses, dict) else losses
        return {"per_example": losses, "loss": losses.mean(), "grad": gradients(losses.mean(), inputs, "pi")}

    return compute


def dro_v(inputs: Inputs, hyper: Computed) -> Computed:
    answers, rewards, values = answers_of(inputs), inputs["r"].detach(), inputs["V"]
    losses = loss_of("dro_v", answers, rewards, values, **hyper)
    value_loss = dro_value(values, rewards, answer_ratios(answers), **hyper).mean()
    return {
        "per_example": losses,
        "loss": losses.mean(),
        "policy_surrogate": dro_surrogate(answers, rewards, values, **hyper).mean(),
        "value_loss": value_loss,
        "grad": gradients(losses.mean(), inputs, "pi") | gradients(value_loss, inputs, "V"),
    }


def d2o(inputs: Inputs, hyper: Computed) -> Computed:
    """The self-samples and the bad answer are a list whose last has the lowest score."""
    logprobs, reference = (torch.cat([inputs[f"{x}_self"], inputs[f"{x}_l"].unsqueeze(-1)], -1) for x in ("pi", "ref"))
    scores = torch.tensor([[1.0, 1.0, 0.0]]).expand(logprobs.shape)
    losses = loss_of("d2o", lists_of(logprobs, reference, scores), **hyper)
    grad = gradients(losses.mean(), inputs, "pi_self", "pi_l")
    return {"per_example": losses, "loss": losses.mean(), "grad": grad}


def cringe(inputs: Inputs, hyper: Computed) -> Computed:
    """The vector's rows are bad answers of one token."""
    contrast = token_contrast(inputs["logits"], inputs["targets"].long(), k=1)
    zeros = torch.zeros_like(contrast)
    answers = AnswerLogprobs(zeros, None, torch.ones_like(zeros), zeros.bool())
    found = loss_of("cringe", answers, contrast, alpha=1.0)
    loss = found["bad_tokens"].sum() / len(zeros) + found["good_tokens"].sum()
    return {"per_example": contrast, "loss": loss, "grad": gradients(loss, inputs, "logits")}


def listwise(name: str, scores: str) -> Compute:
    def compute(inputs: Inputs, hyper: Computed) -> Computed:
        losses = loss_of(name, lists_of(inputs["pi"], inputs["ref"], inputs[scores]), **hyper)
        return {"per_example": losses, "loss": losses.mean(), "grad": gradients(losses.mean(), inputs, "pi")}

    return compute


def without_reference(name: str) -> Compute:
    """rrhf and pro; the term of the best answer's likelihood apart."""

    def compute(inputs: Inputs, hyper: Computed) -> Computed:
        lists = lists_of(inputs["logp_sum"], None, inputs["reward"], inputs["length"])
        losses = loss_of(name, lists, **hyper)
        values = {"per_example": losses, "loss": losses.mean(), "grad": gradients(losses.mean(), inputs, "logp_sum")}
        best = best_nll(lists)
        if name == "rrhf":
            return values | {"rank_loss": (losses - best) / hyper["rank_weight"], "sft": best}
        return values | {"pro": loss_of(name, lists, sft_weight=0.0)}

    return compute


def reward_list(name: str) -> Compute:
    """The vector's answers stand best to worst, or it says which is the best."""

    def compute(inputs: Inputs, hyper: Computed) -> Computed:
        scores = inputs["r"]
        labels = -torch.arange(scores.shape[1], dtype=scores.dtype).expand(scores.shape)
        if "best" in inputs:
            labels = torch.nn.functional.one_hot(inputs["best"].long(), scores.shape[1])
        function = {"rm_kwise": rm_kwise, "rm_softmax": rm_softmax}[name]
        losses = function(scores, labels, torch.ones_like(scores, dtype=torch.bool))
        return {"per_example": losses, "loss": losses.mean()}

    return compute


PLAIN = (
    *("cdpo", "robust_dpo", "ipo", "ipo_avg", "dpo_norm", "r_dpo", "rso_hinge", "exo_pref", "discopop", "simpo"),
    *("gpo_exponential", "gpo_truncated_quadratic", "gpo_savage", "gpo_squared", "unlikelihood_seq", "sppo_hard"),
    *("nca_pair", "apo_zero", "apo_down", "bco_pair"),
)
SCORES = {name: "psi" for name in ("pl_dpo", "pair_logistic", "lipo_lambda", "listnet_softmax")}
SCORES |= {"dpo_rw": "reward", "exo_rw": "reward"}

COMPUTE: dict[str, Compute] = {
    **{name: pairwise(name) for name in PLAIN},
    "dpo": dpo,
    "f_dpo": pairwise("f_dpo", alpha=None),
    "sppo": pairwise("sppo", "p_w", "p_l"),
    "dno": pairwise("dno", "r_w", "r_l"),
    "dpop": dpop,
    "rpo_nll": rpo_nll,
    "orpo": orpo,
    "cpo": cpo,
    "slic_hf": slic_hf,
    "unlikelihood_token": unlikelihood_token,
    "pairwise_cringe": pairwise_cringe,
    "beta_dpo": beta_dpo,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "tdpo1": tdpo("tdpo1"),
    "tdpo2": tdpo("tdpo2"),
    "kto": kto,
    "bco": bco,
    "apo_zero_unpaired": unpaired("apo_zero_unpaired"),
    "npo": unpaired("npo"),
    "dro_v": dro_v,
    "d2o": d2o,
    "cringe": cringe,
    **{name: listwise(name, scores) for name, scores in SCORES.items()},
    "rrhf": without_reference("rrhf"),
    "pro": without_reference("pro"),
    "rm_kwise": reward_list("rm_kwise"),
    "rm_softmax": reward_list("rm_softmax"),
}
