"""A stage put together, and the small pieces that every kind of stage is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf.batch import Rows
from rlhf.data import chat
from rlhf.data.examples import PromptExample
from rlhf.engine.ema import Ema
from rlhf.engine.engine import Engine
from rlhf.models.statistics import ScoreStatistics
from rlhf.models.tokenizer import decoder
from rlhf.recipe.explain import offline_steps
from rlhf.recipe.schema import SamplingBlock
from rlhf.recipe.stages import PreferenceRecipe, RewardRecipe, SFTRecipe
from rlhf.rewards.scorer import Scorer
from rlhf.train.checkpoints import Remembered, Running
from rlhf.train.loop import Collector
from rlhf.train.objectives import Objective
from rlhf.train.pool import Budget
from rlhf.train.rollout import Sampler
from rlhf.train.skips import Skips
from rlhf.train.standing import Standing
from rlhf.train.supervised import Dataset


@dataclass
class Parts:
    """A stage put together: what the loop, the checkpoints and the publication need."""

    engines: dict[str, Engine]
    objectives: list[Objective]
    collector: Collector
    steps: int
    budget: Budget
    key_metric: str
    published: dict[str, tuple[Engine, str]]
    updates_per_step: int = 1
    held_out: Dataset | None = None
    prompts: list[PromptExample] = field(default_factory=list)
    sampling: SamplingBlock | None = None
    scorer: Scorer | None = None
    stop_ids: list[int] = field(default_factory=list)
    statistics: Callable[[], ScoreStatistics] | None = None  # of a reward model's scores, once it is trained
    state: Remembered | None = None
    averages: dict[str, Ema] = field(default_factory=dict)  # by the part they are published as
    policy_starts: int = 0
    target_kl: float | None = None
    measures_move: bool = False
    skips: Skips | None = None
    completed: Callable[[dict[str, float]], dict[str, float]] | None = None  # adds to what held-out rows gave
    standing: Standing = field(default_factory=Standing)

    def running(self) -> Running:
        """What a checkpoint holds."""
        return Running(self.engines, dict(self.averages), self.state, self.budget, self.standing, self.skips)


def sampler(
    engine: Engine, tokenizer: PreTrainedTokenizerFast, sampling: SamplingBlock, poll: Callable[[], None]
) -> Sampler:
    """How answers end and how they are read: every end token that model, tokenizer, template or recipe names."""
    stop_ids = chat.stop_token_ids(tokenizer, generation_config(engine), extra=sampling.stop)
    return Sampler(stop_ids, tokenizer.pad_token_id, decoder(tokenizer), poll)


def generation_config(engine: Engine) -> Any:
    """The model's own; None where it generates nothing."""
    core = engine.module.core
    return core.generation_config if core.can_generate() else None


def dataset(examples: Sequence[Any], join: Callable[[list[Any], int], Rows], pad_id: int) -> Dataset:
    """Examples of one kind as rows; `join` collates them."""
    lengths, costs = [e.lengths()[0] for e in examples], [e.cost() for e in examples]
    return Dataset(lengths, costs, lambda rows: join([examples[i] for i in rows], pad_id), [e.row for e in examples])


def steps(recipe: SFTRecipe | RewardRecipe | PreferenceRecipe, train: Dataset) -> int:
    """Optimizer steps of an offline stage."""
    return offline_steps(recipe.train, len(train))
