"""Answers beside prompts that they do not belong to."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.data.examples import AnswerExample
from rlhf.data.mismatch import partners
from rlhf.errors import DataError


def answer(prompt: int, length: int = 3, prompt_length: int = 2, row: int = 0) -> AnswerExample:
    mask = np.ones(length, np.bool_)
    return AnswerExample(
        np.full(prompt_length, prompt, np.int32), np.zeros(length, np.int32), mask, True, 1.0, 0.5, row
    )


def test_different_prompts_make_one_circle_that_belongs_to_the_seed() -> None:
    examples = [answer(n) for n in range(50)]
    found = partners(examples, 0, 100)
    assert found == partners(examples, 0, 100) != partners(examples, 1, 100)
    at, seen = 0, []
    for _ in examples:
        at = found[at]
        seen.append(at)
    assert sorted(seen) == list(range(50))


@pytest.mark.parametrize("seed", range(5))
def test_a_partner_has_another_prompt_and_an_answer_that_fits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    examples = [answer(int(p), int(n)) for p, n in zip(rng.integers(0, 3, 200), rng.integers(1, 20, 200), strict=True)]
    examples += [answer(7, 20), answer(0, 1), answer(1, 1)]
    for row, partner in enumerate(partners(examples, seed, 12)):
        assert examples[partner].prompt_ids[0] != examples[row].prompt_ids[0]
        assert len(examples[row].prompt_ids) + len(examples[partner].answer_ids) <= 12


def test_the_next_row_that_can_be_taken_is_taken() -> None:
    examples = [answer(0), answer(0), answer(0), answer(1)]
    assert partners(examples, 0, 100)[:3] == [3, 3, 3]


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(DataError, match="data: expected answers to different prompts, found the same prompt in every"):
        partners([answer(1), answer(1)], 0, 100)
    rows = [answer(1, 3, row=4), answer(2, 9, row=5)]
    with pytest.raises(DataError, match=r"data.max_length: .* found none for row 4, whose prompt leaves 8 tokens"):
        partners(rows, 0, 10)
