"""GAE against an independent loop and closed forms; the others against literals, and what leaves them unchanged."""

from __future__ import annotations

import random
import statistics

import pytest
import torch
from torch import Tensor

from rlhf.algo.advantages import (
    dr_grpo,
    gae,
    grpo,
    grpo_batch,
    process_grpo,
    reinforce,
    reinforce_pp,
    reinforce_pp_baseline,
    remax,
    rloo,
)


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


def test_gae_leaves_the_critic_alone_where_an_answer_is_unscored() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = torch.tensor([[0.5, torch.nan, 0.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[3.0, 4.0, 9.0], [0.0, 0.0, 0.0]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[0, 0, 0], [1, 1, 1]]
    assert returns.tolist() == [[3, 4, 0], [1, 1, 1]]


# --- groups ---------------------------------------------------------------------------------------------------------

NAN = torch.nan
SCORES = [[1.0, 0.0, 0.0, 1.0], [2.0, 4.0, 6.0, 4.0]]


def wide(values: list[object]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def agree(found: Tensor, expected: list[object] | Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), atol=atol, rtol=0)


def test_mean_of_the_group_by_hand() -> None:
    agree(dr_grpo(wide(SCORES)), [[0.5, -0.5, -0.5, 0.5], [-2, 0, 2, 0]])
    agree(rloo(wide(SCORES)), [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [-8 / 3, 0, 8 / 3, 0]])
    # all eight: mean 2.25, squares 2 * 1.25^2 + 2 * 2.25^2 + 0.25^2 + 2 * 1.75^2 + 3.75^2 = 33.5
    std = (33.5 / 7) ** 0.5
    agree(grpo_batch(wide(SCORES), eps=0.5), dr_grpo(wide(SCORES)) / (std + 0.5))


def test_unscored_answers_are_left_out_of_groups_and_batch() -> None:
    scores = wide([[1.0, NAN, 0.0, 0.0], [NAN, 2.0, NAN, NAN], [NAN, NAN, NAN, NAN]])
    nothing = [0.0] * 4
    agree(dr_grpo(scores), [[2 / 3, 0, -1 / 3, -1 / 3], nothing, nothing])
    agree(rloo(scores), [[1, 0, -0.5, -0.5], nothing, nothing])
    # the single answer has nobody to be compared with, but it is one of the batch: 1, 0, 0, 2
    std = statistics.stdev([1, 0, 0, 2])
    agree(grpo_batch(scores, eps=1e-3), [[2 / 3 / (std + 1e-3), 0, *[-1 / 3 / (std + 1e-3)] * 2], nothing, nothing])


def test_leave_one_out_is_what_it_says_for_every_group_size() -> None:
    draw = random.Random(0)
    for size in (2, 3, 5, 8):
        group = [draw.gauss(0, 3) for _ in range(size)]
        expected = [x - statistics.fmean(group[:i] + group[i + 1 :]) for i, x in enumerate(group)]
        agree(rloo(wide([group])), [expected])


@pytest.mark.parametrize("estimate", [dr_grpo, rloo, lambda x: grpo_batch(x, eps=1e-6), lambda x: grpo(x, eps=1e-6)])
def test_groups_of_equal_scores_get_exactly_0(estimate: object) -> None:
    for value in (0.1, 0.3, 1 / 3, 7.7, -1e4):
        for answers in (1, 2, 3, 7, 64):
            assert (estimate(torch.full((2, answers), value)) == 0).all()  # type: ignore[operator]


def test_batch_deviation_is_shared_so_flat_groups_stay_small() -> None:
    scores = wide([[0.0, 0.01, 0.0, 0.01], [0.0, 1.0, 0.0, 1.0]])
    assert grpo(scores, eps=1e-6)[0].abs().max() > 0.8
    assert grpo_batch(scores, eps=1e-6)[0].abs().max() < 0.02


# --- invariances ----------------------------------------------------------------------------------------------------

ESTIMATES = {
    "grpo": lambda x: grpo(x, eps=1e-12),
    "grpo_batch": lambda x: grpo_batch(x, eps=1e-12),
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "reinforce_pp_baseline": lambda x: reinforce_pp_baseline(x, torch.ones(x.numel(), 2, dtype=torch.bool)),
    "process_grpo": lambda x: process_grpo(x.unsqueeze(-1), eps=1e-12),
    "reinforce": lambda x: reinforce(x, torch.tensor(0.5, dtype=torch.float64), decay=0.9)[0],
    "reinforce_pp": lambda x: reinforce_pp(x.reshape(-1, 1), torch.ones(x.numel(), 1, dtype=torch.bool), gamma=1.0),
}


@pytest.mark.parametrize(
    ("name", "all_scores", "one_group", "scale"),
    [
        ("grpo", True, True, True),
        ("grpo_batch", True, False, True),
        ("dr_grpo", True, True, False),
        ("rloo", True, True, False),
        ("reinforce_pp_baseline", True, True, True),
        ("process_grpo", True, True, True),
        ("reinforce", False, False, False),
        ("reinforce_pp", True, False, True),
    ],
)
def test_what_a_shift_and_a_scale_of_the_scores_leave_unchanged(
    name: str, all_scores: bool, one_group: bool, scale: bool
) -> None:
    torch.manual_seed(3)
    scores = torch.randn(3, 4, dtype=torch.float64)
    estimate = ESTIMATES[name]
    before = estimate(scores)

    def same(after: Tensor) -> bool:
        return bool((after - before).abs().max() < 1e-6)

    assert same(estimate(scores + 7)) is all_scores
    assert same(estimate(scores + torch.tensor([[0.0], [7.0], [0.0]]))) is one_group
    assert same(estimate(3 * scores)) is scale
    if name in ("dr_grpo", "rloo"):
        agree(estimate(3 * scores), 3 * before)


@pytest.mark.parametrize("name", sorted(ESTIMATES))
def test_a_better_score_raises_its_own_advantage(name: str) -> None:
    scores = torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.1, -1.0]], dtype=torch.float64)
    better = scores.clone()
    better[0, 2] += 0.1
    before, after = (ESTIMATES[name](x).reshape(6, -1) for x in (scores, better))
    assert (after[2] > before[2]).all()


