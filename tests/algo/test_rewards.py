"""Scores, and scores into token rewards, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.algo.masked import moments
from rlhf.algo.rewards import normalise_running, overlong_punishment, preference_scores, process_scores, shape_rewards

OFF: dict[str, Any] = {
    "clip": None,
    "missing_eos_penalty": 0.0,
    "missing_eos_score": None,
    "length_penalty": 0.0,
    "overlong_buffer": 0,
    "overlong_penalty": 1.0,
}
SCORES = torch.tensor([7.0, -9.0, 0.5, -0.5])
FINISHED = torch.tensor([True, False, False, True])
LENGTHS = torch.tensor([2, 10, 8, 9])


def processed(scores: Tensor = SCORES, **options: Any) -> list[float]:
    return process_scores(scores, FINISHED, LENGTHS, 10, **{**OFF, **options}).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [7, -9, 0.5, -0.5]),
        ({"clip": 5.0}, [5, -5, 0.5, -0.5]),
        ({"missing_eos_penalty": 1.0}, [7, -10, -0.5, -0.5]),
        ({"clip": 5.0, "missing_eos_penalty": 1.0}, [5, -6, -0.5, -0.5]),  # felt at the limit too
        ({"missing_eos_score": -1.0}, [7, -1, -1, -0.5]),
        ({"missing_eos_score": 0.0, "missing_eos_penalty": 3.0, "clip": 1.0}, [1, 0, 0, -0.5]),
        ({"length_penalty": 0.5}, [6, -14, -3.5, -5]),
        ({"overlong_buffer": 4, "overlong_penalty": 2.0}, [7, -11, -0.5, -2]),
        ({"missing_eos_score": -1.0, "length_penalty": 0.5, "overlong_buffer": 4}, [6, -7, -5.5, -5.75]),
    ],
)
def test_scores_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    assert processed(**options) == expected


def test_every_option_off_is_the_score() -> None:
    assert torch.equal(process_scores(SCORES, FINISHED, LENGTHS, 10, **OFF), SCORES)
    assert process_scores(SCORES.bfloat16(), FINISHED, LENGTHS, 10, **OFF).dtype == torch.float32
    assert process_scores(SCORES.double(), FINISHED, LENGTHS, 10, **OFF).dtype == torch.float64


def test_an_unscored_answer_stays_unscored() -> None:
    everything = {
        "clip": 1.0,
        "missing_eos_penalty": 1.0,
        "missing_eos_score": -1.0,
        "length_penalty": 1.0,
        "overlong_buffer": 5,
        "overlong_penalty": 1.0,
    }
    found = process_scores(torch.full((4,), torch.nan), FINISHED, LENGTHS, 10, **everything)
    assert found.isnan().all()


def test_overlong_answers_pay_from_the_buffer_on() -> None:
    lengths = torch.tensor([0, 6, 7, 8, 9, 10, 11, 50])
    found = overlong_punishment(lengths, 10, buffer=4, penalty=2.0)
    assert found.tolist() == [0, 0, -0.5, -1, -1.5, -2, -2, -2]
    assert overlong_punishment(lengths, 10, buffer=0, penalty=2.0).tolist() == [0] * 8
    # a buffer of one token: only the longest answer pays
    assert overlong_punishment(lengths, 10, buffer=1, penalty=2.0).tolist() == [0, 0, 0, 0, 0, -2, -2, -2]


def test_running_normalisation_uses_all_scores_so_far() -> None:
    earlier = torch.tensor([1.0, 2.0, 3.0, torch.nan])
    now = torch.tensor([4.0, torch.nan, 5.0])
    seen = moments(earlier, ~earlier.isnan()) + moments(now, ~now.isnan())
    found = normalise_running(now, seen)
    # 1 to 5: mean 3, variance 2.5
    expected = torch.tensor([1 / 2.5**0.5, torch.nan, 2 / 2.5**0.5])
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0, equal_nan=True)


def test_running_normalisation_of_equal_scores_is_0() -> None:
    scores = torch.full((5,), 0.3)
    assert (normalise_running(scores, moments(scores, ~scores.isnan())) == 0).all()
    one = torch.tensor([0.7, torch.nan])
    found = normalise_running(one, moments(one, ~one.isnan()))
    assert found[0] == 0 and found[1].isnan()


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


def test_preferences_are_even_between_equals_and_change_sign():
    scores, others = torch.tensor([0.0, 2.0, math.log(3.0)]), torch.tensor([0.0, torch.nan, 0.0])
    found = preference_scores(scores, others)
    assert found[0] == 0 and found[1].isnan() and float(found[2]) == pytest.approx(0.25, abs=1e-6)
    torch.testing.assert_close(found, -preference_scores(others, scores), equal_nan=True, atol=1e-7, rtol=0)
