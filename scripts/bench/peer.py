"""TRL's side: its trainer's own `training_step` with clipping and AdamW, on the rows, tokens and weights of ours.

Gradient checkpointing and bf16 autocast, which are on by default, are off, as they are with us: this is TRL tuned.
Rows are handed over as tokens. What belongs to `Trainer.train` around a step (logging, callbacks) is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.rewards.base import RULES
from rlhf.train.objectives import bind
from scripts.bench.cases import LORA, NEW_TOKENS, RATE, Case
from scripts.bench.measure import Work
from scripts.bench.ours import Ours
from scripts.bench.raw_stages import answer_pair, token_pair


def adapters(case: Case) -> LoraConfig | None:
    """The same adapters as ours."""
    if not case.lora:
        return None
    return LoraConfig(r=int(LORA["rank"]), lora_alpha=int(LORA["alpha"]), target_modules="all-linear", lora_dropout=0.0)


def policy_model(folder: Path) -> Any:
    """The policy."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


class Peer:
    """A trainer of TRL, driven step by step."""

    def __init__(self, case: Case, ours: Ours, trainer: Any) -> None:
        self.case, self.ours, self.trainer = case, ours, trainer
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, optimizer)
        assert not isinstance(self.model, DistributedDataParallel), "there is one rank"
        trainer.model_wrapped = self.model
        trainer.current_gradient_accumulation_steps = 1

    def learn(self, inputs: Any) -> float:
        """One optimizer step; returns the loss."""
        self.trainer.model.train()
        loss = self.trainer.training_step(self.model, inputs, None)
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.model.zero_grad()
        return float(loss)


class OfflinePeer(Peer):
    """SFT, reward model, DPO. features: what TRL's collator is given for a row."""

    def __init__(self, case: Case, ours: Ours, trainer: Any, features: Callable[[int], dict[str, Any]]) -> None:
        super().__init__(case, ours, trainer)
        self.features = features

    def __call__(self, number: int) -> Work:
        rows = self.ours.rows(number)
        started = time.perf_counter()
        loss = self.learn(self.trainer.data_collator([self.features(row) for row in rows]))
        seconds = {"train": time.perf_counter() - started}
        tokens = sum(self.ours.data.train[row].lengths()[0] for row in rows)
        return Work(tokens, self.ours.useful(number, tokens), loss, seconds)


def sft(case: Case, ours: Ours, policy: Path, options: dict[str, Any]) -> Peer:
    """SFTTrainer on prompt-completion rows."""
    from trl import SFTConfig, SFTTrainer  # an option of the command says where it is

    def features(row: int) -> dict[str, Any]:
        prompt, answer = token_pair(ours.data.train[row])
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    trainer = SFTTrainer(
        policy_model(policy),
        SFTConfig(**options, max_length=None),
        train_dataset=Dataset.from_list([features(row) for row in range(4)]),
        processing_class=ours.tokenizer,
        peft_config=adapters(case),
    )
    return OfflinePeer(case, ours, trainer, features)


def rm(case: Case, ours: Ours, scorer: Path, options: dict[str, Any]) -> Peer:
    """RewardTrainer."""
    from trl import RewardConfig, RewardTrainer

    def features(row: int) -> dict[str, Any]:
        prompt, chosen, rejected = answer_pair(ours.data.train[row])
        return {"chosen_ids": [*prompt, *chosen], "rejected_ids": [*prompt, *rejected]}

    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(scorer, dtype=torch.float32),
        RewardConfig(**options, max_length=None, disable_dropout=True),
        train_dataset=Dataset.from_list([features(row) for row in range(4)]),
        processing_class=ours.tokenizer,
        peft_config=adapters(case),
    )
    return OfflinePeer(case, ours, trainer, features)


