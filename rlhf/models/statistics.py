"""Mean and standard deviation of a reward model's scores, as its `config.json` publishes them.

They describe the scores and change nothing: plain transformers loads the model and scores as without them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedConfig

from rlhf.errors import CheckpointError
from rlhf.models.folder import is_adapter
from rlhf.models.load import read_config

MEAN, STD = "score_mean", "score_std"


@dataclass(frozen=True)
class ScoreStatistics:
    """Of the scores of many answers."""

    mean: float
    std: float

    def facts(self) -> dict[str, float]:
        """As they are published."""
        return {MEAN: self.mean, STD: self.std}


def set_statistics(config: PreTrainedConfig, statistics: ScoreStatistics | None) -> None:
    """Enter them into a configuration; None takes out what the model started from had published."""
    for name in (MEAN, STD):
        if hasattr(config, name):
            delattr(config, name)
    if statistics is not None:
        for name, value in statistics.facts().items():
            setattr(config, name, value)


def read_statistics(source: str, revision: str | None, where: str) -> ScoreStatistics:
    """What a folder or hub id publishes; an adapter publishes none, whatever its base does. where: the recipe key."""
    config = None if is_adapter(source) else read_config(source, revision)
    values = [getattr(config, name) if hasattr(config, name) else None for name in (MEAN, STD)]
    mean, std = (v if isinstance(v, (int, float)) and not isinstance(v, bool) else math.nan for v in values)
    if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
        found = "none" if values == [None, None] else f"{values[0]} and {values[1]}"
        raise CheckpointError(
            f"expected {MEAN} and {STD} > 0 in {source}/config.json, found {found}",
            where=where,
            fix="Make the reward model with `rlhf rm`, which publishes them, or write statistics: none.",
        )
    return ScoreStatistics(float(mean), float(std))
