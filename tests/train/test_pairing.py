"""What is made of scored answers."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from rlhf.recipe.stages import LabelBlock
from rlhf.train.pairing import Group, best_of_n, best_rows, compare, first_round, list_rows, pair_rows

TEXTS = ["a", "b", "c", "d"]


def made(scores: list[float | None], texts: list[str] = TEXTS, number: int = 0, **options: Any) -> tuple[list, dict]:
    rows = [{"answer": text} for text in texts]
    pairs, left_out = compare(Group(number, rows, scores, 0), LabelBlock(**options))
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
        ([None] * 4, {"pairs": "rso"}, [], {"too_few_scored": 1}),
        ([1.0, 2.0, None, None], {"pairs": "rso"}, [(1, 0)], {}),  # fewer than are wanted: all are accepted
        ([2.0, 2.0, None, None], {"pairs": "rso"}, [], {"ties": 1}),
    ],
)
def test_which_answers_make_pairs(scores, options, pairs, left_out):
    assert made(scores, **options) == (pairs, left_out)


def test_an_answer_is_never_paired_with_the_same_words():
    assert made([1.0, 0.0, 0.5, 0.5], ["a", "a", "b", "c"]) == ([], {"equal_texts": 1})
    pairs, left_out = made([1.0, 0.0, 0.5, 0.6], ["a", "a", "b", "c"], pairs="all")
    assert (0, 1) not in pairs and len(pairs) == 5 and left_out == {"equal_texts": 1}
    pairs, left_out = made([1.0, 0.0, 0.5, None], ["a", "a", "b", "c"], pairs="rso")
    assert pairs == [(0, 2)] and left_out == {"equal_texts": 1}
    assert made([1.0, 0.0, 0.5, 2.0], ["a"] * 4, pairs="rso") == ([], {"equal_texts": 3, "too_few_scored": 1})


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


# --- rejection sampling ---------------------------------------------------------------------------------------------


def test_accepted_answers_meet_two_by_two():
    scored = [(i, float(i % 13) + i / 100) for i in range(64)]
    label = LabelBlock(answers=64, pairs="rso", rso={"accept": 8, "beta": 2.0})
    met = first_round(scored, label, 0)
    assert len(met) == 4 and len({i for pair in met for i, _ in pair}) == 8, "nobody meets twice"
    assert met == first_round(scored, label, 0) != first_round(scored, label, 1), "chance depends on the prompt"
    everybody = [score for number in range(40) for pair in first_round(scored, label, number) for _, score in pair]
    assert sum(everybody) / len(everybody) > 9, "the mean of all is 6.3: good ones are accepted"
    top = LabelBlock(answers=64, pairs="rso", rso={"accept": 8, "beta": 1e-9})
    chosen = {i for pair in first_round(scored, top, 3) for i, _ in pair}
    assert chosen == {i for i, _ in sorted(scored, key=lambda item: -item[1])[:8]}


def test_of_an_odd_number_one_meets_nobody():
    pairs, left_out = made([1.0, 2.0, 3.0, None], pairs="rso")
    assert len(pairs) == 1 and not left_out


# --- rows -----------------------------------------------------------------------------------------------------------


def answer(row: int, text: str, score: float | None, finished: bool = True) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"p{row}"}]
    return {"row": row, "prompt": prompt, "answer": text, "score": score, "finished": finished}


ANSWERS = [
    *(answer(5, "a", 1.0), answer(5, "b", 4.0)),
    *(answer(9, "c", 7.0), answer(9, "d", 7.0)),
    *(answer(11, "e", 1.0), answer(11, "f", 9.0, finished=False)),  # cut off: compared with nothing
    *(answer(12, "g", None), answer(12, "h", None)),
]


def test_rows_are_paired_within_their_prompt():
    rows, left_out = pair_rows(ANSWERS, LabelBlock(answers=2))
    high = 1 / (1 + math.exp(-3))
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "p5"}],
            "chosen": "b",
            "rejected": "a",
            "score_margin": 3.0,
            "score_chosen": 4.0,
            "score_rejected": 1.0,
            "win_rate_chosen": pytest.approx(high, abs=1e-12),
            "win_rate_rejected": pytest.approx(1 - high, abs=1e-12),
            "row": 5,
        }
    ]
    assert left_out == {"ties": 1, "unfinished": 1, "too_few_scored": 2}


def test_win_rates_are_against_all_answers_that_take_part():
    four = [answer(1, text, score) for text, score in zip(TEXTS, [0.0, 1.0, None, 5.0], strict=True)]
    (row,), _ = pair_rows(four, LabelBlock())
    sigmoid = [1 / (1 + math.exp(-gap)) for gap in (5.0, 4.0)]
    assert row["win_rate_chosen"] == pytest.approx(sum(sigmoid) / 2, abs=1e-12)


def test_a_part_of_the_prompts_makes_the_pairs_that_it_makes_among_all():
    rng = random.Random(0)
    answers = [answer(n, f"{n} {g}", rng.gauss(0, 1)) for n in range(12) for g in range(8)]
    label = LabelBlock(answers=8, pairs="rso", rso={"accept": 4, "beta": 0.5})
    whole, _ = pair_rows(answers, label)
    parts = [pair_rows(answers[start : start + 32], label, first=start // 8)[0] for start in (0, 32, 64)]
    assert whole == [row for part in parts for row in part] and len(whole) == 24


def test_the_best_answer_to_each_prompt():
    rows = best_rows(ANSWERS, LabelBlock(answers=2))
    assert [(row["completion"], row["score"], row["row"]) for row in rows] == [
        ("b", 4.0, 5),
        ("c", 7.0, 9),
        ("e", 1.0, 11),
    ]
    assert best_rows(ANSWERS, LabelBlock(answers=2, unfinished="keep"))[2]["completion"] == "f"


def test_lists_hold_each_text_once():
    four = [answer(3, text, score) for text, score in zip("aabc", [1.0, 0.0, 2.0, None], strict=True)]
    assert list_rows(four, LabelBlock()) == [
        {"prompt": [{"role": "user", "content": "p3"}], "answers": ["a", "b"], "scores": [1.0, 2.0], "row": 3}
    ]
    assert list_rows([answer(3, "a", 1.0) for _ in range(4)], LabelBlock()) == []


def test_best_of_n_over_prompts_with_all_their_scores():
    first, second = [0.0, 1.0, 2.0], [3.0, 3.0, 0.0]
    answers = [answer(n, "x", score, finished=False) for n, scores in enumerate((first, second)) for score in scores]
    answers += [answer(2, "x", score) for score in (100.0, None, 100.0)]
    found = best_of_n(answers, LabelBlock(answers=3))
    assert found["prompts"] == 2 and [point["n"] for point in found["curve"]] == [1, 2, 3]
    assert [point["score"] for point in found["curve"]] == pytest.approx([1.5, (5 / 3 + 3) / 2, 2.5], abs=1e-12)
    bounds = [0.0, math.log(2) - 1 / 2, math.log(3) - 2 / 3]
    assert [point["kl_bound"] for point in found["curve"]] == pytest.approx(bounds, abs=1e-12)
    assert best_of_n(answers[-3:], LabelBlock(answers=3)) == {"prompts": 0, "curve": []}
