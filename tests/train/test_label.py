"""Pairs from scored answers."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from rlhf.recipe.stages import LabelBlock
from rlhf.train.label import compare, known, pair_rows

TEXTS = ["a", "b", "c", "d"]


def made(scores: list[float | None], texts: list[str] = TEXTS, **options: object) -> tuple[list, dict]:
    pairs, left_out = compare(texts, scores, LabelBlock(**options))
    return pairs, dict(left_out)


@pytest.mark.parametrize(
    ("scores", "options", "pairs", "left_out"),
    [
        ([1.0, 3.0, 2.0, -1.0], {}, [(1, 3)], {}),
        ([1.0, 3.0, 3.0, 1.0], {}, [(1, 0)], {}),  # the first of equal ones
        ([2.0, 2.0, 2.0, 2.0], {}, [], {"ties": 1}),
        ([None, 3.0, None, 1.0], {}, [(1, 3)], {}),
        ([None, 3.0, None, None], {}, [], {"too_few_scored": 1}),
        ([None] * 4, {"pairs": "all"}, [], {"too_few_scored": 1}),
        ([0.0, 1.0, 0.5, 0.25], {"min_margin": 1.0}, [], {"close": 1}),  # more than the margin, not as much as it
        ([0.0, 1.0, 0.5, 0.25], {"min_margin": 0.99}, [(1, 0)], {}),
        ([3.0, 1.0, 1.0, None], {"pairs": "all"}, [(0, 1), (0, 2)], {"ties": 1}),
        ([3.0, 1.0, 2.5, 0.0], {"pairs": "all", "min_margin": 1.0}, [(0, 1), (0, 3), (2, 1), (2, 3)], {"close": 2}),
    ],
)
def test_which_answers_make_pairs(scores, options, pairs, left_out):
    assert made(scores, **options) == (pairs, left_out)


def test_an_answer_is_never_paired_with_the_same_words():
    assert made([1.0, 0.0, 0.5, 0.5], ["a", "a", "b", "c"]) == ([], {"equal_texts": 1})
    pairs, left_out = made([1.0, 0.0, 0.5, 0.6], ["a", "a", "b", "c"], pairs="all")
    assert (0, 1) not in pairs and len(pairs) == 5 and left_out == {"equal_texts": 1}


@pytest.mark.parametrize("seed", range(5))
def test_every_two_answers_are_a_pair_or_have_a_reason(seed):
    rng = random.Random(seed)
    scores = [rng.choice([None, 0.0, 0.5, 1.0, 2.0]) for _ in range(7)]
    texts = [rng.choice("xyz") for _ in range(7)]
    pairs, left_out = made(scores, texts, pairs="all", min_margin=0.6, answers=7)
    expected = {
        (i, j)
        for i, j in itertools.permutations(range(7), 2)
        if scores[i] is not None and scores[j] is not None and scores[i] - scores[j] > 0.6 and texts[i] != texts[j]
    }
    assert set(pairs) == expected and len(pairs) == len(expected)
    scored = sum(score is not None for score in scores)
    assert len(pairs) + sum(left_out.values()) == math.comb(scored, 2)


def test_rows_are_paired_within_their_prompt():
    def answer(row: int, text: str, score: float | None, finished: bool = True) -> dict:
        prompt = [{"role": "user", "content": f"p{row}"}]
        return {"row": row, "prompt": prompt, "answer": text, "score": score, "finished": finished}

    answers = [answer(5, "a", 1.0), answer(5, "b", 4.0), answer(9, "c", 7.0), answer(9, "d", 7.0)]
    answers += [answer(11, "e", 1.0), answer(11, "f", 9.0, finished=False)]  # cut off: compared with nothing
    rows, left_out = pair_rows(answers, LabelBlock(answers=2))
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "p5"}],
            "chosen": "b",
            "rejected": "a",
            "score_margin": 3.0,
            "score_chosen": 4.0,
            "score_rejected": 1.0,
            "row": 5,
        }
    ]
    assert left_out == {"ties": 1, "unfinished": 1, "too_few_scored": 1}


def test_no_score_is_no_number():
    assert known(float("nan")) is None and known(0.0) == 0.0


@pytest.mark.parametrize(
    ("batch", "answers", "rollout_batch", "together"), [(256, 4, 64, 16), (8, 4, 64, 8), (8, 16, 4, 1)]
)
def test_prompts_sampled_together_depend_on_the_recipe_alone(batch, answers, rollout_batch, together):
    block = LabelBlock(batch=batch, answers=answers, rollout_batch=rollout_batch)
    assert block.prompts_together() == together
