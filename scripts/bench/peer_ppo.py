"""PPO of TRL, which left TRL's main trainers and then TRL itself: 1.10 is a version that still has it.

Its `train()` is one loop without a step of its own. At the end of every step it lets the other sides have the thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from scripts.bench.cases import NEW_TOKENS, RATE, Case
from scripts.bench.measure import Work
from scripts.bench.one_thread import OneThread
from scripts.bench.ours import Ours
from scripts.bench.peer import policy_model


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Prompts in the order of our steps, whatever index is asked for: the trainer shuffles, the rows must not."""

    def __init__(self, ours: Ours, steps: int) -> None:
        self._size = steps * ours.case.rows
        self._prompts = self._endless(ours)

    @staticmethod
    def _endless(ours: Ours) -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            yield from ({"input_ids": ours.data.train[row].ids.tolist()} for row in ours.rows(number))
            number += 1

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, Any]:
        return next(self._prompts)


class StepGate(TrainerCallback):
    """Pauses the trainer at the end of a step."""

    def __init__(self, thread: OneThread) -> None:
        self.thread, self.is_done = thread, threading.Event()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.is_done.set()
        self.thread.serve()


class PPOPeer:
    """The trainer, a step at a time. It is made in the thread that it works in, and called from another one."""

    def __init__(
        self,
        case: Case,
        ours: Ours,
        policy: Path,
        scorer: Path,
        options: dict[str, Any],
        steps: int,
        thread: OneThread,
    ) -> None:
        from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # an option of the command says where it is

        self.ours, self.thread, self.gate = ours, thread, StepGate(thread)
        self.training: Future[Any] | None = None
        self.marks: dict[str, float] = {}
        self.tokens = 0
        ours.tokenizer.padding_side = "left"
        trained, critic = policy_model(policy), self._scorer(scorer)
        args = PPOConfig(
            **options,
            response_length=NEW_TOKENS,
            total_episodes=(steps + 2) * case.rows,
            num_ppo_epochs=1,
            num_mini_batches=1,
            local_rollout_forward_batch_size=case.rows,
            num_sample_generations=0,
            stop_token="eos",
            temperature=1.0,
            kl_coef=0.05,
        )
        parameters = [*trained.parameters(), *critic.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
        self.trainer = PPOTrainer(
            args,
            ours.tokenizer,
            trained,
            policy_model(policy),
            self._scorer(scorer),
            Rows(ours, steps + 4),
            critic,
            optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
            callbacks=[self.gate],
        )
        self._watch(ppo_trainer)

    @staticmethod
    def _scorer(folder: Path) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)

    def _watch(self, module: Any) -> None:
        """Clocks around the trainer's sampling and before its update, and a count of the tokens of its answers."""
        sample, cut, whiten = module.batch_generation, module.truncate_response, module.masked_whiten

        def sampled(*args: Any) -> Any:
            started = time.perf_counter()
            found = sample(*args)
            self.marks["generate"] = time.perf_counter() - started
            return found

        def counted(stop: int, pad: int, responses: Any) -> Any:
            found = cut(stop, pad, responses)
            self.tokens = int((found != pad).sum())
            return found

        def marked(*args: Any, **options: Any) -> Any:  # the last thing before the update
            self.marks["ready"] = time.perf_counter()
            return whiten(*args, **options)

        module.batch_generation, module.truncate_response, module.masked_whiten = sampled, counted, marked

    def __call__(self, number: int) -> Work:
        started = time.perf_counter()
        self.gate.is_done.clear()
        if self.training is None:
            self.training = self.thread.begin(self.trainer.train)
            self.training.add_done_callback(lambda _: self.gate.is_done.set())
        else:
            self.thread.go_on()
        self.gate.is_done.wait()
        if self.training.done():
            self.training.result()  # raises what ended it
        ended = time.perf_counter()
        prompts = sum(len(self.ours.data.train[row].ids) for row in self.ours.rows(number))
        generate, ready = self.marks["generate"], self.marks["ready"]
        seconds = {"generate": generate, "score": ready - started - generate, "train": ended - ready}
        tokens = prompts + self.tokens
        return Work(tokens, self.ours.useful(number, tokens), None, seconds)
