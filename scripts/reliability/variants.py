"""Every way of training, sampling and merging that keeps something from step to step, as variants of tiny stages.

In the settings, DATA, RUN, CODE and JUDGE stand for the data folder, the run directory, a file of functions and the
address of a judge.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlhf.train import token_cache
from scripts.reliability.lab import Lab


def _nothing() -> None:
    """No preparation."""


def keep_all_tokens() -> None:
    """However few the rows are, what they became is kept."""
    token_cache.LEAST_TOKENS = 0


@dataclass(frozen=True, eq=False)
class Variant:
    """A stage with settings of its own. needs: stages of the run directory beside sft and rm."""

    name: str
    stage: str
    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    before: Callable[[], object] = _nothing  # in the process of the command, before it starts

    @property
    def folder(self) -> str:
        """Its stage folder."""
        return f"{self.stage}-{self.name.replace(' ', '-')}"

    def command(self, lab: Lab, judge: str = "http://127.0.0.1:9") -> list[str]:
        """Its words. judge: the address of one, where one listens."""
        text = json.dumps(self.settings).replace("DATA", str(lab.data)).replace("RUN", str(lab.root))
        code, scored = lab.recipes / "functions.py", lab.data / "scored.jsonl"
        if not code.exists():
            code.write_text(FUNCTIONS)
            rows = [json.loads(line) for line in (lab.data / "sft.jsonl").read_text().splitlines()]
            rated = [
                {**row, "score": len(row["completion"]) % 7 / 7, "label": i % 2 == 0} for i, row in enumerate(rows)
            ]
            scored.write_text("".join(json.dumps(row) + "\n" for row in rated))
        text = text.replace("CODE", str(code)).replace("JUDGE", judge)
        words = [word for key, value in json.loads(text).items() for word in ("--set", f"{key}={json.dumps(value)}")]
        allowed = ["--allow-code", str(code)] if str(code) in text else []
        return lab.command(self.stage, "--name", self.folder, *words, *allowed)


FUNCTIONS = """\
def score(rows, answers):
    return [None if len(answer) % 5 == 0 else float(len(answer)) for answer in answers]


def steps(rows, steps):
    return [[float(len(step)) for step in each] for each in steps]
