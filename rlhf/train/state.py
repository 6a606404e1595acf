"""What an on-policy stage remembers from step to step beside weights and optimizers. It goes into every checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from rlhf.algo.masked import Moments
from rlhf.recipe.policy_options import PpoPenaltyLoss
from rlhf.recipe.stages import OnlineRecipe

_NOTHING = {"count": 0.0, "total": 0.0, "squares": 0.0}


@dataclass
class OnlineState:
    """Coefficients that controllers move, and running statistics. The same on every rank."""

    kl_coef: float
    penalty_beta: float | None = None  # of the penalty form of PPO
    baseline: float = math.nan  # running mean of returns; NaN: none yet
    scores: dict[str, float] = field(default_factory=_NOTHING.copy)  # moments of all training scores so far
    alarms: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)  # means and deviations of the first rollout's scores

    @classmethod
    def at_start(cls, recipe: OnlineRecipe) -> OnlineState:
        """The state before the first step."""
        loss = recipe.policy_loss
        return cls(recipe.kl.coef, loss.beta if isinstance(loss, PpoPenaltyLoss) else None)

    def add_scores(self, moments: Moments) -> Moments:
        """Count a rollout's scores in. Returns the moments of all scores so far."""
        total = Moments.from_sums(self.scores) + moments
        self.scores = {name: float(value) for name, value in total.sums().items()}
        return total

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; NaN as null."""
        return {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in vars(self).items()
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `as_json` gave."""
        for name in vars(self):
            setattr(self, name, math.nan if saved[name] is None and name == "baseline" else saved[name])
