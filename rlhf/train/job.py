"""What the command line hands to the ranks. No torch: it is made before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhf.recipe.reward_options import ModelReward
from rlhf.recipe.reward_rules import named_rewards
from rlhf.recipe.schema import DataBlock, ModelRef
from rlhf.recipe.stages import OnlineRecipe, PPORecipe, PreferenceRecipe, Recipe
from rlhf.run.lineage import Parent
from rlhf.run.stage import StageDir

Kind = Literal["tokens", "pairs", "prompts"]
DATA_KIND: dict[str, Kind] = {"sft": "tokens", "rm": "pairs", "dpo": "pairs", "ppo": "prompts", "grpo": "prompts"}
POLICY, SCORER = ("policy",), ("reward", "value")


def model_refs(stage: str, recipe: Recipe) -> Iterator[tuple[str, ModelRef, tuple[str, ...]]]:
    """(recipe key, what it names, kinds of stage it accepts) for every model of a recipe."""
    yield "model", recipe.model, (*POLICY, "reward") if stage == "rm" else POLICY
    if isinstance(recipe, (PreferenceRecipe, OnlineRecipe)):
        yield "reference", recipe.reference, POLICY
    if isinstance(recipe, PPORecipe):
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


def data_kinds(stage: str, recipe: Recipe) -> list[tuple[DataBlock, Kind]]:
    """The datasets of a recipe, with what the stage reads from each."""
    found = [(recipe.data, DATA_KIND[stage])]
    if isinstance(recipe, OnlineRecipe) and recipe.pretraining is not None:
        found.append((recipe.pretraining.data, "tokens"))
    return found


@dataclass(frozen=True)
class Job:
    """One stage to run: everything was checked that can be checked without loading a model."""

    stage: str  # sft, rm, ppo, grpo, dpo
    folder: StageDir
    recipe: Recipe
    recipe_text: str  # as given
    resolved_text: str  # every default written out
    parents: dict[str, Parent]  # recipe key (model, critic, rewards.0, ...) -> the finished stage it names
    inputs: dict[str, Any]  # everything the result depends on
    restart: bool = False
    launcher: int | None = None  # pid of the command that started the ranks and holds the stage folder
    code: frozenset[Path] = frozenset()  # reward files that the user named on the command line

    def distinct_parents(self) -> list[Parent]:
        """The finished stages that this one starts from, each once."""
        return list({parent.path: parent for parent in self.parents.values()}.values())

    def new_tokens(self) -> int:
        """Tokens that must fit behind a prompt."""
        return self.recipe.sampling.max_new_tokens if isinstance(self.recipe, OnlineRecipe) else 0

    def source(self, key: str, ref: ModelRef) -> str:
        """The folder or hub id of the model that a recipe key names."""
        if key in self.parents:
            return str(self.parents[key].model)
        assert ref.path is not None, f"{key} names no model"
        return local_path(ref.path)


def local_path(source: str) -> str:
    """A folder or hub id as it was named, `~` filled in."""
    return str(Path(source).expanduser()) if source.startswith("~") else source
