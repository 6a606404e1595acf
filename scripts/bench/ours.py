"""Our side: the real stage. Recipe, checks, data, engine, collector, objectives and loop are those of `rlhf STAGE`."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rlhf.batch import Rollout
from rlhf.cli.prepare import prepare
from rlhf.data import order
from rlhf.engine import dist
from rlhf.recipe.document import to_yaml
from rlhf.run.rundir import RunDir
from rlhf.train import loop, stages, worker
from rlhf.train.checkpoints import Checkpoints
from rlhf.train.job import data_kind
from rlhf.train.progress import Progress
from rlhf.train.tokenizers import find_tokenizer
from scripts.bench import flops
from scripts.bench.cases import Case
from scripts.bench.measure import Work

_LOSSES = {  # stage -> metric
    "sft": "train/loss",
    "rm": "train/loss",
    "dpo": "train/loss_dpo",
    "grpo": "policy/loss",
    "ppo": "policy/loss",
}


class Ours:
    """A stage, put together once; `step` is one step of its loop."""

    def __init__(self, case: Case, recipe: dict[str, Any], folder: Path) -> None:
        self.case = case
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{case.stage}-rank{dist.rank()}.yaml"
        path.write_text(to_yaml(recipe), encoding="utf-8")
        world = dist.world_size()
        self.job = prepare(case.stage, path, RunDir(folder), overrides=[], world_size=world, allowed_code=[])[0]
        kind = data_kind(self.job.recipe)
        self.tokenizer = find_tokenizer(self.job, kind)
        self.data = worker.load_data(self.job, self.tokenizer, kind)
        self.parts = stages.assemble(self.job, self.tokenizer, self.data)
        self.engine = next(iter(self.parts.engines.values()))
        self.shape = flops.Shape.of(self.engine.module.core.config)
        self.adapters = self.engine.num_elements()[0] if case.lora else None
        self._rewarding = 0.0
        if case.is_online:
            scorer = _Timed(self.parts.collector.scorer, self._rewarded)
            self.parts.collector = replace(self.parts.collector, scorer=scorer)  # type: ignore[type-var]
        progress = Progress(case.name, self.parts.steps, 0, Console(file=io.StringIO()))
        unused = Checkpoints(self.job.folder, self.parts.running(), 1)
        self.stage = stages.to_stage(self.job, self.parts, self.tokenizer, progress, unused, report=lambda *_: None)

    def _rewarded(self, seconds: float) -> None:
        self._rewarding += seconds

    def rows(self, step: int) -> list[int]:
        """The rows of a step: the same for every side."""
        train = self.job.recipe.train
        size = train.prompts if self.case.is_online else train.batch_size
        return order.rows(len(self.data.train), size, step, train.seed)

    def step(self, number: int) -> Work:
        """Collect a batch and learn from it."""
        self._rewarding = 0.0
        started = time.perf_counter()
        collected = self.stage.collector.collect(number)
        ready = time.perf_counter()
        metrics = {**loop.update(self.stage, number, collected), **collected.metrics}
        self.stage.collector.learned(number, metrics)
        ended = time.perf_counter()
        seconds = {"train": ended - started}
        if self.case.is_online:
            sampling = metrics["speed/rollout_seconds"] - self._rewarding
            seconds = {"generate": sampling, "score": ready - started - sampling, "train": ended - ready}
        loss = metrics[_LOSSES[self.case.stage]]
        return Work(collected.tokens, self.useful(number, collected.tokens), loss, seconds)

    def sample(self, number: int) -> Work:
        """Only sample the answers of a step."""
        rollout: Rollout = self.parts.collector.sample(number, 0, "policy")  # type: ignore[attr-defined]
        return self.sampled(number, int(rollout.response_mask.sum()))

    def sampled(self, number: int, answer_tokens: int) -> Work:
        """The work of sampling so many tokens to the prompts of a step."""
        prompts = [len(self.data.train[row].ids) for row in self.rows(number)]
        return Work(answer_tokens, flops.decoding(self.shape, prompts, self.case.answers, answer_tokens))

    def useful(self, number: int, tokens: int) -> float:
        """Useful operations of a step whose batch had so many real tokens."""
        examples = [self.data.train[row] for row in self.rows(number)]
        if self.case.is_online:
            return online_flops(self.case, self.shape, [len(e.ids) for e in examples], tokens, self.adapters)
        if self.case.stage == "sft":
            lengths = [len(e.ids) for e in examples]
        else:
            lengths = [len(e.prompt_ids) + len(a) for e in examples for a in (e.chosen_ids, e.rejected_ids)]
        head = 0 if self.case.stage == "rm" else sum(example.lengths()[1] for example in examples)
        return flops.training(self.shape, lengths, head, self.adapters)


def online_flops(case: Case, shape: flops.Shape, prompts: list[int], tokens: int, adapters: int | None) -> float:
    """Useful operations of a rollout and one update on it; answers are taken as equally long.

    tokens: of prompts and answers, a prompt counted for each of its answers. Useful are the sampling, the reference,
    the update, and for PPO the reward model, the critic's values and its update.
    """
    answer_tokens = tokens - case.answers * sum(prompts)
    each = answer_tokens / (len(prompts) * case.answers)
    lengths = [prompt + each for prompt in prompts for _ in range(case.answers)]
    total = flops.decoding(shape, prompts, case.answers, answer_tokens)
    total += flops.forward(shape, lengths, answer_tokens) + flops.training(shape, lengths, answer_tokens, adapters)
    if case.stage == "ppo":
        total += 2 * flops.forward(shape, lengths, 0) + flops.training(shape, lengths, 0, adapters)
    return total


class _Timed:
    """A scorer that says how long it took."""

    def __init__(self, scorer: Any, took: Callable[[float], None]) -> None:
        self._scorer, self._took = scorer, took

    def __call__(self, rollout: Rollout) -> Any:
        started = time.perf_counter()
        found = self._scorer(rollout)
        self._took(time.perf_counter() - started)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scorer, name)
