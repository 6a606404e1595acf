"""Policy losses against numbers worked out by hand, and how they are related to each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algo.advantages import dr_grpo, rloo
from rlhf.algo.aggregation import sequence_mean, token_mean
from rlhf.algo.policy import cispo, gspo, mdloo, ppo_clip, ppo_dual_clip, ppo_penalty, reinforce, rloo_clip

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


@pytest.mark.parametrize("reduce", [token_mean, sequence_mean])
def test_micro_batches_and_row_order_do_not_change_the_gradient(reduce: object) -> None:
    logprobs, old, advantages, mask = ragged()

    def gradient(*parts: list[int]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for rows in parts:
            losses, _ = ppo_clip(logprobs[rows], old[rows], advantages[rows], mask[rows], **CLIP)
            total = total + reduce(losses, mask[rows], length=7)  # type: ignore[operator]
        return torch.autograd.grad(total, logprobs)[0]

    whole = gradient([0, 1, 2, 3, 4, 5])
    for parts in ([[0], [1], [2], [3], [4], [5]], [[5, 0, 3], [1, 4, 2]], [[3, 2, 1, 0], [4, 5]]):
        torch.testing.assert_close(gradient(*parts), whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("reduce", [token_mean, sequence_mean])
def test_padding_more_changes_nothing(reduce: object) -> None:
    logprobs, old, advantages, mask = ragged()
    pad = torch.nn.functional.pad
    narrow, _ = ppo_clip(logprobs, old, advantages, mask, **CLIP)
    wide, _ = ppo_clip(pad(logprobs, (0, 3)), pad(old, (0, 3)), pad(advantages, (0, 3)), pad(mask, (0, 3)), **CLIP)
    expected, found = reduce(narrow, mask, length=7), reduce(wide, pad(mask, (0, 3)), length=10)  # type: ignore[operator]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


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


# --- the others -----------------------------------------------------------------------------------------------------


def one_token(ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    return logprobs, torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)


def one_answer(log_ratios: list[float], logprob: float = -1.0) -> tuple[Tensor, Tensor, Tensor]:
    """An answer with these log-ratios, and two masked tokens behind it."""
    old = torch.tensor([[logprob] * len(log_ratios) + [0.0, -9.0]], dtype=torch.float64)
    logprobs = (old + torch.tensor([[*log_ratios, 5.0, -5.0]], dtype=torch.float64)).requires_grad_()
    return logprobs, old, torch.tensor([[True] * len(log_ratios) + [False, False]])


def gradient(losses: Tensor, logprobs: Tensor) -> Tensor:
    return torch.autograd.grad(losses.sum(), logprobs)[0]


def agree(found: Tensor, expected: Tensor | list[list[float]]) -> None:
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "grad", "clipped"),
    [
        (1.0, -2.0, 2.0, 2.0, False),
        (2.5, -2.0, 5.0, 5.0, False),  # below the bound of 3
        (8.0, -2.0, 6.0, 0.0, True),
        (0.5, -2.0, 1.6, 0.0, True),  # the lower limit still holds
        (8.0, 2.0, -2.6, 0.0, True),  # good tokens have the upper limit
        (1.1, 2.0, -2.2, -2.2, False),
    ],
)
def test_dual_clip_of_one_token(ratio: float, advantage: float, loss: float, grad: float, clipped: bool) -> None:
    logprobs, old, mask = one_token(ratio)
    losses, was_clipped = ppo_dual_clip(logprobs, old, torch.tensor([[advantage]]), mask, **CLIP, dual_clip=3.0)
    agree(losses, [[loss]])
    agree(gradient(losses, logprobs), [[grad]])
    assert bool(was_clipped) is clipped


def test_dual_clip_bounds_the_loss_and_is_ppo_clip_below_the_bound() -> None:
    logprobs, old, advantages, mask = ragged()
    logprobs = (old + 3 * (logprobs.detach() - old)).requires_grad_()
    plain, _ = ppo_clip(logprobs, old, advantages, mask, **CLIP)
    losses, clipped = ppo_dual_clip(logprobs, old, advantages, mask, **CLIP, dual_clip=2.0)
    bound = torch.where(advantages < 0, -2 * advantages, torch.inf)
    assert (plain > bound)[mask].any() and (losses <= bound)[mask].all()
    assert torch.equal(losses[mask], torch.minimum(plain, bound)[mask])
    assert (gradient(losses, logprobs)[clipped] == 0).all()
    assert torch.equal(ppo_dual_clip(logprobs, old, advantages, mask, **CLIP, dual_clip=1e9)[0], plain)


def test_penalty_by_hand() -> None:
    logprobs, old, mask = one_token(2.0)
    losses, clipped = ppo_penalty(logprobs, old, torch.tensor([[3.0]]), mask, beta=0.5)
    agree(losses, [[-6 + 0.5 * (1 - math.log(2))]])
    # d/dl of -A e^l + beta (e^l - 1 - l)
    agree(gradient(losses, logprobs), [[-6 + 0.5 * (2 - 1)]])
    assert not clipped.any()


def test_the_penalty_estimates_the_kl_from_the_old_policy() -> None:
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    new = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    losses, _ = ppo_penalty(new.log()[None], old.log()[None], torch.zeros(1, 3), mask, beta=1.0)
    assert (losses >= 0).all()
    # the expectation over what the old policy samples
    agree((losses[0] * old).sum(), (old * (old / new).log()).sum())


def test_reinforce_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    losses, _ = reinforce(logprobs, torch.full((1, 3), torch.nan), torch.tensor([[3.0, -1.0, 9.0]]), mask)
    agree(losses, [[3, -2, 0]])
    agree(gradient(losses, logprobs), [[-3, 1, 0]])


@pytest.mark.parametrize(("advantage", "clipped"), [(2.0, True), (-2.0, False)])
def test_rloo_clip_takes_the_ratio_of_the_answer(advantage: float, clipped: bool) -> None:
    logprobs, old, mask = one_answer([0.5, -0.1])  # e^0.4 = 1.49
    advantages = torch.full((1, 4), advantage, dtype=torch.float64)
    losses, was_clipped = rloo_clip(logprobs, old, advantages, mask, **CLIP)
    ratio = math.exp(0.4)
    number = -1.3 * 2 if clipped else 2 * ratio
    agree(losses, [[number, number, 0, 0]])
    grad = 0.0 if clipped else 2 * ratio
    # the mean over the tokens is the answer's loss, with the answer's gradient on each token
    agree(gradient(sequence_mean(losses, mask, length=4), logprobs), [[grad, grad, 0, 0]])
    assert was_clipped.tolist() == [[clipped, clipped, False, False]]


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_gspo_takes_the_mean_of_the_log_ratios(advantage: float) -> None:
    logprobs, old, mask = one_answer([0.5, -0.1])  # e^0.2 = 1.22
    losses, clipped = gspo(logprobs, old, torch.full((1, 4), advantage, dtype=torch.float64), mask, **CLIP)
    number = -advantage * math.exp(0.2)
    agree(losses, [[number, number, 0, 0]])
    agree(gradient(sequence_mean(losses, mask, length=4), logprobs), [[number / 2, number / 2, 0, 0]])
    assert not clipped.any()


def test_gspo_clips_an_answer_as_a_whole() -> None:
    logprobs, old, mask = one_answer([0.9, -0.1])  # e^0.4 = 1.49: one token of ratio 0.9 is clipped with it
    losses, clipped = gspo(logprobs, old, torch.ones(1, 4, dtype=torch.float64), mask, **CLIP)
    agree(losses, [[-1.3, -1.3, 0, 0]])
    assert clipped.tolist() == [[True, True, False, False]] and (gradient(losses, logprobs) == 0).all()


@pytest.mark.parametrize("loss", [rloo_clip, gspo])
def test_the_advantage_of_an_answer_is_the_mean_over_its_tokens(loss: object) -> None:
    logprobs, old, mask = one_answer([0.0, 0.0])
    losses, _ = loss(logprobs, old, torch.tensor([[3.0, -1.0, 50.0, torch.nan]]), mask, **CLIP)  # type: ignore[operator]
    agree(losses, [[-1, -1, 0, 0]])


@pytest.mark.parametrize(("ratio", "weight", "capped"), [(0.5, 0.5, False), (1.0, 1.0, False), (4.0, 2.0, True)])
def test_cispo_weighs_the_policy_gradient(ratio: float, weight: float, capped: bool) -> None:
    logprobs, _, mask = one_token(1.0)
    with torch.no_grad():
        logprobs -= 3
    old = logprobs.detach() - math.log(ratio)
    for advantage in (1.5, -1.5):
        losses, clipped = cispo(logprobs, old, torch.tensor([[advantage]]), mask, max_ratio=2.0)
        agree(losses, [[3 * weight * advantage]])
        agree(gradient(losses, logprobs), [[-weight * advantage]])  # limited, not cut off
        assert bool(clipped) is capped


def test_mdloo_by_hand() -> None:
    logprobs, old, mask = one_answer([math.log(4), -math.log(2)])  # w = 2
    losses, clipped = mdloo(logprobs, old, torch.full((1, 4), 3.0, dtype=torch.float64), mask, gamma=0.5)
    number = -2 * 3 + 0.5 * (2 * math.log(2) - 1)
    agree(losses, [[number, number, 0, 0]])
    # d/dl of -A e^l + gamma (l e^l - e^l + 1)
    grad = -6 + 0.5 * 2 * math.log(2)
    agree(gradient(sequence_mean(losses, mask, length=4), logprobs), [[grad, grad, 0, 0]])
    assert not clipped.any()


def test_mdloo_estimates_the_kl_to_the_old_policy_and_keeps_its_digits() -> None:
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    new = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    mask = torch.ones(3, 1, dtype=torch.bool)
    losses, _ = mdloo(new.log()[:, None], old.log()[:, None], torch.zeros(3, 1), mask, gamma=1.0)
    agree((losses[:, 0] * old).sum(), (new * (new / old).log()).sum())
    near, _ = mdloo(torch.full((1, 1), -1 + 1e-3), torch.full((1, 1), -1.0), torch.zeros(1, 1), mask[:1], gamma=1.0)
    assert near.dtype == torch.float32 and abs(float(near) / 5e-7 - 1) < 1e-2 and float(near) > 0


# --- how they are related -------------------------------------------------------------------------------------------


def fresh() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprobs equal to old ones, one group of six answers of 1 to 7 tokens, its RLOO advantages on tokens, mask."""
    _, old, scores, mask = ragged(4)
    advantages = rloo(scores[:, 0].reshape(1, 6)).reshape(6, 1).expand(6, 7)
    return old.clone().requires_grad_(), old, advantages, mask, scores[:, 0]