# --- the others -----------------------------------------------------------------------------------------------------


def test_reinforce_subtracts_a_mean_of_earlier_rollouts() -> None:
    advantages, baseline = reinforce(wide([[1.0, 3.0]]), wide(NAN), decay=0.75)
    assert advantages.tolist() == [[1, 3]] and baseline == 2  # nothing is known yet
    advantages, baseline = reinforce(wide([[4.0, NAN], [8.0, 6.0]]), baseline, decay=0.75)
    assert advantages.tolist() == [[2, 0], [6, 4]]
    assert baseline == 0.75 * 2 + 0.25 * 6
    advantages, unchanged = reinforce(wide([[NAN, NAN]]), baseline, decay=0.75)
    assert advantages.tolist() == [[0, 0]] and unchanged == baseline
    assert reinforce(wide([[NAN, NAN]]), wide(NAN), decay=0.75)[1].isnan()


def test_reinforce_does_not_use_a_rollout_for_its_own_baseline() -> None:
    scores = wide([[1.0, 3.0]])
    other = wide([[1.0, 30.0]])
    (first, after), (second, after_other) = (reinforce(x, wide(0.5), decay=0.9) for x in (scores, other))
    assert first[0, 0] == second[0, 0] == 0.5 and after != after_other


def test_reinforce_pp_by_hand() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    rewards = wide([[1.0, 2.0, NAN], [-1.0, NAN, NAN]])
    # to go: 1 + 0.5 * 2 = 2, 2, -1: mean 1, unbiased variance 3
    agree(reinforce_pp(rewards, mask, gamma=0.5), [[3**-0.5, 3**-0.5, 0], [-2 * 3**-0.5, 0, 0]], atol=1e-8)


def test_reinforce_pp_steps_over_holes() -> None:
    torch.manual_seed(6)
    rewards = torch.randn(2, 3, dtype=torch.float64)
    spread = torch.full((2, 5), NAN, dtype=torch.float64)
    mask = torch.tensor([[True, False, True, False, True]] * 2)
    spread[mask] = rewards.flatten()
    found = reinforce_pp(spread, mask, gamma=0.7)
    agree(found[mask].reshape(2, 3), reinforce_pp(rewards, torch.ones(2, 3, dtype=torch.bool), gamma=0.7))


