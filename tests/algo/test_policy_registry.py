"""What every policy loss has in common, whichever entry of the registry it is, and every way to add one up."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.algo.aggregation import AGGREGATIONS
from rlhf.algo.policy import POLICY_LOSSES
from rlhf.algo.registry import Entry
from rlhf.recipe.fields import shape_of, tags
from rlhf.recipe.policy_options import PolicyLoss, PolicyLossBlock

BLOCKS = tags(shape_of(PolicyLoss))


def by_name(entry: Entry) -> str:
    return entry.name


def ragged(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logprobs, old logprobs, advantages, mask: six answers of 0 to 7 tokens, one of them with a hole."""
    torch.manual_seed(seed)
    old = -torch.rand(6, 7, dtype=torch.float64)
    logprobs = (old + 0.3 * torch.randn(6, 7, dtype=torch.float64)).requires_grad_()
    mask = torch.arange(7) < torch.tensor([[7], [1], [3], [5], [0], [6]])
    mask[3, 2] = False
    return logprobs, old, torch.randn(6, 7, dtype=torch.float64), mask


def policy_loss(entry: Entry) -> Callable[..., tuple[Tensor, Tensor]]:
    chosen = BLOCKS[entry.name]().model_dump(include=set(inspect.signature(entry.function).parameters))

    def compute(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        losses, clipped = entry.function(logprobs, old, advantages, mask, **chosen)
        assert losses.shape == clipped.shape == mask.shape and clipped.dtype == torch.bool
        assert losses.isfinite().all() and (losses[~mask] == 0).all() and not clipped[~mask].any()
        return losses, clipped

    return compute


@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=by_name)
def test_policy_losses_on_fresh_samples_follow_the_advantage(entry: Entry) -> None:
    _, old, advantages, mask = ragged(0)
    logprobs = old.clone().requires_grad_()
    per_answer = advantages[:, :1].expand(6, 7)
    losses, clipped = policy_loss(entry)(logprobs, old, per_answer, mask)
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    assert not clipped.any() and (grad[~mask] == 0).all()
    assert torch.equal(grad[mask].sign(), -per_answer[mask].sign())
    # 0 is no signal
    losses, _ = policy_loss(entry)(logprobs, old, torch.zeros(6, 7), mask)
    assert (torch.autograd.grad(losses.sum(), logprobs)[0] == 0).all()


@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=by_name)
def test_what_a_policy_loss_asks_of_the_recipe_is_how_it_behaves(entry: Entry) -> None:
    block = BLOCKS[entry.name]
    assert issubclass(block, PolicyLossBlock)
    logprobs, old, advantages, mask = ragged(1)
    losses, _ = policy_loss(entry)(logprobs, old, advantages, mask)
    spread = [
        row[selected].max() - row[selected].min() for row, selected in zip(losses, mask, strict=True) if selected.any()
    ]
    assert block.per_sequence is bool(max(spread) == 0)
    without_ratio, _ = policy_loss(entry)(logprobs, old - 0.1, advantages, mask)
    assert block.only_fresh is torch.equal(without_ratio, losses)


@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=by_name)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_policy_losses_do_not_see_padding(entry: Entry, garbage: float) -> None:
    logprobs, old, advantages, mask = ragged(2)
    clean, clipped = policy_loss(entry)(logprobs, old, advantages, mask)
    (wanted,) = torch.autograd.grad(clean.sum(), logprobs)
    dirty = [
        torch.nn.functional.pad(torch.where(mask, value.detach(), garbage), (0, 2), value=garbage)
        for value in (logprobs, old, advantages)
    ]
    dirty[0].requires_grad_()
    losses, still = policy_loss(entry)(*dirty, torch.nn.functional.pad(mask, (0, 2)))
    (grad,) = torch.autograd.grad(losses.sum(), dirty[0])
    torch.testing.assert_close(losses[:, :7], clean, atol=1e-12, rtol=0)
    torch.testing.assert_close(grad[:, :7], wanted, atol=1e-12, rtol=0)
    assert torch.equal(still[:, :7], clipped) and (losses[:, 7:] == 0).all() and (grad[:, 7:] == 0).all()


@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=by_name)
def test_policy_losses_take_each_answer_by_itself_and_leave_their_inputs_alone(entry: Entry) -> None:
    given = ragged(3)
    before = [value.detach().clone() for value in given]
    losses, clipped = policy_loss(entry)(*given)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    mixed, mixed_clipped = policy_loss(entry)(*(value[order] for value in given))
    assert torch.equal(mixed, losses[order]) and torch.equal(mixed_clipped, clipped[order])
    assert all(torch.equal(now, then) for now, then in zip(given, before, strict=True))


@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=by_name)
def test_policy_losses_stay_finite_at_extreme_ratios_and_in_narrow_types(entry: Entry) -> None:
    mask = torch.ones(4, 2, dtype=torch.bool)
    logprobs = torch.tensor([[0.0, -1.0], [-2000.0, -1.0], [0.0, -2.0], [-2000.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-2000.0, -1.0], [0.0, -1.0], [-2000.0, -2.0], [0.0, -2.0]])
    advantages = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]]).expand(4, 2)
    losses, _ = policy_loss(entry)(logprobs, old, advantages, mask)
    assert torch.autograd.grad(losses.sum(), logprobs)[0].isfinite().all()
    given = ragged(4)
    wide, _ = policy_loss(entry)(*given)
    narrow, _ = policy_loss(entry)(*(value.float() for value in given[:3]), given[3])
    assert wide.dtype == torch.float64 and narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, atol=1e-4, rtol=0)
    assert policy_loss(entry)(*(value.bfloat16() for value in given[:3]), given[3])[0].dtype == torch.float32


@pytest.mark.parametrize("how", AGGREGATIONS, ids=by_name)
@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=by_name)
def test_sums_over_ranks_and_micro_batches_are_those_of_the_whole_batch(entry: Entry, how: Entry) -> None:
    given = ragged(5)

    def total(rows: list[int]) -> Tensor:
        part = [value[rows] for value in given]
        return how.function(policy_loss(entry)(*part)[0], part[3], length=7)

    whole = total([0, 1, 2, 3, 4, 5])
    assert whole.shape == () and whole.dtype == torch.float64
    (wanted,) = torch.autograd.grad(whole, given[0])
    for parts in ([[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1, 4, 2]], [[4], [3, 2, 1, 0, 5]]):
        sums = torch.stack([total(part) for part in parts]).sum()
        torch.testing.assert_close(sums, whole, atol=1e-12, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(sums, given[0])[0], wanted, atol=1e-12, rtol=0)
