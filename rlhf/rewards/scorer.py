"""All rewards of a recipe as one: each part is asked, then they are added up with their weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.batch import Rollout
from rlhf.rewards.base import Scores, weighted_sum

Part = Callable[[Rollout], Scores]


@dataclass(frozen=True)
class Scorer:
    """Scores of a rollout: the weighted sum and each part, NaN where an answer could not be scored."""

    parts: dict[str, Part]
    weights: dict[str, float]

    def __call__(self, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
        found = {name: part(rollout) for name, part in self.parts.items()}
        total = weighted_sum(found, self.weights)
        return _tensor(total), {name: _tensor(scores) for name, scores in found.items()}


def rule_part(rule: Callable[[list[dict], list[str]], Scores]) -> Part:  # type: ignore[type-arg]
    """A rule that looks at the answers' text."""
    return lambda rollout: rule(rollout.rows, rollout.texts)


def model_part(score: Callable[[Tensor, Tensor], Tensor], micro_batch: int, device: torch.device) -> Part:
    """A reward model that reads prompt and answer as the tokens that were sampled: nothing is decoded and re-encoded.

    score: (ids (b, T), attention (b, T)) -> (b,). The policy and the reward model must share tokenizer and template.
    """

    def part(rollout: Rollout) -> Scores:
        scores: Scores = []
        with torch.no_grad():
            for micro in rollout.split(micro_batch):
                scores += score(micro.ids.to(device), micro.attention.to(device)).tolist()
        return scores

    return part


def _tensor(scores: Scores) -> Tensor:
    return torch.tensor([float("nan") if score is None else score for score in scores], dtype=torch.float32)
