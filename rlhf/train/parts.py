"""A stage put together, and the small pieces that every kind of stage is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerFast

from rlhf.data import chat, collate
from rlhf.data.examples import ListExample, PairExample, PromptExample, TokenExample
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
from rlhf.train.rollout import Sampler
from rlhf.train.supervised import Dataset


@dataclass
class Parts:
    """A stage put together: what the loop, the checkpoints and the publication need."""

    engines: dict[str, Engine]
    objectives: list[Objective]
    collector: Collector
    steps: int
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
    completed: Callable[[dict[str, float]], dict[str, float]] | None = None  # adds to what held-out rows gave

    def running(self) -> Running:
        """What a checkpoint holds."""
        return Running(self.engines, dict(self.averages), self.state)


def sampler(engine: Engine, tokenizer: PreTrainedTokenizerFast, sampling: SamplingBlock) -> Sampler:
    """How answers end and how they are read: every end token that model, tokenizer, template or recipe names."""
    stop_ids = chat.stop_token_ids(tokenizer, generation_config(engine), extra=sampling.stop)
    return Sampler(stop_ids, tokenizer.pad_token_id, decoder(tokenizer))


def generation_config(engine: Engine) -> Any:
    core = engine.module.core
    return core.generation_config if core.can_generate() else None


def token_dataset(examples: list[TokenExample], pad_id: int) -> Dataset:
    """Rows for SFT."""
    return Dataset([len(e.ids) for e in examples], lambda rows: collate.tokens([examples[i] for i in rows], pad_id))


def pair_dataset(examples: list[PairExample], pad_id: int) -> Dataset:
    """Rows for pairwise losses; a pair costs both of its sides."""
    lengths = [2 * len(e.prompt_ids) + len(e.chosen_ids) + len(e.rejected_ids) for e in examples]
    return Dataset(lengths, lambda rows: collate.pairs([examples[i] for i in rows], pad_id))


def list_dataset(examples: list[ListExample], pad_id: int) -> Dataset:
    """Rows for listwise losses; a list costs its prompt with every answer."""
    lengths = [sum(len(e.prompt_ids) + len(ids) for ids, _ in e.answers) for e in examples]
    return Dataset(lengths, lambda rows: collate.lists([examples[i] for i in rows], pad_id))


def steps(recipe: SFTRecipe | RewardRecipe | PreferenceRecipe, train: Dataset) -> int:
    return offline_steps(recipe.train, len(train))
