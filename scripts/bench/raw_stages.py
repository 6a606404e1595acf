"""Steps of the stages in plain torch loops: what our real stages are held against. No engine, no checks, no metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.engine import dist
from rlhf.rewards.base import RULES
from rlhf.train.objectives import bind
from scripts.bench import raw_losses
from scripts.bench.cases import NEW_TOKENS, RATE, Case
from scripts.bench.measure import Work
from scripts.bench.ours import Ours
from scripts.bench.raw_generate import Sampled, generate
from scripts.bench.raw_losses import Pair
from scripts.bench.raw_model import Flat, RawLlama

BETA, CLIP, VALUE_CLIP = 0.1, (0.2, 0.2), 0.2
GRPO_KL, PPO_KL, LAM = 0.04, 0.05, 0.95


def raw_policy(folder: Path) -> RawLlama:
    """The policy's weights, copied to the device."""
    return RawLlama(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(dist.device()))


def raw_scorer(folder: Path) -> RawLlama:
    """The reward model's."""
    return RawLlama(AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).to(dist.device()))


def token_pair(example: Any) -> tuple[list[int], list[int]]:
    """(prompt, answer) of a supervised row; the answer is everything from the first supervised token on."""
    first = max(1, int(example.mask.argmax()))
    return example.ids[:first].tolist(), example.ids[first:].tolist()


def answer_pair(example: Any) -> Pair:
    """(prompt, chosen, rejected) of a pair."""
    return example.prompt_ids.tolist(), example.chosen_ids.tolist(), example.rejected_ids.tolist()


def reference_sums(ours: Ours, policy: Path, numbers: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Row -> the reference's summed log-probs of its two answers, for the rows of these steps."""
    model, found = raw_policy(policy), dict[int, tuple[float, float]]()
    with torch.no_grad(), dist.device():
        for number in numbers:
            rows = ours.rows(number)
            sums = raw_losses.pair_sums(model, [answer_pair(ours.data.train[row]) for row in rows])
            found |= {row: (float(a), float(b)) for row, (a, b) in zip(rows, sums, strict=True)}
    return found


class _Update:
    """AdamW on the weights of one raw model, with the settings that our recipes have."""

    def __init__(self, model: RawLlama) -> None:
        self.parameters = model.train().parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def __call__(self, loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def raw_side(
    case: Case, ours: Ours, policy: Path, scorer: Path, refs: dict[int, Any], dtype: str
) -> Callable[[int], Work]:
    """The step of a case: all tensors on the device, in bf16 by autocast."""
    device, step = dist.device(), _step(case, ours, policy, scorer, refs)
    where = device if device.type == "cuda" else nullcontext()  # the CPU is the default, and saying so costs time

    def placed(number: int) -> Work:
        with where, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            return step(number)

    return placed


def _step(case: Case, ours: Ours, policy: Path, scorer: Path, refs: dict[int, Any]) -> Callable[[int], Work]:
    if case.sampling:
        model = raw_policy(policy)
        return lambda number: ours.sampled(number, sum(map(len, _sampled(ours, model, number).answers)))
    if case.is_online:
        return RawOnline(case, ours, policy, scorer)
    model = raw_scorer(scorer) if case.stage == "rm" else raw_policy(policy)
    update = _Update(model)

    def step(number: int) -> Work:
        rows = ours.rows(number)
        examples = [ours.data.train[row] for row in rows]
        started = time.perf_counter()
        if case.stage == "sft":
            loss = raw_losses.sft_loss(model, [token_pair(example) for example in examples])
        elif case.stage == "rm":
            loss = raw_losses.reward_loss(model, [answer_pair(example) for example in examples])
        else:
            ref = torch.tensor([refs[row] for row in rows])
            loss = raw_losses.dpo_loss(model, [answer_pair(example) for example in examples], ref, BETA)
        update(loss)
        tokens = sum(example.lengths()[0] for example in examples)
        seconds = {"train": time.perf_counter() - started}
        return Work(tokens, ours.useful(number, tokens), float(loss.detach()), seconds)

    return step


def _sampled(ours: Ours, model: RawLlama, number: int) -> Sampled:
    prompts = [ours.data.train[row].ids.tolist() for row in ours.rows(number)]
    return generate(model, prompts, ours.case.answers, NEW_TOKENS, ours.parts.stop_ids, number)


class RawOnline:
    """A step of GRPO or PPO."""

    def __init__(self, case: Case, ours: Ours, policy: Path, scorer: Path) -> None:
        self.case, self.ours = case, ours
        self.policy, self.reference = raw_policy(policy), raw_policy(policy)
        self.update = _Update(self.policy)
        if case.stage == "ppo":
            self.reward, self.critic = raw_scorer(scorer), raw_scorer(scorer)
            self.update_critic = _Update(self.critic)
        else:
            self.rule = bind(RULES, ours.job.recipe.rewards[0])

    def __call__(self, number: int) -> Work:
        started = time.perf_counter()
        sampled = _sampled(self.ours, self.policy, number)
        between = time.perf_counter()
        examples = [self.ours.data.train[row] for row in self.ours.rows(number)]
        groups = [
            (example.ids.tolist(), sampled.answers[i * self.case.answers : (i + 1) * self.case.answers])
            for i, example in enumerate(examples)
        ]
        learn = self._grpo if self.case.stage == "grpo" else self._ppo
        loss, ready = learn(examples, groups, sampled)
        ended = time.perf_counter()
        seconds = {"generate": between - started, "score": ready - between, "train": ended - ready}
        tokens = sum(len(prompt) * len(answers) + sum(map(len, answers)) for prompt, answers in groups)
        return Work(tokens, self.ours.useful(number, tokens), loss, seconds)

    def _grpo(self, examples: list[Any], groups: list[Any], sampled: Sampled) -> tuple[float, float]:
        decode = self.ours.tokenizer.decode
        texts = [decode(answer, skip_special_tokens=True) for answer in sampled.answers]
        rows = [{**e.fields, "row": e.row} for e in examples for _ in range(self.case.answers)]
        advantages = raw_losses.group_advantages(torch.tensor(self.rule(rows, texts)), self.case.answers)
        flat = Flat.of(groups)
        with torch.no_grad():
            ref = self.reference.logprobs(flat)
        ready = time.perf_counter()
        loss = raw_losses.grpo_loss(self.policy, flat, advantages, ref, kl_coef=GRPO_KL, clip=CLIP)
        self.update(loss)
        return float(loss.detach()), ready

    def _ppo(self, examples: list[Any], groups: list[Any], sampled: Sampled) -> tuple[float, float]:
        flat = Flat.whole((prompt, answer) for prompt, answers in groups for answer in answers)
        old = torch.cat(sampled.logprobs)
        with torch.no_grad():
            ref, values = self.reference.logprobs(flat), self.critic.values(flat)
            rewards = -PPO_KL * (old - ref)
            last = torch.bincount(flat.rows).cumsum(0) - 1  # of every answer, among the predicted tokens
            rewards[last] += self.reward.scores(flat)
            advantages, returns = raw_losses.gae_by_row(rewards, values, flat, LAM)
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        ready = time.perf_counter()
        loss = raw_losses.surrogate(self.policy.logprobs(flat), old, advantages, CLIP).mean()
        self.update(loss)
        self.update_critic(raw_losses.value_loss(self.critic, flat, values, returns, VALUE_CLIP))
        return float(loss.detach()), ready
