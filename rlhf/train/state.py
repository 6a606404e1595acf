"""What an on-policy stage remembers from step to step beside weights and optimizers. It goes into every checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rlhf.algo.masked import Moments
from rlhf.errors import UserError
from rlhf.recipe.policy_options import PpoPenaltyLoss
from rlhf.recipe.stages import OnlineRecipe
from rlhf.train.alarms import Alarms
from rlhf.train.overoptimisation import Gap

_NOTHING = {"count": 0.0, "total": 0.0, "squares": 0.0}


@dataclass
class OnlineState:
    """Coefficients that controllers move, and running statistics. The same on every rank."""

    kl_coef: float
    penalty_beta: float | None  # of the penalty form of PPO
    alarms: Alarms
    gap: Gap = field(default_factory=Gap)
    baseline: float = math.nan  # running mean of returns; NaN: none yet
    scores: dict[str, float] = field(default_factory=_NOTHING.copy)  # moments of all training scores so far

    @classmethod
    def at_start(cls, recipe: OnlineRecipe) -> OnlineState:
        """The state before the first step."""
        loss = recipe.policy_loss
        return cls(recipe.kl.coef, loss.beta if isinstance(loss, PpoPenaltyLoss) else None, Alarms(recipe.guards))

    def add_scores(self, moments: Moments) -> Moments:
        """Count a rollout's scores in. Returns the moments of all scores so far."""
        total = Moments.from_sums(self.scores) + moments
        self.scores = {name: float(value) for name, value in total.sums().items()}
        return total

    @contextmanager
    def undone_on_error(self) -> Iterator[None]:
        """Running statistics of a rollout that is refused inside are as if it had not been."""
        before = self.scores, self.baseline
        try:
            yield
        except UserError:
            self.scores, self.baseline = before
            raise

    def as_json(self) -> dict[str, Any]:
        """Plain numbers; NaN as null."""
        return {
            "kl_coef": self.kl_coef,
            "penalty_beta": self.penalty_beta,
            "baseline": None if math.isnan(self.baseline) else self.baseline,
            "scores": self.scores,
            "alarms": self.alarms.state(),
            "gap": self.gap.state(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `as_json` gave."""
        self.kl_coef, self.penalty_beta = saved["kl_coef"], saved["penalty_beta"]
        self.baseline = math.nan if saved["baseline"] is None else saved["baseline"]
        self.scores = dict(saved["scores"])
        self.alarms.load(saved["alarms"])
        self.gap.load(saved["gap"])
