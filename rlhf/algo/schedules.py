"""Learning-rate schedules: the factor on the peak rate as a pure function of the optimizer step, counted from 0.

All rise linearly over the first round(warmup * total) steps, from 1 / warm-up steps: no update is wasted on rate 0.
Decays end at `min_lr_ratio` one step after the last, so that the last update still moves where the ratio is 0.
"""

from __future__ import annotations

import math

from rlhf.algo.registry import Registry

SCHEDULES = Registry("schedule")


@SCHEDULES.register("cosine", paper="arXiv:1608.03983 eq. 5")
def cosine(step: int, total: int, *, warmup: float, min_lr_ratio: float) -> float:
    """Half a cosine from 1 down to min_lr_ratio, after the warm-up."""
    rise, progress = _progress(step, total, warmup)
    return rise * (min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


@SCHEDULES.register("linear", paper="arXiv:1909.08593 code")
def linear(step: int, total: int, *, warmup: float, min_lr_ratio: float) -> float:
    """A straight line from 1 down to min_lr_ratio, after the warm-up."""
    rise, progress = _progress(step, total, warmup)
    return rise * (1 - (1 - min_lr_ratio) * progress)


@SCHEDULES.register("constant", paper="arXiv:1706.02677 sec. 2.2 (warm-up)")
def constant(step: int, total: int, *, warmup: float, min_lr_ratio: float) -> float:
    """1 after the warm-up, to the end; min_lr_ratio means nothing here."""
    return _progress(step, total, warmup)[0]


def _progress(step: int, total: int, warmup: float) -> tuple[float, float]:
    """(warm-up factor in (0, 1], share of the decay that is done in [0, 1])."""
    warmup_steps = round(warmup * total)
    if step < warmup_steps:
        return (step + 1) / warmup_steps, 0.0
    return 1.0, min((step - warmup_steps) / max(total - warmup_steps, 1), 1.0)