def test_one_update_on_fresh_samples_is_the_same_in_grpo_and_gspo() -> None:
    logprobs, old, advantages, mask, _ = fresh()
    losses = [sequence_mean(f(logprobs, old, advantages, mask, **CLIP)[0], mask, length=7) for f in (ppo_clip, gspo)]
    agree(losses[0], losses[1].detach())
    agree(losses[0] / 6, torch.zeros(()))  # advantages of a group add up to 0, the gradient does not
    grads = [torch.autograd.grad(loss, logprobs)[0] for loss in losses]
    agree(grads[0], grads[1])
    assert grads[0].abs().max() > 0.01


def test_on_fresh_samples_mdloo_and_rloo_have_the_gradient_of_reinforce() -> None:
    logprobs, old, advantages, mask, _ = fresh()
    expected = torch.where(mask, -advantages, 0.0)  # d/dlogprobs of -A sum of logprobs
    agree(gradient(reinforce(logprobs, old, advantages, mask)[0], logprobs), expected)
    for losses in (
        rloo_clip(logprobs, old, advantages, mask, **CLIP)[0],
        mdloo(logprobs, old, advantages, mask, gamma=0.7)[0],
    ):
        total = sequence_mean(losses, mask, length=7)
        agree(total, torch.zeros(()))
        agree(torch.autograd.grad(total, logprobs)[0], expected)


