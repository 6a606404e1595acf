"""What the command line hands to the ranks. No torch: it is made before anything heavy is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.pulse import RANK_TIMEOUT_S
from rlhf.recipe.merge_rules import merged_models
from rlhf.recipe.reward_options import ModelReward
from rlhf.recipe.reward_rules import named_rewards
from rlhf.recipe.schema import DataBlock, ModelRef, SourceBlock
from rlhf.recipe.stages import (
    AnyRecipe,
    LabelRecipe,
    MergeRecipe,
    OnlineRecipe,
    PPORecipe,
    PreferenceRecipe,
    Recipe,
    RewardRecipe,
    ScoringRecipe,
    SFTRecipe,
    data_blocks,
)
from rlhf.run.lineage import Parent
from rlhf.run.stage import StageDir
from rlhf.train.signals import StopRequest

Kind = Literal["tokens", "pairs", "answers", "lists", "prompts"]
POLICY, SCORER, LABELLED = ("policy",), ("reward", "value"), ("data",)


def model_refs(stage: str, recipe: AnyRecipe) -> Iterator[tuple[str, ModelRef, tuple[str, ...]]]:
    """(recipe key, what it names, kinds of stage it accepts) for every model of a recipe."""
    if isinstance(recipe, MergeRecipe):
        yield from ((key, ref, POLICY) for key, ref in merged_models(recipe))
        return
    assert isinstance(recipe, Recipe)
    yield "model", recipe.model, (*POLICY, "reward") if stage == "rm" else POLICY
    if isinstance(recipe, (PreferenceRecipe, OnlineRecipe)):
        yield "reference", recipe.reference, POLICY
    if isinstance(recipe, (PPORecipe, PreferenceRecipe)):
        yield "critic", recipe.critic, (*SCORER, *POLICY)
    for key, reward in named_rewards(recipe):
        if isinstance(reward, ModelReward):
            yield key, reward, ("reward",)


def same_tokens_fix(key: str, model: ModelRef) -> str:
    """What to write where a critic or reference does not read the policy's tokens. key: critic or reference."""
    start = f"path: {model.path}" if model.path else f"from: {model.from_ or 'sft'}"
    if key == "critic":
        return f"A critic values every token of the policy: start it from the policy, critic: {{{start}}}."
    return "The policies are compared token by token: start both from the same SFT stage, model: {from: sft}."


def data_kind(recipe: Recipe) -> Kind:
    """What a stage makes of its rows: where it has a choice of losses, the loss says."""
    if isinstance(recipe, (RewardRecipe, PreferenceRecipe)):
        return recipe.loss.rows
    return "tokens" if isinstance(recipe, SFTRecipe) else "prompts"


def data_kinds(recipe: Recipe) -> list[tuple[DataBlock, Kind]]:
    """The datasets of a recipe, with what the stage reads from each."""
    return [(data, data_kind(recipe) if data is recipe.data else "tokens") for data in data_blocks(recipe)]


def data_refs(recipe: AnyRecipe) -> Iterator[tuple[str, SourceBlock]]:
    """(recipe key, source) of all data of a recipe that a label stage has made."""
    for data in data_blocks(recipe):
        yield from ((key, source) for key, source in _sources(data) if source.from_)


def with_paths(recipe: AnyRecipe, parents: dict[str, Parent]) -> AnyRecipe:
    """The recipe with a path beside every `from` of its data; parents: the finished stage of each, by key."""

    def filled(key: str, source: Any) -> Any:
        made = parents[key].labelled(source.output) if source.from_ else None
        return source if made is None else source.model_copy(update={"path": str(made)})

    def block(data: DataBlock) -> DataBlock:
        key = data.key
        sources = [filled(f"{key}.sources.{i}", source) for i, source in enumerate(data.sources)]
        held_out = None if data.eval is None else filled(f"{key}.eval", data.eval)
        return filled(key, data).model_copy(update={"sources": sources, "eval": held_out})

    found = {data.key: block(data) for data in data_blocks(recipe)}
    changed: dict[str, Any] = {"data": found["data"]} if "data" in found else {}
    if "pretraining.data" in found:
        changed["pretraining"] = recipe.pretraining.model_copy(update={"data": found["pretraining.data"]})
    return recipe.model_copy(update=changed)


def _sources(data: DataBlock) -> Iterator[tuple[str, SourceBlock]]:
    yield data.key, data
    yield from ((f"{data.key}.sources.{i}", source) for i, source in enumerate(data.sources))
    if data.eval is not None:
        yield f"{data.key}.eval", data.eval


@dataclass(frozen=True)
class Job:
    """One stage to run: everything was checked that can be checked without loading a model."""

    stage: str  # sft, rm, ppo, grpo, dpo, label, merge
    folder: StageDir
    recipe: AnyRecipe  # sources that a stage has made have their path, see `with_paths`
    recipe_text: str  # as given
    resolved_text: str  # every default written out
    parents: dict[str, Parent]  # recipe key (model, critic, rewards.0, data, ...) -> the finished stage it names
    inputs: dict[str, Any]  # everything the result depends on
    restart: bool = False
    launcher: int | None = None  # pid of the command that started the ranks and holds the stage folder
    code: frozenset[Path] = frozenset()  # reward files that the user named on the command line
    stop: StopRequest = field(default_factory=StopRequest)  # what takes long looks at it on the way
    rank_timeout_s: float = RANK_TIMEOUT_S  # how long a rank waits for the others

    def distinct_parents(self) -> list[Parent]:
        """The finished stages that this one starts from, each once."""
        return list({parent.path: parent for parent in self.parents.values()}.values())

    def new_tokens(self) -> int:
        """Tokens that must fit behind a prompt."""
        return self.recipe.sampling.max_new_tokens if isinstance(self.recipe, ScoringRecipe) else 0

    @property
    def seed(self) -> int:
        """The seed of everything random in the stage."""
        return self.recipe.label.seed if isinstance(self.recipe, LabelRecipe) else self.recipe.train.seed

    def source(self, key: str, ref: ModelRef) -> str:
        """The folder or hub id of the model that a recipe key names."""
        if key in self.parents:
            return str(self.parents[key].model)
        assert ref.path is not None, f"{key} names no model"
        return local_path(ref.path)


def local_path(source: str) -> str:
    """A folder or hub id as it was named, `~` filled in."""
    return os.path.expanduser(source)
