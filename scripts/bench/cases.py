"""What is measured: a case is a stage with a model and a batch. Its recipe is an ordinary one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rlhf.recipe.schema import SamplingBlock, TrainBlock
from scripts.bench.material import Sources

NEW_TOKENS = 128
LORA = {"rank": 16, "alpha": 32.0}
RATE = 1e-6  # small: the models stay what they are, so every round is alike


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    stage: str  # sft, rm, dpo, grpo, ppo
    model: str = "small"
    rows: int = 16  # rows, pairs or answers per step
    answers: int = 1  # per prompt
    lora: bool = False
    live: bool = False  # dpo: the peer asks its reference in every step, as it does by default
    sampling: bool = False  # only the answers are sampled
    decode: str | None = None  # type that answers are sampled in, where it is not the model's
    tokens: int | None = None  # sft: rows of exactly this length
    ranks: int = 1
    series: str = ""  # which growth curve it is a point of; such cases are ours alone

    @property
    def name(self) -> str:
        """Words that tell it from all others."""
        words = ["generation" if self.sampling else self.stage, self.model]
        words += ["lora"] * self.lora + ["live"] * self.live
        words += [f"decode-{self.decode}"] if self.decode else []
        words += [f"by-{self.series}", f"{self.rows}x{self.tokens or self.answers}"] if self.series else []
        words += [f"ranks-{self.ranks}"] if self.ranks > 1 else []
        return " ".join(words)

    @property
    def is_online(self) -> bool:
        """Whether it samples."""
        return self.stage in ("grpo", "ppo")

    @property
    def is_compared(self) -> bool:
        """Whether other sides take part."""
        return not self.series and self.ranks == 1

    @property
    def text(self) -> str:
        """For a reader of the table."""
        what = {"sft": "rows", "rm": "pairs", "dpo": "pairs", "grpo": "answers", "ppo": "answers"}[self.stage]
        notes = [f"{self.rows} {what}"]
        notes += [f"G = {self.answers}"] if self.answers > 1 else []
        notes += [f"{self.tokens} tokens each"] if self.tokens else []
        notes += ["LoRA"] if self.lora else []
        notes += ["reference cached, live in TRL" if self.live else "reference cached"] if self.stage == "dpo" else []
        notes += [f"sampled in {self.decode}"] if self.decode else []
        notes += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        label = "generation" if self.sampling else self.stage.upper()
        return f"{label}, {self.model}: {', '.join(notes)}"


def all_cases() -> list[Case]:
    """Every case, in the order of the page."""
    compared = [
        Case("sft"),
        Case("sft", "wide", rows=8),
        Case("sft", lora=True),
        Case("rm", rows=8),
        Case("dpo", rows=8),
        Case("dpo", rows=8, live=True),
        Case("dpo", "wide", rows=4),
        Case("dpo", rows=8, lora=True),
        Case("grpo", rows=32, answers=8),
        *_decoding(Case("grpo", rows=32, answers=8)),
        Case("grpo", "wide", rows=16, answers=8),
        Case("grpo", rows=32, answers=8, lora=True),
        Case("ppo"),
        Case("grpo", rows=32, answers=8, sampling=True),
        *_decoding(Case("grpo", rows=32, answers=8, sampling=True)),
        Case("grpo", "wide", rows=16, answers=8, sampling=True),
    ]
    first = (Case("sft"), Case("dpo", rows=8), Case("grpo", rows=32, answers=8), Case("ppo"))
    ranks = [replace(case, ranks=2) for case in first]
    return [*compared, *ranks, *_growing()]


def _decoding(case: Case) -> list[Case]:
    """The same with answers sampled in bf16, where the recipe has a key for that."""
    return [replace(case, decode="bf16")] if "decode_dtype" in SamplingBlock.model_fields else []


def _growing() -> Iterator[Case]:
    for tokens in (64, 128, 256, 512, 1024):
        yield Case("sft", rows=8, tokens=tokens, series="length")
    for rows in (4, 8, 16, 32, 64):
        yield Case("sft", rows=rows, tokens=128, series="batch")
    for answers in (2, 4, 8, 16):
        yield Case("grpo", rows=4 * answers, answers=answers, series="group")


def chosen(names: list[str]) -> list[Case]:
    """The cases of stages (sft, rm, dpo, grpo, ppo), of generation, lora, ranks, growth, or all."""
    tests = {
        "all": lambda case: True,
        "generation": lambda case: case.sampling,
        "lora": lambda case: case.lora,
        "ranks": lambda case: case.ranks > 1,
        "growth": lambda case: bool(case.series),
        **{s: lambda case, s=s: case.stage == s and case.is_compared and not case.sampling for s in STAGES},
    }
    return [case for case in all_cases() if any(tests[name](case) for name in names)]


STAGES = ("sft", "rm", "dpo", "grpo", "ppo")
SUBJECTS = (*STAGES, "generation", "lora", "ranks", "growth", "all")


def recipe_of(case: Case, sources: Sources, policy: str, scorer: str, steps: int, dtype: str) -> dict[str, Any]:
    """The recipe of the stage, whose data is what `Sources` says. steps: how many will be measured, at most."""
    model: dict[str, Any] = {"path": policy, "chat_template": "plain", "dtype": dtype}
    zero = {"stage": 0 if dtype == "fp32" else 1}
    if case.lora:
        model["lora"] = LORA
    train: dict[str, Any] = {"lr": RATE, "schedule": "constant", "warmup": 0.0}
    recipe: dict[str, Any] = {"model": model, "train": train, "zero": zero}
    prompts = case.rows // case.answers
    if "micro_tokens" not in TrainBlock.model_fields:
        train["micro_batch"] = case.rows
    if case.is_online:
        recipe["data"] = {**sources.prompts(), "max_length": 512 + NEW_TOKENS}
        recipe["sampling"] = {"max_new_tokens": NEW_TOKENS}
        if case.decode:
            recipe["sampling"]["decode_dtype"] = case.decode
        train |= {"rollouts": steps, "prompts": prompts, "answers": case.answers, "rollout_batch": case.rows}
        train |= {"inner_epochs": 1, "minibatches": 1}
        recipe["rewards"] = [sources.rule()]
    else:
        recipe["data"] = {**(sources.sft() if case.stage == "sft" else sources.pairs()), "max_length": 512}
        train |= {"steps": steps, "batch_size": case.rows}
    if case.tokens:
        recipe["data"] = {"max_length": case.tokens, "on_long": "truncate_answer"}  # the file is named by the caller
    if case.stage == "rm":
        model["path"] = scorer
    if case.stage == "ppo":
        recipe["rewards"] = [{"kind": "model", "path": scorer, "dtype": dtype}]
        recipe["critic"] = {"path": scorer, "zero": zero, "lr": RATE, "schedule": "constant", "warmup": 0.0}
    # Half again as many rows as are needed: those that are too long are left out.
    recipe["data"]["limit"] = int(1.5 * (prompts if case.is_online else case.rows) * (steps + 1)) + 16
    return recipe