def test_on_fresh_samples_the_losses_of_tokens_have_the_gradient_of_reinforce() -> None:
    logprobs, old, _, mask, _ = fresh()
    advantages = ragged(5)[2]
    expected = torch.where(mask, -advantages, 0.0)
    for losses in (
        ppo_clip(logprobs, old, advantages, mask, **CLIP)[0],
        ppo_dual_clip(logprobs, old, advantages, mask, **CLIP, dual_clip=3.0)[0],
        ppo_penalty(logprobs, old, advantages, mask, beta=0.7)[0],
        cispo(logprobs, old, advantages, mask, max_ratio=5.0)[0],
    ):
        agree(gradient(losses, logprobs), expected)
    same, _ = cispo(logprobs, old, advantages, mask, max_ratio=5.0)
    assert torch.equal(same, reinforce(logprobs, old, advantages, mask)[0])


def test_answers_of_one_token_have_the_same_ratio_in_all_clipped_losses() -> None:
    logprobs, old, advantages, _ = ragged(6)
    mask = torch.arange(7) < torch.ones(6, 1)
    losses = [f(logprobs, old, advantages, mask, **CLIP) for f in (ppo_clip, rloo_clip, gspo)]
    for other, clipped in losses[1:]:
        agree(other, losses[0][0].detach())
        assert torch.equal(clipped, losses[0][1])


def test_rloo_is_dr_grpo_with_a_larger_step() -> None:
    scores = fresh()[4].reshape(2, 3)
    agree(rloo(scores), 3 / 2 * dr_grpo(scores))


def test_where_the_ratio_stands_still() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    for log_ratio in (19.0, 21.0):
        logprobs = torch.full((1, 1), log_ratio, dtype=torch.float64, requires_grad=True)
        old, bad = torch.zeros(1, 1, dtype=torch.float64), -torch.ones(1, 1, dtype=torch.float64)
        for losses in (
            ppo_clip(logprobs, old, bad, mask, **CLIP)[0],
            rloo_clip(logprobs, old, bad, mask, **CLIP)[0],
            gspo(logprobs, old, bad, mask, **CLIP)[0],
            mdloo(logprobs, old, bad, mask, gamma=1.0)[0],
        ):
            assert (gradient(losses, logprobs) != 0) == (log_ratio < 20)
