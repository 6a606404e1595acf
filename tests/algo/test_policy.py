"""The clipped surrogate: where it clips, what padding does, and that sums add up over micro-batches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algo.policy import ppo_clip, sequence_sums, token_sums

CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def ragged(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages, mask: six answers of 1 to 7 tokens."""
    torch.manual_seed(seed)
    old = -torch.rand(6, 7, dtype=torch.float64)
    logprobs = (old + 0.4 * torch.randn(6, 7, dtype=torch.float64)).requires_grad_()
    mask = torch.arange(7) < torch.tensor([[7], [1], [3], [5], [2], [6]])
    return logprobs, old, torch.randn(6, 7, dtype=torch.float64), mask


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, False),
        (1.25, 1.0, -1.25, -1.25, False),  # inside, the upper limit is 1.3
        (1.5, 1.0, -1.3, 0.0, True),
        (1.5, -1.0, 1.5, 1.5, False),  # worse and more likely: never clipped
        (0.5, 1.0, -0.5, -0.5, False),  # better and less likely: never clipped
        (0.5, -1.0, 0.8, 0.0, True),
    ],
)
def test_one_token(ratio: float, advantage: float, loss: float, gradient: float, clipped: bool) -> None:
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(1, 1, dtype=torch.bool)
    losses, was_clipped = ppo_clip(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), mask, **CLIP)
    assert abs(float(losses.detach()) - loss) < 1e-12
    assert bool(was_clipped) is clipped
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    assert abs(float(grad) - gradient) < 1e-12


def test_fresh_samples_have_ratio_1_and_the_plain_policy_gradient() -> None:
    logprobs, _, advantages, mask = ragged()
    losses, clipped = ppo_clip(logprobs, logprobs.detach(), advantages, mask, **CLIP)
    assert torch.equal(losses.detach(), torch.where(mask, -advantages, 0.0)) and not clipped.any()
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    torch.testing.assert_close(grad, torch.where(mask, -advantages, 0.0), atol=1e-12, rtol=0)


def test_padding_holds_anything() -> None:
    logprobs, old, advantages, mask = ragged()
    clean, clipped = ppo_clip(logprobs, old, advantages, mask, **CLIP)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        dirty = torch.where(mask, logprobs.detach(), garbage).requires_grad_()
        again, clipped_again = ppo_clip(
            dirty, old, torch.where(mask, advantages, garbage), mask, clip_low=0.2, clip_high=0.3
        )
        assert torch.equal(again, clean) and torch.equal(clipped_again, clipped)
        (grad,) = torch.autograd.grad(again.sum(), dirty)
        assert grad.isfinite().all() and (grad[~mask] == 0).all()


@pytest.mark.parametrize("reduce", [token_sums, sequence_sums])
def test_micro_batches_and_row_order_do_not_change_the_gradient(reduce: object) -> None:
    logprobs, old, advantages, mask = ragged()

    def gradient(*parts: list[int]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for rows in parts:
            losses, _ = ppo_clip(logprobs[rows], old[rows], advantages[rows], mask[rows], **CLIP)
            total = total + reduce(losses, mask[rows])  # type: ignore[operator]
        return torch.autograd.grad(total, logprobs)[0]

    whole = gradient([0, 1, 2, 3, 4, 5])
    for parts in ([[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1, 4, 2]], [[3, 2, 1, 0], [4, 5]]):
        torch.testing.assert_close(gradient(*parts), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("reduce", [token_sums, sequence_sums])
def test_padding_more_changes_nothing(reduce: object) -> None:
    logprobs, old, advantages, mask = ragged()
    pad = torch.nn.functional.pad
    narrow, _ = ppo_clip(logprobs, old, advantages, mask, **CLIP)
    wide, _ = ppo_clip(pad(logprobs, (0, 3)), pad(old, (0, 3)), pad(advantages, (0, 3)), pad(mask, (0, 3)), **CLIP)
    expected, found = reduce(narrow, mask), reduce(wide, pad(mask, (0, 3)))  # type: ignore[operator]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_aggregation_by_hand() -> None:
    losses = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    assert token_sums(losses, mask) == 10
    assert sequence_sums(losses, mask) == 6  # 2 + 4, and an answer without tokens adds nothing


def test_extreme_ratios_stay_finite() -> None:
    logprobs = torch.tensor([[0.0, -2000.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    losses, _ = ppo_clip(logprobs, torch.tensor([[-2000.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), mask, **CLIP)
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    assert losses.isfinite().all() and grad.isfinite().all()
    assert losses[0, 0] == torch.tensor(20.0).exp()


def test_float32_agrees_with_float64() -> None:
    logprobs, old, advantages, mask = ragged()
    wide, _ = ppo_clip(logprobs, old, advantages, mask, **CLIP)
    narrow, _ = ppo_clip(logprobs.float(), old.float(), advantages.float(), mask, **CLIP)
    assert narrow.dtype == torch.float32 and wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, atol=1e-5, rtol=0)
