"""What is logged of preference learning, whatever the loss: sums with their denominators, from log-probs alone."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.registry import Traits
from rlhf.batch import AnswerLogprobs, ListLogprobs, PairLogprobs

Metrics = dict[str, tuple[Tensor, str]]


def describe(view: PairLogprobs | AnswerLogprobs | ListLogprobs, traits: Traits, scale: float) -> Metrics:
    """The metrics of a record; `scale` and `traits` say what the loss's implicit reward is."""
    view = view.map(torch.Tensor.detach)
    if isinstance(view, PairLogprobs):
        return _pairs(view, traits, scale)
    if isinstance(view, AnswerLogprobs):
        return _answers(view, traits, scale)
    return _lists(view, traits, scale)


def implicit(logprobs: Tensor, ref: Tensor | None, lengths: Tensor, traits: Traits, scale: float) -> Tensor:
    """The implicit reward of answers, of any shape: scaled log-ratio, or log-prob where there is no reference."""
    ratio = logprobs - ref if traits.reference and ref is not None else logprobs
    return scale * (ratio / lengths.clamp(min=1) if traits.average else ratio)


def _pairs(pairs: PairLogprobs, traits: Traits, scale: float) -> Metrics:
    chosen, ref_chosen, rejected, ref_rejected = pairs.chosen, pairs.ref_chosen, pairs.rejected, pairs.ref_rejected
    reward_chosen = implicit(chosen, ref_chosen, pairs.chosen_len, traits, scale)
    reward_rejected = implicit(rejected, ref_rejected, pairs.rejected_len, traits, scale)
    rows = {
        "accuracy": reward_chosen > reward_rejected,
        "ties": reward_chosen == reward_rejected,
        "margin": reward_chosen - reward_rejected,
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "logprobs_chosen": chosen,
        "logprobs_rejected": rejected,
        "logprobs_chosen_mean": chosen / pairs.chosen_len,
        "logprobs_rejected_mean": rejected / pairs.rejected_len,
        "length_chosen": pairs.chosen_len,
        "length_rejected": pairs.rejected_len,
    }
    if ref_chosen is not None and ref_rejected is not None:
        rows |= {
            "ref_logprobs_chosen": ref_chosen,
            "ref_logprobs_rejected": ref_rejected,
            "chosen_displaced": chosen < ref_chosen,
            "both_fell": (chosen < ref_chosen) & (rejected < ref_rejected),
            "reference_gap": (chosen - ref_chosen).abs() / pairs.chosen_len,
            "kl": ((ref_chosen - chosen) + (ref_rejected - rejected)) / 2,
        }
    return {name: (value.float().sum(), "rows") for name, value in rows.items()}


def _answers(answers: AnswerLogprobs, traits: Traits, scale: float) -> Metrics:
    good = answers.is_good
    reward = implicit(answers.logprobs, answers.ref_logprobs, answers.length, traits, scale)
    split = {"reward": reward, "logprobs": answers.logprobs, "length": answers.length}
    metrics: Metrics = {}
    for name, values in split.items():
        metrics[f"{name}_good"] = (torch.where(good, values, 0.0).sum(), "good")
        metrics[f"{name}_bad"] = (torch.where(good, 0.0, values).sum(), "bad")
    if answers.ref_logprobs is not None:
        ratio = answers.logprobs - answers.ref_logprobs
        rows = {
            "accuracy": (ratio > 0) == good,
            "reference_gap": ratio.abs() / answers.length,
            "kl": -ratio,
        }
        metrics |= {name: (value.float().sum(), "rows") for name, value in rows.items()}
        metrics["good_displaced"] = (((ratio < 0) & good).float().sum(), "good")
    return metrics


def _lists(lists: ListLogprobs, traits: Traits, scale: float) -> Metrics:
    present, lengths = lists.present, lists.length.clamp(min=1)
    reward = implicit(lists.logprobs, lists.ref_logprobs, lengths, traits, scale)
    best, worst = _ends(lists.scores, present)
    of_best, of_worst = (reward.gather(1, index).squeeze(-1) for index in (best, worst))
    rows = {
        "accuracy": of_best > of_worst,
        "margin": of_best - of_worst,
        "reward_best": of_best,
        "reward_worst": of_worst,
        "best_first": reward.masked_fill(~present, -torch.inf).argmax(-1, keepdim=True).eq(best).squeeze(-1),
        "kendall_tau": kendall_tau(reward, lists.scores, present),
        "ties": _has_ties(lists.scores, present),
        "logprobs_best": lists.logprobs.gather(1, best).squeeze(-1),
        "logprobs_worst": lists.logprobs.gather(1, worst).squeeze(-1),
        "length_best": lists.length.gather(1, best).squeeze(-1),
        "length_worst": lists.length.gather(1, worst).squeeze(-1),
    }
    if lists.ref_logprobs is not None:
        ratio = torch.where(present, lists.logprobs - lists.ref_logprobs, 0.0)
        num = present.sum(-1)
        fell_best, fell_worst = (ratio.gather(1, index).squeeze(-1) < 0 for index in (best, worst))
        rows |= {
            "chosen_displaced": fell_best,
            "both_fell": fell_best & fell_worst,
            "reference_gap": (ratio.abs() / lengths).sum(-1) / num,
            "kl": -ratio.sum(-1) / num,
        }
    return {name: (value.float().sum(), "rows") for name, value in rows.items()}


def _ends(scores: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of every list's best and worst answer, (B, 1) each; the first of equal ones."""
    best = scores.masked_fill(~present, -torch.inf).argmax(-1, keepdim=True)
    return best, scores.masked_fill(~present, torch.inf).argmin(-1, keepdim=True)


def _has_ties(scores: Tensor, present: Tensor) -> Tensor:
    """Whether two present answers of a list have one score, (B,)."""
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    same = (scores.unsqueeze(-1) == scores.unsqueeze(-2)) & both
    return same.sum((-1, -2)) > present.sum(-1)


def kendall_tau(found: Tensor, scores: Tensor, present: Tensor) -> Tensor:
    """Concordant less discordant pairs over all pairs whose scores differ: (B, K) -> (B,); 0 where none does."""
    both = present.unsqueeze(-1) & present.unsqueeze(-2)
    wanted = torch.where(both, (scores.unsqueeze(-1) - scores.unsqueeze(-2)).sign(), 0.0)
    agree = (found.unsqueeze(-1) - found.unsqueeze(-2)).sign() * wanted
    return agree.sum((-1, -2)) / wanted.abs().sum((-1, -2)).clamp(min=1)
