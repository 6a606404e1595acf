"""Combinations of on-policy choices: those that make no sense are refused with the reason, the papers' are allowed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rlhf.recipe.policy_rules import POLICY_RULES

BASE = "model: {from: sft}\ndata: {path: x}\n"
STEPS = "rewards=[{kind: process, function: 'a.py:f'}]"

# (stage, overrides, key that is blamed, what the message holds, remedy)
BROKEN = [
    ("grpo", ["advantage.name=gae"], "advantage.name", "without a critic, found gae", "rlhf ppo"),
    ("ppo", ["advantage={name: reinforce}"], "advantage.name", "no use for the critic", "rlhf grpo"),
    ("grpo", ["train.answers=1"], "train.answers", "at least 2 for advantage grpo, found 1", "reinforce"),
    ("grpo", ["advantage={name: rloo}", "train.answers=1"], "train.answers", "advantage rloo, found 1", "remax"),
    ("grpo", ["advantage={name: process_grpo}"], "rewards", "kind process for advantage process_grpo", "add a process"),
    ("grpo", ["advantage={name: process_grpo}", STEPS, "kl={placement: reward, coef: 0.1}"], "kl.placement",
     "expected loss with advantage process_grpo", "set it to loss"),
    ("grpo", ["advantage={name: process_grpo}", STEPS, "scores.clip=1.0"], "scores.clip", "not of answers", "remove"),
    ("grpo", ["whiten_rewards=true"], "whiten_rewards", "does not read token rewards", "reinforce_pp"),
    ("grpo", ["kl.estimator=k1"], "kl.estimator", "whose expected gradient is 0", "choose k3"),
    ("ppo", ["kl={coef: 0.0, controller: {name: adaptive}}"], "kl.coef", "found 0", "0.2"),
    ("ppo", ["kl.controller={name: adaptive, horizon: 12.0}"], "kl.controller.horizon", "found 12", "640 changes it"),
    ("grpo", ["policy_loss.name=reinforce", "train.inner_epochs=2"], "train.inner_epochs", "found 2", "first update"),
    ("grpo", ["policy_loss.name=reinforce", "train.minibatches=4"], "train.minibatches", "found 4", "ppo_clip"),
    ("grpo", ["policy_loss.name=ppo_penalty"], "train.inner_epochs", "several updates", "raise train.inner_epochs"),
    ("grpo", ["train.target_kl=0.05"], "train.target_kl", "one update per rollout, found 0.05", "inner_epochs"),
    ("grpo", ["advantage={name: reinforce_pp}", "whiten_advantages=true"], "whiten_advantages", "by itself", "remove"),
    ("grpo", ["advantage={name: process_grpo}", STEPS, "train.max_refills=2"], "train.max_refills", "found 2", "rloo"),
    ("grpo", ["advantage={name: remax}", "policy_loss.name=gspo", "kl={placement: reward, coef: 0.1}"], "kl.placement",
     "expected loss with advantage remax and policy_loss gspo", "token by token"),
    ("ppo", ["scores.overlong_penalty=2.0"], "scores.overlong_penalty", "makes 2 nothing, found", "set the buffer"),
    ("ppo", ["scores={drop_unfinished: true, missing_eos_penalty: 1.0}"], "scores.drop_unfinished", "both", "let them"),
    ("ppo", ["test_rewards=[{kind: model, from: rm}]"], "test_rewards.0", "found rewards.0", "data.part"),
    ("grpo", ["policy_loss.name=gspo", "aggregation=token_mean"], "aggregation", "found token_mean", "by their length"),
    ("grpo", ["policy_loss.name=mdloo", "advantage={name: reinforce_pp}"], "advantage.name", "whole answers", "rloo"),
    ("grpo", ["advantage={name: reinforce}", "train.max_refills=2"], "train.max_refills", "whole answers", "grpo"),
    ("grpo", ["scores.overlong_buffer=128"], "scores.overlong_buffer", "max_new_tokens = 128, found 128", "before"),
    ("ppo", ["scores={missing_eos_score: -1.0, missing_eos_penalty: 1.0}"], "scores.missing_eos_score", "both", "one"),
    ("grpo", ["opponent={}"], "kl.placement", "expected reward with opponent, found loss", "whole answer"),
    ("grpo", ["opponent={}", "advantage={name: remax}", "kl={placement: reward}"], "advantage.name",
     "found remax, which scores a greedy answer too", "reinforce"),
    ("grpo", ["opponent={}", "advantage={name: process_grpo}", STEPS, "kl={placement: reward, coef: 0.0}"],
     "advantage.name", "found process_grpo, which scores steps too", "reinforce"),
    ("ppo", ["critic.warmup_rollouts=100"], "critic.warmup_rollouts", "train.rollouts = 100, found 100", "never"),
    ("ppo", ["pretraining={data: {path: x, eval_rows: 3}}"], "pretraining.data.eval_rows", "no held-out rows", "it"),
]  # fmt: skip

ALLOWED = {
    "dr_grpo": ("grpo", ["advantage={name: dr_grpo}", "aggregation=constant", "kl.coef=0"]),
    "dapo": ("grpo", ["policy_loss.clip_high=0.28", "aggregation=token_mean", "train.max_refills=3", "kl.coef=0",
                      "scores.overlong_buffer=20", "scores.drop_unfinished=true"]),
    "gspo": ("grpo", ["policy_loss={name: gspo}", "train.minibatches=4", "kl.coef=0"]),
    "rloo": ("grpo", ["advantage={name: rloo}", "policy_loss={name: rloo_clip}",
                      "kl={placement: reward, estimator: k1}"]),
    "reinforce": ("grpo", ["advantage={name: reinforce}", "policy_loss={name: reinforce}", "train.answers=1",
                           "aggregation=sequence_sum", "kl={placement: reward, estimator: k1}"]),
    "nash_md": ("grpo", ["opponent={}", "advantage={name: reinforce}", "policy_loss={name: reinforce}",
                         "train.answers=1", "aggregation=sequence_sum", "kl={placement: reward, estimator: k1}"]),
    "reinforce_pp": ("grpo", ["advantage={name: reinforce_pp}", "train.answers=1", "whiten_rewards=true",
                              "kl={placement: reward, estimator: k1}"]),
    "remax": ("grpo", ["advantage={name: remax}", "policy_loss={name: reinforce}", "train.answers=1"]),
    "mdloo": ("grpo", ["advantage={name: rloo}", "policy_loss={name: mdloo}", "train.inner_epochs=2"]),
    "cispo": ("grpo", ["policy_loss={name: cispo}", "aggregation=token_mean", "kl.coef=0"]),
    "process": ("grpo", ["advantage={name: process_grpo}", STEPS]),
    "ppo_penalty": ("ppo", ["policy_loss={name: ppo_penalty}"]),
    "ppo_adaptive": ("ppo", ["kl.controller={name: adaptive, target: 3.0}", "critic.warmup_rollouts=5"]),
    "ppo_ptx": ("ppo", ["pretraining={coef: 0.5, data: {path: x}}"]),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "changes", "key", "what", "fix"), BROKEN)
def test_a_senseless_combination_is_refused_with_its_reason(
    stage: str, changes: list[str], key: str, what: str, fix: str, refuse: Callable[..., list[str]]
) -> None:
    [problem] = refuse(BASE, stage, *changes)
    head, _, hint = problem.partition("\n  ")
    message = head.partition(f"{key}: ")[2]
    assert message.startswith("expected ") and what in message and ", found " in message, problem
    assert fix in hint, problem


@pytest.mark.parametrize("name", ALLOWED)
def test_the_papers_combinations_are_allowed(name: str, load: Callable[..., object]) -> None:
    stage, changes = ALLOWED[name]
    load(BASE, stage, *changes)


def test_every_rule_is_documented() -> None:
    assert all(rule.__doc__ for rule in POLICY_RULES)
    assert len({rule.__name__ for rule in POLICY_RULES}) == len(POLICY_RULES)
