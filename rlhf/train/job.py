"""What the command line hands to the ranks. No torch: it is made before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.recipe.schema import ModelRef
from rlhf.recipe.stages import Recipe
from rlhf.run.lineage import Parent
from rlhf.run.stage import StageDir


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

    def source(self, key: str, ref: ModelRef) -> str:
        """The folder or hub id of the model that a recipe key names."""
        if key in self.parents:
            return str(self.parents[key].model)
        assert ref.path is not None, f"{key} names no model"
        return ref.path
