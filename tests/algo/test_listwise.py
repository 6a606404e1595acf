"""Losses on lists: landmarks at the reference, ties, and what they become with two answers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algo.listwise import d2o, dpo_rw, exo_rw, lipo_lambda, listnet_softmax, pair_logistic, pl_dpo, pro, rrhf
from rlhf.algo.preference import dpo
from rlhf.batch import ListLogprobs, PairLogprobs


def lists(ratios: list[list[float]], scores: list[list[float]], present: list[list[int]] | None = None) -> ListLogprobs:
    logprobs = torch.tensor(ratios, dtype=torch.float64)
    there = torch.ones_like(logprobs, dtype=torch.bool) if present is None else torch.tensor(present).bool()
    zeros = torch.zeros_like(logprobs)
    return ListLogprobs(logprobs, zeros, zeros + 2, torch.tensor(scores, dtype=torch.float64), there)


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_at_the_reference_a_ranking_of_k_costs_log_k_factorial() -> None:
    given = lists([[0.0] * 4, [0.0] * 4], [[0.4, 0.3, 0.2, 0.1]] * 2, [[1, 1, 1, 1], [1, 0, 1, 1]])
    close(pl_dpo(given, beta=0.1), [math.log(24), math.log(6)])
    close(pair_logistic(given, beta=0.1), [6 * math.log(2), 3 * math.log(2)])
    close(listnet_softmax(given, beta=0.1), [math.log(4), math.log(3)])
    close(dpo_rw(given, beta_pi=0.1, beta_r=0.5), [math.log(4), math.log(3)])


def test_two_answers_are_a_pair() -> None:
    torch.manual_seed(0)
    ratios = torch.randn(5, 2, dtype=torch.float64)
    given = lists(ratios.tolist(), [[1.0, 0.0]] * 5)
    zeros = torch.zeros(5, dtype=torch.float64)
    expected = dpo(PairLogprobs(ratios[:, 0], ratios[:, 1], zeros, zeros, zeros, zeros), beta=0.7)
    for found in (pl_dpo(given, beta=0.7), pair_logistic(given, beta=0.7), d2o(given, beta=0.7, alpha=0.7)):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    # G = 1 apart, 1 / log 2 and 1 / log 3 apart
    weight = 1 / math.log(2) - 1 / math.log(3)
    torch.testing.assert_close(lipo_lambda(given, beta=0.7), weight * expected, atol=1e-12, rtol=0)


def test_equal_scores_are_not_put_in_an_order() -> None:
    given, turned = (lists([[1.0, a, b]], [[0.5, 0.9, 0.9]]) for a, b in ((3.0, -2.0), (-2.0, 3.0)))
    for loss in (pl_dpo, pair_logistic, listnet_softmax):
        torch.testing.assert_close(loss(given, beta=1.0), loss(turned, beta=1.0), atol=1e-12, rtol=0)
    # Breslow: both of the best are drawn from all three
    total = math.log(sum(math.exp(s) for s in (1.0, 3.0, -2.0)))
    close(pl_dpo(given, beta=1.0), [2 * total - 3.0 + 2.0])
    close(pair_logistic(lists([[1.0, 2.0]], [[0.3, 0.3]]), beta=1.0), [0.0])


def test_the_order_of_the_columns_does_not_matter() -> None:
    torch.manual_seed(0)
    ratios, scores = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5, dtype=torch.float64)
    order = [3, 0, 4, 1, 2]
    options = {"beta_pi": 0.3, "beta_r": 0.5}
    for loss, given in [(pl_dpo, {"beta": 0.3}), (lipo_lambda, {"beta": 0.3}), (exo_rw, options), (dpo_rw, options)]:
        found = loss(lists(ratios.tolist(), scores.tolist()), **given)
        turned = loss(lists(ratios[:, order].tolist(), scores[:, order].tolist()), **given)
        torch.testing.assert_close(found, turned, atol=1e-12, rtol=0)
    unsorted = pro(lists(ratios[:, order].tolist(), scores[:, order].tolist()), sft_weight=0.05)
    as_given = pro(lists(ratios.tolist(), scores.tolist()), sft_weight=0.05)
    torch.testing.assert_close(unsorted, as_given, atol=1e-12, rtol=0)


def test_matching_the_scores_is_the_smallest_divergence() -> None:
    scores = [[0.2, 0.5, 0.9]]
    matched = lists([[x / 0.1 for x in scores[0]]], scores)  # beta_pi r = score / beta_r
    close(exo_rw(matched, beta_pi=0.05, beta_r=2.0), [0.0])
    assert exo_rw(lists([[9.0, 5.0, 2.0]], scores), beta_pi=0.05, beta_r=2.0).item() > 1e-3


def test_a_right_order_costs_rrhf_only_the_best_answers_likelihood() -> None:
    close(rrhf(lists([[-2.0, -4.0, -6.0]], [[3.0, 2.0, 1.0]]), length_penalty=1.0, rank_weight=5.0), [2.0])
    close(rrhf(lists([[-4.0, -2.0]], [[1.0, 0.0]]), length_penalty=0.0, rank_weight=5.0), [4.0 + 5 * 2.0])


def test_equal_rewards_leave_pro_constant() -> None:
    close(pro(lists([[-4.0, -2.0, -9.0]], [[1.0, 1.0, 1.0]]), sft_weight=0.0), [math.log(3) + math.log(2)])


def test_scores_of_zero_give_listnet_nothing_to_learn() -> None:
    close(listnet_softmax(lists([[1.0, 2.0]], [[0.0, 0.0]]), beta=1.0), [0.0])


@pytest.mark.parametrize("present", [[1, 0, 0], [0, 0, 0]])
def test_a_list_with_nothing_to_compare_is_finite(present: list[int]) -> None:
    given = lists([[-1.0, -2.0, -3.0]], [[0.5, 0.2, 0.1]], [present])
    given.logprobs.requires_grad_()
    found = [pl_dpo(given, beta=1.0), pair_logistic(given, beta=1.0), lipo_lambda(given, beta=1.0)]
    found += [exo_rw(given, beta_pi=1.0, beta_r=1.0), pro(given, sft_weight=0.0)]
    assert all(losses.tolist() == [0.0] for losses in found)
    (grad,) = torch.autograd.grad(torch.stack(found).sum(), given.logprobs)
    assert (grad == 0).all()
