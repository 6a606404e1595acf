"""Models that were trained from one base -> one model: a function of the base's weights and the models' weights.

Each works on one tensor at a time: `base` of any shape, `models` with one more dimension in front, `weights (M,)`, one
per model. `draws`, where a function names it, are independent uniform numbers in [0, 1) like `models`. What a model has
learned is its delta, its weights less the base's. Computed in float32 at least, whatever the tensors are stored in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf.algo.masked import at_least_float32
from rlhf.algo.registry import Registry

MERGES = Registry("merge")
PARALLEL = 0.9995  # |cosine| from which two directions count as one: sin(angle) would be a division by almost nothing


@MERGES.register("linear", paper="arXiv:2212.04089 sec. 2; arXiv:2406.17923 (PAFT)")
def linear(base: Tensor, models: Tensor, weights: Tensor) -> Tensor:
    """base + sum_i weight_i delta_i: the models' average where the weights sum to 1.

    base: (...), models: (M, ...), weights: (M,); returns (...). Weights are taken as they are, whatever their sum.
    """
    deltas = _deltas(base, models)
    return at_least_float32(base) + (_per_model(weights, deltas) * deltas).sum(0)


@MERGES.register("ties", paper="arXiv:2306.01708 sec. 3")
def ties(base: Tensor, models: Tensor, weights: Tensor, *, density: float, scale: float) -> Tensor:
    """TIES: keep each delta's largest entries, elect a sign per entry, add scale times the mean of those that have it.

    base: (...), models: (M, ...), weights: (M,); returns (...).
    1. Trim: of each delta, the share `density` of largest magnitude stays, the rest is 0. The share is of this tensor,
       as in mergekit; the paper takes it of all weights at once. Entries as large as the last one kept stay too.
    2. Elect: the sign of sum_i weight_i delta_i. Where that is 0, nothing is added.
    3. Merge: the weighted mean over the models whose entry has that sign: only the weights' ratios count.
    """
    deltas = torch.stack([_largest(delta, density) for delta in _deltas(base, models)])
    shares = _per_model(weights, deltas)
    elected = (shares * deltas).sum(0).sign()
    agree = (deltas.sign() == elected) & (elected != 0)
    total = (shares * agree).sum(0)
    mean = torch.where(agree, shares * deltas, 0.0).sum(0) / torch.where(total > 0, total, 1.0)
    return at_least_float32(base) + scale * mean


@MERGES.register("dare", paper="arXiv:2311.03099 sec. 3.2")
def dare(base: Tensor, models: Tensor, weights: Tensor, draws: Tensor, *, density: float) -> Tensor:
    """DARE, then linear: each delta's entries are dropped at random and the rest rescaled, m delta / density.

    base: (...), models and draws: (M, ...), weights: (M,); returns (...). An entry stays where its draw is below
    `density` = 1 - p, so the expected delta is the delta itself.
    """
    deltas = _deltas(base, models)
    kept = torch.where(draws < density, deltas, 0.0) / density
    return at_least_float32(base) + (_per_model(weights, deltas) * kept).sum(0)


@MERGES.register("slerp", paper="Shoemake 1985, doi:10.1145/325165.325242; arXiv:2406.17923 (PAFT)")
def slerp(base: Tensor, models: Tensor, weights: Tensor) -> Tensor:
    """Two deltas' point on the great circle between them: base + (sin((1-t) w) delta_1 + sin(t w) delta_2) / sin w.

    base: (...), models: (2, ...), weights: (2,); returns (...). w is the angle between the deltas of this tensor and
    t = weight_2 / (weight_1 + weight_2). Unlike a mean, it does not shrink where the deltas point elsewhere. Along one
    line (|cos w| above 0.9995, or a delta that is 0) there is no circle: (1-t) delta_1 + t delta_2, as in mergekit.
    """
    first, second = _deltas(base, models)
    share = at_least_float32(weights)[1] / at_least_float32(weights).sum()
    sizes = first.norm() * second.norm()
    cosine = (first * second).sum() / torch.where(sizes > 0, sizes, 1.0)
    is_line = (cosine.abs() > PARALLEL) | (sizes == 0)
    angle = torch.where(is_line, torch.pi / 2, cosine.clamp(-1.0, 1.0).acos())
    one = torch.where(is_line, 1 - share, ((1 - share) * angle).sin() / angle.sin())
    other = torch.where(is_line, share, (share * angle).sin() / angle.sin())
    merged: Tensor = at_least_float32(base) + one * first + other * second
    return merged


def _deltas(base: Tensor, models: Tensor) -> Tensor:
    return at_least_float32(models) - at_least_float32(base)


def _per_model(weights: Tensor, deltas: Tensor) -> Tensor:
    return weights.to(deltas.dtype).view(-1, *[1] * (deltas.dim() - 1))


def _largest(delta: Tensor, density: float) -> Tensor:
    """The share `density` of largest magnitude, at least one entry; the rest 0."""
    size = delta.numel()
    kept = max(1, round(density * size))
    magnitude = delta.abs()
    least = magnitude.flatten().kthvalue(size - kept + 1).values
    return torch.where(magnitude >= least, delta, 0.0)
