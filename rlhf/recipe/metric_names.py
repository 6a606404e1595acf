"""The names that each stage can write to metrics.jsonl, where a recipe may name one. docs/metrics.md explains them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

from rlhf.recipe.problems import Problem, closest
from rlhf.recipe.stages import LearningRecipe, OnlineRecipe

_UPDATED = "lr grad_norm"
_SUPERVISED = {  # of training rows and of held-out ones
    "sft": "loss tokens_per_row",
    "rm": "loss accuracy margin score_chosen score_rejected best_first score_mean",
    "dpo": """
    loss accuracy ties margin reward_chosen reward_rejected logprobs_chosen logprobs_rejected
    logprobs_chosen_mean logprobs_rejected_mean ref_logprobs_chosen ref_logprobs_rejected length_chosen
    length_rejected chosen_displaced both_fell kl reference_gap loss_* reward_good reward_bad logprobs_good
    logprobs_bad length_good length_bad good_displaced reward_best reward_worst logprobs_best logprobs_worst
    length_best length_worst best_first kendall_tau
    """,
}
_COUPLED = "z0 shift bco_count bco_mean batch_beta beta_dpo_mean beta_dpo_std"
_SCORED = "score_mean score_std model exact numeric format length function process http demo_gold"
_ONLINE = {
    "speed": "seconds tokens_per_second rollout_seconds rollout_tokens_per_second",
    "train": "skipped",
    "reward": f"{_SCORED} processed_mean unscored flat_groups",
    "test": f"{_SCORED} train_shift shift gap",
    "rollout": """
    length_mean finished kl_ref ref_gap sampler_gap empty_minibatches repeated advantage_abs greedy_score
    opponent_score flat_drawn refills groups_kept
    """,
    "policy": f"""
    loss entropy clipfrac clipfrac_high clipfrac_low approx_kl logprob_change kl_old kl_moved updates
    penalty_beta kl_loss {_UPDATED}
    """,
    "kl": "coef",
    "ptx": "loss",
    "value": f"loss clipfrac mean return_mean explained_variance {_UPDATED}",
    "alarm": """
    kl_spike entropy_collapse eos_rate length_drift flat_reward all_clipped explained_variance repeated_answers
    """,
}
_OF_PPO = ("value",)


def metric_names(stage: str) -> set[str]:
    """Every name of a stage that trains; `*` stands for the name of a loss."""
    if stage in _SUPERVISED:
        groups = {
            "speed": "seconds tokens_per_second",
            "train": f"{_SUPERVISED[stage]} {_UPDATED} skipped",
            "eval": _SUPERVISED[stage],
            **({"coupling": _COUPLED, "value": f"loss mean {_UPDATED}"} if stage == "dpo" else {}),
        }
    else:
        groups = {group: names for group, names in _ONLINE.items() if stage == "ppo" or group not in _OF_PPO}
    return {f"{group}/{name}" for group, names in groups.items() for name in names.split()}


def best_of_a_metric(stage: str, recipe: LearningRecipe) -> Iterator[Problem]:
    """The best step is told by a metric that the stage writes, more than once."""
    best = recipe.checkpoint.keep_best
    if best is None:
        return
    key, names = "checkpoint.keep_best.metric", metric_names(stage)
    kind = re.sub(r"_[2-9]$|_[1-9][0-9]+$", "", best.metric)  # a second reward of a kind is called model_2
    if not any(fnmatchcase(name, each) for name in (best.metric, kind) for each in names):
        near = closest(best.metric, sorted(names))
        fix = f"did you mean {near[0]}?" if near else f"docs/metrics.md lists the metrics of {stage}"
        yield Problem(key, f"expected a metric of {stage}, found {best.metric!r}", fix)
    elif best.metric.startswith("eval/") and not isinstance(recipe, OnlineRecipe):
        if recipe.data.eval is None and not recipe.data.eval_rows:
            fix = "set data.eval_rows, or name a held-out file in data.eval"
            what = f"expected a metric of training without held-out rows, found {best.metric!r}"
            yield Problem(key, what, fix, ("data.eval_rows", "data.eval"))
        elif not recipe.eval.every:  # type: ignore[attr-defined]
            what = "expected at least 1 for the best of several steps, found 0"
            yield Problem("eval.every", what, "set it to the steps between evaluations", (key,))