"""

LORA = {"model.lora": {"rank": 4}}
NOISY = {"model.lora": {"rank": 4, "dropout": 0.1}, "model.dropout": True}  # elsewhere it must be off
SELDOM = {"checkpoint": {"every": 2, "keep": 1}, "log.every": 2, "log.samples_every": 2}
SHARDED = {"zero": {"stage": 3, "persistence_threshold": 0, "bucket_size": 1000}}
LENGTH = [{"kind": "length", "target": 3, "scale": 6}]
ADAPTIVE = {"coef": 0.1, "controller": {"name": "adaptive", "target": 2.0, "horizon": 100}}
SUPERVISED = {"coef": 0.5, "data": {"path": "DATA/sft.jsonl", "max_length": 96}}
ALARMS = {"length_drift": {"threshold": 1.01}, "explained_variance": {"rollouts": 2}}
LISTS = {"data": {"path": "DATA/lists.jsonl", "eval_rows": 8, "max_length": 128, "on_long": "truncate_answer"}}
SHARED = [{"kind": "model", "from": "rm-adapter"}]
NEEDED = ("rm-adapter",)
NEEDED_TO_MERGE = ("dpo-whole", "dpo-adapter")
VOWELS = [{"kind": "format", "pattern": "[aeiou]{2}"}]
OWN = [
    {"kind": "process", "function": "CODE:steps", "separator": "e"},
    {"kind": "function", "function": "CODE:score", "weight": 0.5},
]
REINFORCE = {
    "advantage.name": "reinforce",
    "policy_loss": {"name": "reinforce"},
    "train.answers": 1,
    "train.inner_epochs": 1,
    "train.minibatches": 1,
    "kl": {"placement": "reward", "estimator": "k1", "coef": 0.1},
}
RUBRIC = {
    "kind": "self_rubric",
    "template": "{prompt}{answer}\n",
    "verdict": "([0-5])",  # what an untrained model says now and then
    "sampling": {"max_new_tokens": 30, "temperature": 1.5, "top_k": 100},
}
BY_JUDGE = {"kind": "pairwise", "url": "JUDGE/v1", "model": "stand-in", "retries": 0, "timeout": 5.0}


SCORED = {"data": {"path": "DATA/scored.jsonl", "eval_rows": 8, "max_length": 96}}

SFT = [
    Variant("whole", "sft"),
    Variant("adapter", "sft", NOISY),
    Variant("held to its start", "sft", {"model": {"from": "sft"}, "train.l1": 1e-4, **SELDOM}, before=keep_all_tokens),
    Variant(
        "zero 1", "sft", {"zero.stage": 1, "train.schedule": "cosine", "train.warmup": 0.3, "train.batch_size": 24}
    ),
    Variant("zero 3", "sft", SHARDED),
    Variant("bf16", "sft", {"model.dtype": "bf16", "zero.stage": 1, "train.micro_batch": "auto"}),
]
RM = [
    Variant("whole", "rm"),
    Variant("adapter", "rm", LORA),
    Variant("lists", "rm", {**LISTS, "loss": {"name": "rm_kwise"}, **SELDOM}),
    Variant("zero 2", "rm", {"zero": {"stage": 2, "bucket_size": 1000}}, before=keep_all_tokens),
]
PPO = [
    Variant("whole", "ppo"),
    Variant("adapter", "ppo", LORA),
    Variant(
        "everything",
        "ppo",
        {"kl": ADAPTIVE, "scores.normalise": "running", "ema": {"decay": 0.5}, "pretraining": SUPERVISED},
    ),
    Variant("warm-up", "ppo", {"critic.warmup_rollouts": 1, "train.target_kl": 1e-4, "guards": ALARMS, **SELDOM}),
    Variant("penalty", "ppo", {"policy_loss": {"name": "ppo_penalty", "target": 1e-9}, "test_rewards": LENGTH}),
    Variant("shared base", "ppo", {**LORA, "share_base": True, "rewards": SHARED, "critic.from": "rm-adapter"}, NEEDED),
    Variant("zero 3", "ppo", {**SHARDED, "critic.zero": SHARDED["zero"], "ema": {"decay": 0.5}}),
]
GRPO = [
    Variant("whole", "grpo"),
    Variant("adapter", "grpo", LORA),
    Variant("refills", "grpo", {"train.max_refills": 2, "train.answers": 2, "rewards": VOWELS}),
    Variant("greedy", "grpo", {"advantage": {"name": "remax"}, "train.answers": 2, "train.micro_batch": "auto"}),
    Variant(
        "baseline", "grpo", {**REINFORCE, "advantage.decay": 0.5, "test_rewards": LENGTH, "scores.normalise": "running"}
    ),
    Variant("opponent", "grpo", {**REINFORCE, "opponent": {"mixture": 0.5}, "ema": {"decay": 0.9}}),
    Variant("steps", "grpo", {"advantage": {"name": "process_grpo"}, "rewards": OWN}),
]
DPO = [
    Variant("whole", "dpo"),
    Variant("adapter", "dpo", LORA),
    Variant("coupled answers", "dpo", {"loss": {"name": "bco"}, **SELDOM}),
    Variant("coupled pairs", "dpo", {"loss": {"name": "beta_dpo"}}),
    Variant("mismatched answers", "dpo", {"loss": {"name": "kto"}}),
    Variant("with a critic", "dpo", {**SCORED, "loss": {"name": "dro_v"}}),
    Variant("whole reference", "dpo", {"loss": {"name": "tdpo2"}, **LORA}),
    Variant("lists", "dpo", {**LISTS, "loss": {"name": "pl_dpo"}}),
]
LABEL = [
    Variant("scored", "label"),
    Variant("judged by itself", "label", {"judge": RUBRIC, "rewards": []}),
    Variant("judged", "label", {"judge": BY_JUDGE, "rewards": []}),
]
MERGE = [Variant("two", "merge", {"method": {"name": "dare", "seed": 3}}, NEEDED_TO_MERGE)]

VARIANTS: dict[str, list[Variant]] = {
    "sft": SFT,
    "rm": RM,
    "ppo": PPO,
    "grpo": GRPO,
    "dpo": DPO,
    "label": LABEL,
    "merge": MERGE,
}
BY_FOLDER = {variant.folder: variant for variants in VARIANTS.values() for variant in variants}
