"""GAE against an independent loop and closed forms; group advantages against literals."""

from __future__ import annotations

import random
import statistics

import pytest
import torch

from rlhf.algo.advantages import gae, grpo


def gae_of_one_answer(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition, A_t = sum_k (gamma lam)^k d_{t+k}, without recursion."""
    following = [*values, 0.0][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize("seed", range(40))
def test_gae_matches_the_definition_on_ragged_rows(seed: int) -> None:
    draw = random.Random(seed)
    gamma, lam = draw.choice([1.0, 0.99, 0.5, 0.0]), draw.choice([1.0, 0.95, 0.3, 0.0])
    rows, columns = draw.randint(1, 5), draw.randint(1, 9)
    # even seeds: answers padded on the right; odd seeds: holes between the response tokens
    lengths = [draw.randint(0, columns) for _ in range(rows)]
    mask = [[t < n if seed % 2 == 0 else draw.random() < 0.6 for t in range(columns)] for n in lengths]
    rewards = [[draw.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]
    values = [[draw.gauss(0, 1) for _ in range(columns)] for _ in range(rows)]
    wide = {"dtype": torch.float64}
    advantages, returns = gae(
        torch.tensor(rewards, **wide), torch.tensor(values, **wide), torch.tensor(mask), gamma=gamma, lam=lam
    )
    for b in range(rows):
        seen = [t for t in range(columns) if mask[b][t]]
        wanted = gae_of_one_answer([rewards[b][t] for t in seen], [values[b][t] for t in seen], gamma, lam)
        expected = dict(zip(seen, wanted, strict=True))
        for t in range(columns):
            assert abs(float(advantages[b, t]) - expected.get(t, 0.0)) < 1e-12
            assert abs(float(returns[b, t]) - (expected[t] + values[b][t] if t in expected else 0.0)) < 1e-12


def test_gae_by_hand() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages, returns = gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), mask, gamma=0.5, lam=0.5)
    # d = (0 + 0.5 * 0.25 - 0.5, 1 - 0.25) = (-0.375, 0.75); A_0 = -0.375 + 0.25 * 0.75
    assert advantages.tolist() == [[-0.1875, 0.75]]
    assert returns.tolist() == [[0.3125, 1.0]]


def test_lambda_1_is_the_full_return_and_lambda_0_one_step() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    mask = torch.ones(3, 5, dtype=torch.bool)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(advantages, to_go - values, atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, to_go, atol=1e-12, rtol=0)
    one_step, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    after = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(one_step, rewards + 0.9 * after - values, atol=1e-12, rtol=0)


def test_padding_more_or_holding_garbage_changes_nothing() -> None:
    torch.manual_seed(1)
    rewards, values = torch.randn(4, 6), torch.randn(4, 6)
    mask = torch.arange(6) < torch.tensor([[6], [3], [1], [0]])
    before = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    garbage = torch.full((4, 2), torch.nan)
    dirty = torch.where(mask, values, torch.inf)
    after = gae(
        torch.cat([rewards, garbage], 1),
        torch.cat([dirty, garbage], 1),
        torch.cat([mask, torch.zeros(4, 2, dtype=torch.bool)], 1),
        gamma=0.9,
        lam=0.8,
    )
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:, :6], old) and (new[:, 6:] == 0).all()


@pytest.mark.parametrize(("correct", "right", "wrong"), [(1, 2.474, -0.353), (2, 1.620, -0.540), (4, 0.935, -0.935)])
def test_binary_rewards_in_a_group_of_eight(correct: int, right: float, wrong: float) -> None:
    scores = torch.tensor([[1.0] * correct + [0.0] * (8 - correct)])
    expected = torch.tensor([[right] * correct + [wrong] * (8 - correct)])
    torch.testing.assert_close(grpo(scores, eps=1e-4), expected, atol=1e-3, rtol=0)


def test_group_advantages_match_the_standard_library() -> None:
    scores = [[0.3, -1.0, 2.0, 0.1, 0.1], [5.0, 5.5, 4.0, 9.0, -3.0]]
    found = grpo(torch.tensor(scores, dtype=torch.float64), eps=1e-3)
    for row, group in zip(found.tolist(), scores, strict=True):
        mean, std = statistics.fmean(group), statistics.stdev(group)
        assert all(abs(a - (s - mean) / (std + 1e-3)) < 1e-12 for a, s in zip(row, group, strict=True))


def test_equal_scores_give_exactly_0_in_float32() -> None:
    for value in (0.1, 0.3, 1 / 3, 7.7, -1e4):
        for answers in (2, 3, 7, 64):
            assert (grpo(torch.full((2, answers), value), eps=1e-6) == 0).all()


def test_unscored_answers_are_left_out_of_their_group() -> None:
    nan = torch.nan
    found = grpo(torch.tensor([[1.0, nan, 0.0, 0.0], [nan, 2.0, nan, nan], [nan, nan, nan, nan]]), eps=1e-4)
    alone = grpo(torch.tensor([[1.0, 0.0, 0.0]]), eps=1e-4)
    assert torch.equal(found[0, [0, 2, 3]], alone[0]) and found[0, 1] == 0
    assert (found[1:] == 0).all()


def test_groups_do_not_see_each_other_and_order_in_a_group_does_not_matter() -> None:
    torch.manual_seed(2)
    scores = torch.randn(3, 6, dtype=torch.float64)
    order = torch.randperm(6)
    torch.testing.assert_close(grpo(scores[:, order], eps=1e-4), grpo(scores, eps=1e-4)[:, order], atol=1e-12, rtol=0)
    torch.testing.assert_close(grpo(scores[1:2], eps=1e-4), grpo(scores, eps=1e-4)[1:2], atol=0, rtol=0)
    assert grpo(scores, eps=1e-4).sum(-1).abs().max() < 1e-12
