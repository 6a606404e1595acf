"""Mean and deviation of a reward model's scores, measured when it is trained."""

from __future__ import annotations

import logging
import math

import torch

from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import NumericsError
from rlhf.models.statistics import ScoreStatistics
from rlhf.train.pool import Budget
from rlhf.train.preference import flat
from rlhf.train.seeding import derive, permutation
from rlhf.train.supervised import Dataset

logger = logging.getLogger("rlhf.statistics")
MOST_ROWS = 2000  # of the training rows, where none are held out


def score_statistics(engine: Engine, train: Dataset, held_out: Dataset, budget: Budget, seed: int) -> ScoreStatistics:
    """Mean and standard deviation (Bessel) of the scores of all answers, over all ranks.

    Of the held-out rows, else of at most MOST_ROWS training rows, chosen by seed.
    """
    data = held_out if len(held_out) else train
    rows = range(len(data)) if len(held_out) else permutation(len(data), derive(seed, "statistics"))[:MOST_ROWS]
    found = [torch.zeros(0, dtype=torch.float64)]
    with engine.evaluating():
        for micro in data.pool(rows).cut(budget):
            answers = flat(micro.rows).to(engine.device)
            scores = engine(answers.ids, answers.attention)
            found += [scores.double().cpu()] if micro.is_real else []
    scores = torch.cat(found)
    sums = dist.sum_over_ranks({"count": torch.tensor(len(scores)), "sum": scores.sum()})
    mean = sums["sum"] / sums["count"]
    squares = dist.sum_over_ranks({"squares": ((scores - mean) ** 2).sum()})["squares"]
    std = math.sqrt(squares / (sums["count"] - 1)) if math.isfinite(squares) else math.nan
    if not math.isfinite(std):
        raise NumericsError(
            f"expected finite scores of {sums['count']:.0f} answers, found a mean of {mean} and a deviation of {std}",
            fix="Nothing was published. Lower train.lr and start again from the last checkpoint.",
        )
    logger.info("scores of %d answers: mean %.4g, standard deviation %.4g", sums["count"], mean, std)
    return ScoreStatistics(mean, std)