def dpo(case: Case, ours: Ours, policy: Path, options: dict[str, Any], refs: dict[int, tuple[float, float]]) -> Peer:
    """DPOTrainer. Its reference is cached like ours, or is asked in every step where the case says `live`."""
    from trl import DPOConfig, DPOTrainer

    def features(row: int) -> dict[str, Any]:
        prompt, chosen, rejected = answer_pair(ours.data.train[row])
        found = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        return found if case.live else found | {"ref_chosen_logps": refs[row][0], "ref_rejected_logps": refs[row][1]}

    stand_in = {"prompt": "a", "chosen": " b", "rejected": " c"}  # the trainer must be given text; it is not used
    trainer = DPOTrainer(
        policy_model(policy),
        args=DPOConfig(**options, max_length=None, beta=0.1),
        train_dataset=Dataset.from_list([stand_in] * 4),
        processing_class=ours.tokenizer,
        peft_config=adapters(case),
    )
    if not case.live:
        trainer.ref_model, trainer.precompute_ref_logps = None, True
    return OfflinePeer(case, ours, trainer, features)


class GroupPeer(Peer):
    """GRPO: sampling, rewards, reference and update are those of the trainer."""

    def __init__(self, case: Case, ours: Ours, trainer: Any) -> None:
        super().__init__(case, ours, trainer)
        self.prompt_ids: dict[str, list[int]] = {}
        self.seconds, self.tokens = {"generate": 0.0, "score": 0.0}, 0
        trainer._tokenize_prompts = lambda prompts: ([self.prompt_ids[text] for text in prompts], None, {})
        self._sample, self._prepare = trainer._generate_single_turn, trainer._generate_and_score_completions
        trainer._generate_single_turn, trainer._generate_and_score_completions = self.sample, self.prepare

    def sample(self, prompt_ids: list[list[int]], *rest: Any, **options: Any) -> Any:
        """The trainer's own, with a clock, counting what was sampled."""
        started = time.perf_counter()
        found = self._sample(prompt_ids, *rest, **options)
        self.seconds["generate"] = time.perf_counter() - started
        self.tokens = sum(map(len, found[0]))
        return found

    def prepare(self, inputs: Any) -> Any:
        """The trainer's own, with a clock."""
        started = time.perf_counter()
        found = self._prepare(inputs)
        self.seconds["score"] = time.perf_counter() - started - self.seconds["generate"]
        return found

    def inputs(self, number: int) -> list[dict[str, Any]]:
        """The prompts of a step, each repeated for its group."""
        rows = self.ours.rows(number)
        self.prompt_ids |= {str(row): self.ours.data.train[row].ids.tolist() for row in rows}
        return [{"prompt": str(row), "number": row} for row in rows for _ in range(self.case.answers)]

    def __call__(self, number: int) -> Work:
        inputs = self.inputs(number)
        prompts = sum(len(self.prompt_ids[each["prompt"]]) for each in inputs)
        if self.case.sampling:
            self.trainer.model.train()
            self.sample([self.prompt_ids[each["prompt"]] for each in inputs], None, {}, self.case.answers)
            return self.ours.sampled(number, self.tokens)
        started = time.perf_counter()
        loss = self.learn(inputs)
        whole = time.perf_counter() - started
        seconds = {**self.seconds, "train": whole - sum(self.seconds.values())}
        tokens = prompts + self.tokens
        return Work(tokens, self.ours.useful(number, tokens), loss, seconds)


def grpo(case: Case, ours: Ours, policy: Path, options: dict[str, Any]) -> Peer:
    """GRPOTrainer with the same reward, KL coefficient and averaging as ours."""
    from trl import GRPOConfig, GRPOTrainer

    rule = bind(RULES, ours.job.recipe.rewards[0])

    def reward(prompts: list[str], completions: list[str], number: list[int], **_: Any) -> list[float]:
        examples = [ours.data.train[i] for i in number]
        found: list[float] = rule([{**e.fields, "row": e.row} for e in examples], completions)
        return found

    args = GRPOConfig(
        **options,
        num_generations=case.answers,
        max_completion_length=NEW_TOKENS,
        beta=0.04,
        loss_type="grpo",
        temperature=1.0,
    )
    trainer = GRPOTrainer(
        policy_model(policy),
        reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "0", "number": 0}] * max(8, case.rows)),
        processing_class=ours.tokenizer,
        peft_config=adapters(case),
    )
    return GroupPeer(case, ours, trainer)