def test_reinforce_pp_is_white_over_tokens() -> None:
    torch.manual_seed(4)
    mask = torch.arange(8) < torch.randint(1, 9, (6, 1))
    found = reinforce_pp(torch.randn(6, 8, dtype=torch.float64), mask, gamma=0.9)
    assert found[mask].mean().abs() < 1e-12 and abs(float(found[mask].var()) - 1) < 1e-6


def test_reinforce_pp_baseline_weighs_answers_by_their_tokens() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # 1, 1, 1, -1 around 0.5: unbiased variance 1
    found = reinforce_pp_baseline(wide([[3.0, 1.0]]), mask)
    agree(found, [[0.5, 0.5, 0.5], [-1.5, 0, 0]], atol=1e-7)


def test_reinforce_pp_baseline_leaves_out_what_cannot_be_compared() -> None:
    mask = torch.ones(4, 2, dtype=torch.bool)
    found = reinforce_pp_baseline(wide([[3.0, 1.0], [NAN, 5.0]]), mask)
    agree(found[:2], reinforce_pp_baseline(wide([[3.0, 1.0]]), mask[:2]))
    assert (found[2:] == 0).all()


def test_remax_by_hand() -> None:
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    penalties = wide([[-0.1, 0.2], [0.0, NAN], [-0.1, -0.1], [-0.1, -0.1]])
    found = remax(wide([1.0, 2.0, NAN, 1.0]), wide([0.5, 3.0, 0.0, NAN]), penalties, mask)
    agree(found, [[0.4, 0.7], [-1, 0], [0, 0], [0, 0]])
    # the score of an answer that is no better than the greedy one is no reason for anything
    assert (remax(wide([0.3] * 4), wide([0.3] * 4), torch.zeros(4, 2), mask) == 0).all()


def test_process_scores_are_normalised_over_steps_and_summed_from_each_token_on() -> None:
    # steps of one group: 1, 3 | 2, 2, 2 -> mean 2, unbiased variance 1/2
    step_scores = wide([[[NAN, 1.0, NAN, 3.0, NAN], [2.0, 2.0, NAN, NAN, 2.0]]])
    unit = 1 / (0.5**0.5 + 0.1)
    found = process_grpo(step_scores, eps=0.1)
    agree(found, [[[0.0, 0.0, unit, unit, 0.0], [0.0] * 5]])


def test_process_scores_match_a_loop() -> None:
    draw = random.Random(5)
    for _ in range(20):
        scores = [[[draw.choice([NAN, draw.gauss(0, 1)]) for _ in range(6)] for _ in range(3)] for _ in range(2)]
        found = process_grpo(wide(scores), eps=1e-2)
        for group, answers in zip(scores, found.tolist(), strict=True):
            steps = [s for answer in group for s in answer if s == s]
            judged = sum(any(s == s for s in answer) for answer in group)
            for answer, advantages in zip(group, answers, strict=True):
                for t, advantage in enumerate(advantages):
                    later = [s for s in answer[t:] if s == s]
                    mean, std = (statistics.fmean(steps), statistics.stdev(steps)) if judged > 1 else (0.0, 0.0)
                    expected = sum((s - mean) / (std + 1e-2) for s in later) if judged > 1 else 0.0
                    assert abs(advantage - expected) < 1e-9


def test_process_grpo_with_one_step_per_answer_is_grpo() -> None:
    torch.manual_seed(7)
    scores = torch.randn(3, 4, dtype=torch.float64)
    steps = torch.full((3, 4, 5), NAN, dtype=torch.float64)
    steps[..., 3] = scores
    found = process_grpo(steps, eps=1e-4)
    agree(found[..., :4], grpo(scores, eps=1e-4).unsqueeze(-1).expand(3, 4, 4))
    assert (found[..., 4] == 0).all()
    assert (process_grpo(torch.full((2, 3, 4), 0.3), eps=1e-6) == 0).all()


def test_gae_without_a_critic_and_discount_is_the_whitened_reward_to_go() -> None:
    torch.manual_seed(8)
    rewards, mask = torch.randn(3, 5, dtype=torch.float64), torch.arange(5) < torch.tensor([[5], [2], [4]])
    to_go, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    expected = torch.where(mask, (to_go - to_go[mask].mean()) / to_go[mask].std(), 0.0)
    agree(reinforce_pp(rewards, mask, gamma=1.0), expected, atol=1e-7)
