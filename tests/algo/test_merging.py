"""Merges by hand, against second implementations, and what must be true of each whatever the tensors are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlhf.algo.merging import MERGES, dare, linear, slerp, ties

HALF = torch.tensor([0.5, 0.5], dtype=torch.float64)


def tensors(models: int = 2, shape: tuple[int, ...] = (6, 7), seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=draw, dtype=torch.float64)
    return base, base + 0.1 * torch.randn((models, *shape), generator=draw, dtype=torch.float64)


def draws(models: Tensor, seed: int = 0) -> Tensor:
    return torch.rand(models.shape, generator=torch.Generator().manual_seed(seed))


def dare_drawn(base: Tensor, models: Tensor, weights: Tensor, *, density: float) -> Tensor:
    return dare(base, models, weights, draws(models), density=density)


# every entry such that nothing is thinned out
WHOLE: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": linear,
    "ties": partial(ties, density=1.0, scale=1.0),
    "dare": partial(dare_drawn, density=1.0),
    "slerp": slerp,
}


def test_every_entry_is_here() -> None:
    assert set(WHOLE) == set(MERGES.names())


def close(found: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


# --- what is true of every merge --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("shape", [(6, 7), (5,), (2, 3, 4), (1,)])
def test_equal_models_merge_to_themselves(name: str, shape: tuple[int, ...]) -> None:
    base, models = tensors(1, shape)
    close(WHOLE[name](base, models.expand(2, *shape), HALF), models[0])


@pytest.mark.parametrize("name", WHOLE)
def test_all_weight_on_one_model_gives_that_model(name: str) -> None:
    base, models = tensors()
    close(WHOLE[name](base, models, torch.tensor([1.0, 0.0])), models[0])
    close(WHOLE[name](base, models, torch.tensor([0.0, 1.0])), models[1])


@pytest.mark.parametrize("name", WHOLE)
def test_unchanged_models_merge_to_the_base(name: str) -> None:
    base, _ = tensors()
    assert torch.equal(WHOLE[name](base, base.expand(2, 6, 7), HALF), base)


@pytest.mark.parametrize("name", WHOLE)
def test_the_order_of_models_does_not_matter(name: str) -> None:
    base, models = tensors()
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    close(WHOLE[name](base, models, weights), WHOLE[name](base, models.flip(0), weights.flip(0)))


@pytest.mark.parametrize("name", WHOLE)
def test_narrow_types_are_merged_in_float32(name: str) -> None:
    base, models = (x.bfloat16() for x in tensors())
    found = WHOLE[name](base, models, HALF.float())
    assert found.dtype == torch.float32
    close(found, WHOLE[name](base.double(), models.double(), HALF).float(), atol=1e-6)


# --- linear, dare -----------------------------------------------------------------------------------------------------


def test_linear_is_the_average_where_weights_sum_to_one() -> None:
    base, models = tensors(3)
    close(linear(base, models, torch.full((3,), 1 / 3, dtype=torch.float64)), models.mean(0))
    sums = base + (models - base).sum(0)
    close(linear(base, models, torch.ones(3)), sums)


def test_dare_keeps_what_is_drawn_and_rescales_it() -> None:
    base = torch.tensor([1.0, 1.0, 1.0])
    models = torch.tensor([[2.0, 2.0, 2.0], [1.0, 0.0, 5.0]])
    drawn = torch.tensor([[0.1, 0.3, 0.24], [0.9, 0.2, 0.25]])
    found = dare(base, models, torch.tensor([1.0, 0.5]), drawn, density=0.25)
    close(found, torch.tensor([1.0 + 4.0, 1.0 + 0.5 * -4.0, 1.0 + 4.0]))


def test_dare_is_linear_on_average() -> None:
    base, models = tensors()
    found = torch.stack([dare(base, models, HALF, draws(models, seed), density=0.3) for seed in range(4000)]).mean(0)
    close(found, linear(base, models, HALF), atol=0.02)
    kept = (dare(base, models[:1], HALF[:1], draws(models[:1]), density=0.3) != base).double().mean()
    assert 0.1 < kept < 0.5


# --- ties -------------------------------------------------------------------------------------------------------------


def slow_ties(base: list[float], models: list[list[float]], weights: list[float], density: float, scale: float):
    """The paper's algorithm 1 with weights, number by number."""
    kept = max(1, round(density * len(base)))
    deltas = [[m - b for m, b in zip(model, base, strict=True)] for model in models]
    for delta in deltas:
        least = sorted((abs(d) for d in delta), reverse=True)[kept - 1]
        delta[:] = [d if abs(d) >= least else 0.0 for d in delta]
    found = []
    for i, start in enumerate(base):
        total = sum(w * delta[i] for w, delta in zip(weights, deltas, strict=True))
        agree = [(w, delta[i]) for w, delta in zip(weights, deltas, strict=True) if delta[i] * total > 0]
        share = sum(w for w, _ in agree)
        found.append(start + scale * (sum(w * d for w, d in agree) / share if share else 0.0))
    return found


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
def test_ties_is_the_papers_algorithm(density: float) -> None:
    base, models = tensors(3, (41,))
    weights = [0.2, 0.5, 1.0]
    found = ties(base, models, torch.tensor(weights, dtype=torch.float64), density=density, scale=0.8)
    expected = slow_ties(base.tolist(), models.tolist(), weights, density, 0.8)
    close(found, torch.tensor(expected, dtype=torch.float64))


