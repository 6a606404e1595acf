"""Reward models on lists: all answers to a prompt are scored together, and the loss compares their scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlhf.algo.reward_model import REWARD_LOSSES
from rlhf.batch import Lists, Loss
from rlhf.engine.engine import Engine
from rlhf.recipe.schema import Block, OptimBlock
from rlhf.train.describe_preferences import kendall_tau
from rlhf.train.objectives import bind, trim


@dataclass(frozen=True)
class ListRewardObjective:
    """A listwise loss on the scores of all answers to a prompt, averaged over prompts."""

    group: ClassVar[str] = "train"
    optional: ClassVar[frozenset[str]] = frozenset()
    engine: Engine
    optim: OptimBlock
    list_loss: Callable[..., Tensor]

    @classmethod
    def from_block(cls, engine: Engine, optim: OptimBlock, block: Block) -> ListRewardObjective:
        return cls(engine, optim, bind(REWARD_LOSSES, block))

    def counts(self, batch: Lists) -> dict[str, Tensor]:
        return {"rows": torch.tensor(len(batch))}

    def loss(self, micro: Lists) -> Loss:
        scores = list_scores(self.engine, micro)
        present, labels = micro.present.to(scores.device), micro.scores.to(scores)
        total = self.list_loss(scores, labels, present).sum()
        found = scores.detach()
        best = labels.masked_fill(~present, -torch.inf).argmax(-1)
        agreement = kendall_tau(found, labels, present)
        metrics = {
            "loss": total,
            "accuracy": ((agreement + 1) / 2).sum(),
            "best_first": found.masked_fill(~present, -torch.inf).argmax(-1).eq(best).sum(),
            "score_mean": (torch.where(present, found, 0.0).sum(-1) / present.sum(-1)).sum(),
        }
        return Loss({"lists": (total, "rows", 1.0)}, {name: (value, "rows") for name, value in metrics.items()})


def list_scores(engine: Engine, lists: Lists) -> Tensor:
    """The score of every answer, (B, K); absent ones are 0."""
    tokens = trim(lists.answers()).to(engine.device)
    scores = engine(tokens.ids, tokens.attention)
    present = lists.present.to(scores.device)
    return scores.new_zeros(present.shape).masked_scatter(present, scores)
