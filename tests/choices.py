"""The table of tests/test_choices.py: what each case says of `rlhf ppo` or `rlhf grpo`, and what no case can say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """What differs from the tiny recipe (DATA, RUN, CODE and URL stand for places), and what must have come of it."""

    stage: str
    values: dict[str, Any]
    check: Callable[[Rows], bool] = lambda rows: True
    kinds: tuple[str, ...] = ("full", "lora")


def every(name: str) -> Callable[[Rows], bool]:
    return lambda rows: all(name in row for row in rows)


def changes(name: str) -> Callable[[Rows], bool]:
    return lambda rows: rows[0][name] != rows[1][name]


ONE_UPDATE = {"inner_epochs": 1, "minibatches": 1}
KEPT = {"coef": 0.5, "data": {"path": "DATA/sft.jsonl", "max_length": 96}}
SUMS = {"path": "DATA/sums.jsonl", "columns": {"prompt": "question"}, "max_length": 96}
LENGTH = {"kind": "length", "target": 3, "scale": 6}
NO_KL_REWARD = {"kl.placement": "loss", "kl.estimator": "k3"}
SMALL = {"stage": 3, "persistence_threshold": 0, "bucket_size": 1000}

CASES = {
    # --- ppo
    "adaptive kl": Case(
        "ppo",
        {
            "advantage": {"name": "gae", "gamma": 0.99, "lam": 0.9},
            "kl": {
                "placement": "reward",
                "coef": 0.1,
                "estimator": "k1",
                "controller": {"name": "adaptive", "target": 2.0, "horizon": 100},
            },
            "value_loss": {"name": "ppo_value", "clip": 0.3},
            "whiten_rewards": True,
            "whiten_advantages": False,
            "scores.missing_eos_penalty": 0.5,
        },
        changes("kl/coef"),
    ),
    "critic": Case(
        "ppo",
        {
            "critic": {
                "path": "RUN/sft/model",
                "lr": 1e-3,
                "optimizer": "sgd",
                "betas": [0.8, 0.9],
                "eps": 1e-6,
                "weight_decay": 0.1,
                "max_grad_norm": 0.5,
                "schedule": "linear",
                "warmup": 0.1,
                "min_lr_ratio": 0.5,
                "warmup_rollouts": 1,
            },
            "train.target_kl": 1e-9,
            "train.lr": 1e-2,
            "policy_loss": {"name": "ppo_dual_clip", "clip_low": 0.1, "clip_high": 0.3, "dual_clip": 2.0},
        },
        lambda rows: "policy/loss" not in rows[0] and "value/loss" in rows[0] and rows[1]["policy/updates"] == 2,
    ),
    "penalty": Case(
        "ppo",
        {
            "policy_loss": {"name": "ppo_penalty", "beta": 0.5, "target": 1e-9},
            "kl": {"placement": "loss", "estimator": "k2", "coef": 0.1, "controller": {"name": "fixed"}},
            "entropy_coef": 0.01,
            "train.lr": 1e-3,
        },
        lambda rows: rows[0]["policy/penalty_beta"] == 0.5 and rows[1]["policy/penalty_beta"] == 1.0,
    ),
    "pretraining and average": Case(
        "ppo", {"pretraining": KEPT, "ema": {"decay": 0.5}, "aggregation": "token_mean"}, every("ptx/loss")
    ),
    "scores": Case(
        "ppo",
        {
            "scores": {
                "normalise": "running",
                "clip": 2.0,
                "length_penalty": 0.01,
                "overlong_buffer": 4,
                "overlong_penalty": 0.5,
                "drop_unfinished": True,
            },
            "rewards": [{"kind": "model", "from": "rm", "weight": 0.5, "statistics": "normalise"}, LENGTH],
            "test_rewards": [{"kind": "model", "path": "RUN/rm/model", "statistics": "center"}],
            "train.prompts": 16,
            "sampling": {"max_new_tokens": 40, "stop": list("abcdefghijklmnop")},  # some answers end, some do not
        },
        every("test/score_mean"),
    ),
    "alarms": Case(
        "ppo",
        {
            "guards": {
                "kl_spike": {"threshold": 90.0, "on_alarm": "stop"},
                "entropy_collapse": {"threshold": 0.2, "on_alarm": "stop"},
                "eos_rate": {"threshold": 0.01, "on_alarm": "warn"},
                "length_drift": {"threshold": 1.0001, "on_alarm": "warn"},
                "flat_reward": {"rollouts": 1, "on_alarm": "stop"},
                "all_clipped": {"rollouts": 1, "on_alarm": "warn"},
                "explained_variance": {"rollouts": 1, "on_alarm": "warn"},
                "repeated_answers": {"threshold": 0.9, "on_alarm": "stop"},
            },
            "log": {
                "every": 1,
                "samples_every": 1,
                "samples": 2,
                "show_samples": False,
                "tensorboard": True,
            },
            "checkpoint": {
                "every": 1,
                "minutes": 30.0,
                "keep": 1,
                "keep_best": {"metric": "reward/score_mean", "larger_is_better": True, "publish": True},
            },
            "max_minutes": 30.0,
        },
        lambda rows: any(name.startswith("alarm/") for row in rows for name in row),
    ),
    "sharded": Case(
        "ppo",
        {
            "zero": {"stage": 2, "offload_optimizer": False, "bucket_size": 1000},
            "critic.zero": {"stage": 3, "offload_params": False, "persistence_threshold": 0, "bucket_size": 1000},
            "reference.zero": SMALL,
            "reference.from": "sft",
            "rewards": [{"kind": "model", "from": "rm", "zero": SMALL}],
            "model.gradient_checkpointing": True,
        },
    ),
    "bf16": Case(
        "ppo",
        {
            "model.dtype": "bf16",
            "zero.stage": 1,
            "critic.zero.stage": 1,
            "rewards": [{"kind": "model", "from": "rm", "dtype": "bf16", "statistics": "none"}],
            "model.attention": "eager",
        },
    ),
    "shared base": Case(
        "ppo",
        {"share_base": True, "rewards": [{"kind": "model", "from": "choice-rm"}], "critic.from": "choice-rm"},
        kinds=("lora",),
    ),
    "optimizer": Case(
        "ppo",
        {
            "train.optimizer": "adamw",
            "train.betas": [0.8, 0.9],
            "train.eps": 1e-6,
            "train.weight_decay": 0.1,
            "train.max_grad_norm": 0.5,
            "train.schedule": "constant",
            "train.warmup": 0.2,
            "train.min_lr_ratio": 0.5,
            "train.seed": 7,
            "train.micro_batch": 3,
            "train.micro_tokens": 200,
            "train.max_skipped": 1,
            "train.rollout_batch": 4,
            "data": {
                "sources": [
                    {"path": "DATA/prompts.jsonl", "weight": 2.0, "part": "1/2", "limit": 15, "system": "Be brief."},
                    {"path": "DATA/sums.jsonl", "templates": {"prompt": "{question}!"}, "format": "prompts"},
                ],
                "max_length": 96,
                "max_prompt_length": 80,
                "on_long": "truncate_prompt",
                "on_empty": "drop",
                "filter": {"drop_duplicates": True},
            },
        },
    ),
    # --- grpo: an estimator each
    "grpo": Case(
        "grpo",
        {
            "advantage": {"name": "grpo", "eps": 1e-3},
            "policy_loss": {"name": "ppo_clip", "clip_low": 0.1, "clip_high": 0.28},
            "kl": {"placement": "loss", "estimator": "k3", "coef": 0.1},
            "aggregation": "token_mean",
            "sampling": {
                "max_new_tokens": 12,
                "temperature": 0.8,
                "top_p": 0.95,
                "top_k": 50,
                "stop": ["the"],
                "decode_dtype": "bf16",
            },
        },
    ),
    "grpo over the batch": Case(
        "grpo",
        {
            "advantage": {"name": "grpo_batch", "eps": 1e-3},
            "policy_loss": {"name": "gspo", "clip_low": 1e-3, "clip_high": 2e-3},
            "kl.estimator": "k2",
            "aggregation": "sequence_mean",
        },
    ),
    "refills": Case(
        "grpo",
        {
            "advantage": {"name": "dr_grpo"},
            "aggregation": "constant",
            "kl.estimator": "abs",
            "train.max_refills": 2,
            "train.answers": 2,
            "rewards": [{"kind": "format", "pattern": "[aeiou]", "weight": 2.0}],
        },
        every("rollout/groups_kept"),
    ),
    "steps": Case(
        "grpo",
        {
            "advantage": {"name": "process_grpo", "eps": 1e-3},
            "rewards": [
                {"kind": "process", "function": "CODE:steps", "weight": 0.5, "separator": "e", "timeout": 20.0}
            ],
            "train.rollouts": 2,
            "ema": {"decay": 0.0},
        },
        every("reward/process"),
    ),
    "rloo": Case(
        "grpo",
        {
            "advantage": {"name": "rloo"},
            "policy_loss": {"name": "rloo_clip", "clip_low": 0.1, "clip_high": 0.3},
            "rewards": [
                {
                    "kind": "http",
                    "url": "URL",
                    "api_key_env": "COLUMNS",  # a variable that is set
                    "weight": 0.5,
                    "timeout": 20.0,
                    "retries": 1,
                    "on_failure": "stop",
                },
                {"kind": "http", "url": "URL", "on_failure": "unscored", "batch_size": 5},
            ],
        },
        every("reward/http"),
    ),
    "reinforce": Case(
        "grpo",
        {
            "advantage": {"name": "reinforce", "decay": 0.5},
            "policy_loss": {"name": "reinforce"},
            "aggregation": "sequence_sum",
            "kl": {"placement": "reward", "estimator": "k1"},
            **{f"train.{name}": value for name, value in {**ONE_UPDATE, "answers": 1, "prompts": 16}.items()},
            "train.schedule": "linear",
            "train.optimizer": "sgd",
            "scores.missing_eos_score": -1.0,
            "sampling.max_new_tokens": 24,
            "sampling.decode_dtype": "fp32",
        },
    ),
    "opponent": Case(
        "grpo",
        {
            "opponent": {"mixture": 0.5},
            "zero": SMALL,
            "reference.zero": SMALL,
            "advantage": {"name": "reinforce"},
            "policy_loss": {"name": "reinforce"},
            "aggregation": "sequence_sum",
            "kl": {"placement": "reward", "estimator": "k1"},
            **{f"train.{name}": value for name, value in {**ONE_UPDATE, "answers": 1, "prompts": 16}.items()},
        },
        lambda rows: all(abs(row["reward/score_mean"]) < 0.5 and "rollout/opponent_score" in row for row in rows),
    ),
    "opponent on a shared base": Case(
        "grpo",
        {
            "share_base": True,
            "opponent": {"mixture": 0.25},
            "rewards": [{"kind": "model", "from": "choice-rm"}],
            "kl": {"placement": "reward", "estimator": "k1"},
        },
        every("rollout/opponent_score"),
        kinds=("lora",),
    ),
    "reinforce++": Case(
        "grpo",
        {
            "advantage": {"name": "reinforce_pp", "gamma": 0.9},
            "policy_loss": {"name": "cispo", "max_ratio": 2.0},
            "kl": {"placement": "reward", "estimator": "abs"},
            "whiten_rewards": True,
            "train.answers": 1,
            "train.prompts": 16,
            "rewards": [
                {"kind": "function", "function": "CODE:score", "weight": 0.5, "timeout": 20.0},
                {"kind": "demo_gold", "noise": 0.5, "seed": 3, "weight": 0.5},
            ],
        },
        lambda rows: all(row["reward/unscored"] > 0 for row in rows),
    ),
    "reinforce++ with a baseline": Case(
        "grpo",
        {
            "advantage": {"name": "reinforce_pp_baseline"},
            "policy_loss": {"name": "ppo_clip"},
            "train.schedule": "cosine",
            "data": SUMS,
            "rewards": [
                {"kind": "exact", "answer": "answer", "weight": 0.5},
                {"kind": "numeric", "answer": "answer", "marker": "###", "tolerance": 1e-3, "weight": 0.5},
                {**LENGTH, "weight": 0.5},
            ],
            "pretraining": {
                "coef": 0.1,
                "data": {
                    "sources": [
                        {"path": "DATA/words.jsonl", "format": "text", "prompt_words": 2},
                        {"path": "DATA/labelled.jsonl", "format": "labelled"},
                    ],
                    "max_length": 64,
                    "on_long": "truncate_answer",
                    "train_on": "last_answer",
                },
            },
        },
        every("ptx/loss"),
    ),
    "remax": Case(
        "grpo",
        {
            "advantage": {"name": "remax"},
            "policy_loss": {"name": "mdloo", "gamma": 0.5},
            "train.answers": 2,
            "whiten_advantages": True,
            "model.path": "RUN/sft/model",
            "model.from": None,
            "reference.path": "RUN/sft/model",
        },
        every("rollout/greedy_score"),
    ),
    "from scratch": Case(
        "grpo",
        {
            "model": {
                "init": {
                    "hidden": 32,
                    "layers": 1,
                    "heads": 2,
                    "kv_heads": 1,
                    "ffn": 48,
                    "vocab": 320,
                    "context": 160,
                    "tied": False,
                },
                "chat_template": "chatml",
                "attention": "sdpa",
            },
            "data": {"path": "DATA/prompts.jsonl", "max_length": 150},
            "rewards": [LENGTH, {"kind": "model", "from": "rm"}],  # which reads other tokens in another template
        },
        every("reward/model"),
    ),
}

RATHER = "covered where it belongs: "
NOT_HERE = {  # what has no case, as regular expressions over keys, and why
    r"(model|reference|critic|rewards\.0)\.revision|data\.(name|split|data_dir|revision)": "names of the hub",
    r"data\.(from|output)": "what a label stage makes are no prompts: tests/test_label.py",
    r"data\.pair_labels": "pairs are no prompts and no rows of a language model: tests/data/test_formats.py",
    r"data\.eval(_rows)?": "on-policy stages evaluate on nothing; other stages do in tests/test_pipeline.py",
    r"data\.(reweight\.\w+|filter\.(m\w+|drop_[ce]\w+))": "of pairs, or of held-out rows: tests/test_data_care.py",
    r"model\.(lora\.|init\.)?dropout": "must stay off outside of sft: tests/recipe/test_check.py",
    r"log\.wandb": "an optional package and an account",
    r"zero\.offload_(optimizer|params)": "on a machine without accelerators there is no other memory",
}
NOT_THESE = {  # values of options with a few, and why
    ("model.attention", "flash_attention_2"): "a package for accelerators",
    ("model.attention", "flex_attention"): "compiles kernels",
    ("data.on_long", "error"): RATHER + "tests/data/test_limits.py",
    ("data.on_empty", "error"): RATHER + "tests/data/test_examples.py",
}