def test_ties_by_hand_where_signs_disagree() -> None:
    base = torch.zeros(4)
    models = torch.tensor([[3.0, 1.0, 2.0, 1.0], [-1.0, -1.0, 4.0, 0.0]])
    found = ties(base, models, torch.ones(2), density=1.0, scale=1.0)
    close(found, torch.tensor([3.0, 0.0, 3.0, 1.0]))  # outvoted; cancelled out; a mean; a zero has no vote
    assert torch.equal(ties(base, models, 2 * torch.ones(2), density=1.0, scale=1.0), found), "ratios alone count"


def test_ties_keeps_at_least_one_entry_and_all_of_equal_size() -> None:
    base = torch.zeros(10)
    model = torch.tensor([[1.0, -1.0] + [0.5] * 8])
    found = ties(base, model, torch.ones(1), density=0.001, scale=1.0)
    close(found, torch.tensor([1.0, -1.0] + [0.0] * 8))


def test_ties_of_one_model_is_what_is_largest_of_it() -> None:
    base, models = tensors(1)
    found = ties(base, models, torch.ones(1), density=0.5, scale=1.0)
    kept = found != base
    assert int(kept.sum()) == 21
    close(found[kept], models[0][kept])
    assert (models[0] - base).abs()[kept].min() > (models[0] - base).abs()[~kept].max()


# --- slerp ------------------------------------------------------------------------------------------------------------


def test_slerp_by_hand() -> None:
    base, models = torch.ones(2), torch.tensor([[2.0, 1.0], [1.0, 2.0]])  # deltas at a right angle
    root = math.sqrt(0.5)
    close(slerp(base, models, torch.ones(2)), torch.tensor([1 + root, 1 + root]), atol=1e-6)
    third = slerp(base, models, torch.tensor([2.0, 1.0])) - base  # 30 degrees on the way
    close(third, torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]), atol=1e-6)


def test_slerp_keeps_the_size_that_a_mean_loses() -> None:
    base, models = tensors()
    size = (models[0] - base).norm()
    models[1] = base + (models[1] - base) * size / (models[1] - base).norm()
    assert (slerp(base, models, HALF) - base).norm() == pytest.approx(float(size), rel=1e-9)
    assert (linear(base, models, HALF) - base).norm() < 0.9 * size


@pytest.mark.parametrize("factor", [1.0, 3.0, -1.0, -0.5, 0.0])
def test_slerp_along_a_line_is_linear(factor: float) -> None:
    base, models = tensors()
    models[1] = base + factor * (models[0] - base)
    found = slerp(base, models, torch.tensor([0.75, 0.25], dtype=torch.float64))
    close(found, base + (0.75 + 0.25 * factor) * (models[0] - base))
