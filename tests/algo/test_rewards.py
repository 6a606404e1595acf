"""Scores into token rewards, by hand."""

from __future__ import annotations

import torch

from rlhf.algo.rewards import process_scores, shape_rewards


def test_clip_comes_before_the_penalty() -> None:
    scores, finished = torch.tensor([7.0, -9.0, 0.5, -0.5]), torch.tensor([True, False, False, True])
    found = process_scores(scores, finished, clip=5.0, missing_eos_penalty=1.0)
    assert found.tolist() == [5, -6, -0.5, -0.5]
    assert process_scores(scores, finished, clip=None, missing_eos_penalty=0.0).tolist() == scores.tolist()


def test_an_unscored_answer_stays_unscored() -> None:
    found = process_scores(torch.tensor([torch.nan]), torch.tensor([False]), clip=1.0, missing_eos_penalty=1.0)
    assert found.isnan().all()


def test_score_stands_on_the_last_response_token() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    kl = torch.full((4, 4), 2.0, dtype=torch.float64)
    found = shape_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64), kl, mask, kl_coef=0.5)
    assert found.tolist() == [[-1, -1, 0, 0], [1, 0, 0, 0], [-1, 0, 2, 0], [0, 0, 0, 0]]


def test_padding_and_unscored_rows_stay_clean() -> None:
    mask = torch.tensor([[1, 0], [0, 0]], dtype=torch.bool)
    kl = torch.tensor([[1.0, torch.inf], [torch.nan, torch.nan]])
    assert shape_rewards(torch.tensor([1.0, torch.nan]), kl, mask, kl_coef=0.1).tolist() == [
        [0.8999999761581421, 0],
        [0, 0],
    ]


def test_the_undiscounted_sum_is_score_less_weighted_sequence_kl() -> None:
    torch.manual_seed(0)
    mask = torch.arange(7) < torch.randint(1, 8, (5, 1))
    scores, kl = torch.randn(5, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    found = shape_rewards(scores, kl, mask, kl_coef=0.3).sum(-1)
    torch.testing.assert_close(found, scores - 0.3 * (kl * mask).sum(-1), atol=1e-12, rtol=0)
