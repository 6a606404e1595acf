"""Verdicts by hand: read off replies, both orders as one, win rates, pairs, counts."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from rlhf.recipe.judge_options import PAIRWISE, RUBRIC, PairwiseJudge, RubricJudge
from rlhf.rewards import verdicts
from rlhf.rewards.verdicts import both_orders, comparison, decided_pairs, fill, points, preference, share, win_rate

PAIRWISE_VERDICT = PairwiseJudge.model_fields["verdict"].default
SCORE = RubricJudge.model_fields["verdict"].default


def test_a_template_is_filled_once_whatever_stands_in_the_texts():
    texts = {"prompt": "{answer} {x}", "answer": r"{prompt} \1 }{"}
    assert fill("{prompt}|{answer}|{other}|{", texts) == r"{answer} {x}|{prompt} \1 }{|{other}|{"
    for template, fields in ((PAIRWISE, ("prompt", "first", "second")), (RUBRIC, ("prompt", "answer"))):
        filled = fill(template, {name: f"<{name}>" for name in fields})
        assert all(filled.count(f"\n<{name}>\n") == 1 for name in fields) and "{" not in filled


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Preferred=1", 1.0),
        ("Preferred=2", 0.0),
        ("I waver.\nPreferred = tie.", 0.5),
        ("The answer says Preferred=1, but\nPreferred=2", 0.0),  # the last one counts: what is quoted comes before
        ("Preferred=3", "unparsable"),
        ("preferred=1", "unparsable"),
        ("", "unparsable"),
        ("<html>", "unparsable"),
    ],
)
def test_a_preference(reply, verdict):
    assert preference(reply, PAIRWISE_VERDICT) == verdict


def test_a_pattern_may_find_other_things_or_nothing_in_its_group():
    assert preference("A", "(A|B)") == "unparsable"
    assert preference("none", "none|([12])") == "unparsable"
    assert preference("Tie", "(1|2|Tie)") == 0.5


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 4", 4.0),
        ("Score: 4/5", 4.0),
        ("Score: 3.5", 3.5),
        ("Score:0", 0.0),
        ("It says Score: 5. No.\nScore: 2", 2.0),
        ("Score: 6", "unparsable"),
        ("Score: 45", "unparsable"),
        ("Score: -1", "unparsable"),
        ("Score: five", "unparsable"),
        ("Score: " + "9" * 400, "unparsable"),
    ],
)
def test_points(reply, score):
    assert points(reply, SCORE) == score
    assert points("Score: many", "Score: (.*)") == "unparsable"


def test_a_soft_verdict_is_the_softmax_of_both_tokens():
    top = [{"token": "1", "logprob": math.log(0.6)}, {"token": "2", "logprob": math.log(0.2)}]
    said = [{"token": "Preferred", "top_logprobs": []}, {"token": "=", "top_logprobs": []}]
    assert share([*said, {"token": "1", "top_logprobs": top}], PAIRWISE_VERDICT) == pytest.approx(0.75)
    joined = [{**each, "token": "=" + each["token"]} for each in top]  # where one token holds more than the number
    assert share([said[0], {"token": "=1", "top_logprobs": joined}], PAIRWISE_VERDICT) == pytest.approx(0.75)
    spelled = [*top, {"token": " 1", "logprob": math.log(0.2)}, {"token": "x", "logprob": 0.0}]
    assert share([*said, {"token": "2", "top_logprobs": spelled}], PAIRWISE_VERDICT) == pytest.approx(0.8)


@pytest.mark.parametrize(
    "logprobs",
    [
        None,
        [],
        3,
        [{"token": "Preferred="}, {"token": "1"}],
        [
            {"token": "Preferred=1", "top_logprobs": [{"token": "Preferred=1", "logprob": -1.0}]}
        ],  # of 2 nothing is known
        [{"token": "Preferred=1", "top_logprobs": [{"token": "x"}]}],
        [{"token": "maybe", "top_logprobs": []}],
    ],
)
def test_a_soft_verdict_without_both_probabilities_is_none(logprobs):
    assert share(logprobs, PAIRWISE_VERDICT) == "unparsable"


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        (1.0, 0.0, (1.0, "decided")),
        (0.0, 1.0, (0.0, "decided")),
        (1.0, 1.0, (0.5, "disagreed")),
        (0.0, 0.0, (0.5, "disagreed")),
        (0.5, 0.5, (0.5, "ties")),
        (1.0, 0.5, (0.5, "ties")),
        (0.5, 1.0, (0.5, "ties")),
        ("unparsable", 1.0, (None, "unparsable")),
        (1.0, "missing", (None, "missing")),
        ("unparsable", "missing", (None, "missing")),
    ],
)
def test_both_orders(first, second, found):
    assert both_orders(first, second, soft=False) == found


def test_soft_orders_are_averaged_and_swap():
    assert both_orders(0.9, 0.4, soft=True) == (pytest.approx(0.75), "decided")
    assert both_orders(0.8, 0.8, soft=True) == (0.5, "ties")
    for a, b in itertools.product([0.1, 0.5, 0.7], repeat=2):
        assert both_orders(a, b, soft=True)[0] == pytest.approx(1 - both_orders(b, a, soft=True)[0], abs=1e-12)
    assert both_orders(0.3, "unparsable", soft=True) == (None, "unparsable")


def row(*said: tuple[int, float | str, float | str]) -> dict:
    return {"comparisons": [comparison(j, a, b, soft=False) for j, a, b in said]}


GROUP = [
    row((1, 1.0, 0.0), (2, 0.0, 1.0), (3, 0.5, 0.5)),  # beats 1, loses to 2, ties with 3
    row((2, 1.0, 0.0), (3, "missing", 1.0)),  # beats 2
    row((3, 1.0, 1.0)),  # each order prefers another
    row(),
]


def test_a_win_rate_is_the_share_of_comparisons_won_ties_half():
    found = verdicts.shares(GROUP)
    assert [win_rate(i, found) for i in range(4)] == [0.5, 0.5, pytest.approx(0.5), 0.5]
    assert win_rate(0, verdicts.shares([row((1, 1.0, 0.0)), row()])) == 1.0
    assert win_rate(0, verdicts.shares([row((1, "missing", 0.0)), row()])) is None


def test_decided_pairs_go_round_in_circles_if_the_judge_does():
    pairs, left_out = decided_pairs(GROUP, range(4), 0.0)
    assert pairs == [(0, 1), (2, 0), (1, 2)] and left_out == {"ties": 2, "unjudged": 1}
    pairs, left_out = decided_pairs(GROUP, [0, 1], 0.0)
    assert pairs == [(0, 1)] and not left_out
    assert decided_pairs(GROUP, [2], 0.0) == ([], {"too_few_scored": 1})
    pairs, left_out = decided_pairs([row(), row()], range(2), 0.0)  # the same text is compared with nothing
    assert pairs == [] and left_out == {"equal_texts": 1}
    soft = [{"comparisons": [comparison(1, 0.7, 0.5, soft=True)]}, row()]  # 0.6 against 0.4
    assert decided_pairs(soft, range(2), 0.19) == ([(0, 1)], {})
    assert decided_pairs(soft, range(2), 0.21) == ([], {"close": 1})


@pytest.mark.parametrize("seed", range(5))
def test_win_rates_of_a_group_have_the_mean_one_half(seed):
    """Where every comparison came to something: what one wins the other loses."""
    rng = random.Random(seed)
    group = [
        row(*((j, rng.choice([0.0, 0.5, 1.0]), rng.choice([0.0, 0.5, 1.0])) for j in range(i + 1, 5))) for i in range(5)
    ]
    found = verdicts.shares(group)
    assert sum(win_rate(i, found) for i in range(5)) / 5 == pytest.approx(0.5, abs=1e-12)
    pairs, left_out = decided_pairs(group, range(5), 0.0)
    assert len(pairs) + left_out["ties"] == 10
    assert all(found[better, worse] == 1.0 for better, worse in pairs)


def test_votes_that_cannot_be_read_are_left_out_of_the_mean():
    assert verdicts.mean_score([4.0, "unparsable", 5.0]) == 4.5
    assert verdicts.mean_score(["unparsable", "missing"]) is None
    rows = [{"votes": [4.0, "unparsable"]}, {"votes": []}, {"votes": ["too_long", "too_long"]}]
    assert verdicts.counted(rows) == {"votes": 1, "unparsable": 1, "too_long": 2}
    assert verdicts.metrics(rows) == {
        "judge/votes": 1.0, "judge/unparsable": 1.0, "judge/missing": 0.0, "judge/too_long": 2.0
    }  # fmt: skip


def test_comparisons_are_counted_by_what_they_came_to():
    found = verdicts.metrics(GROUP)
    assert found == {
        "judge/decided": 3.0, "judge/ties": 1.0, "judge/disagreed": 1.0, "judge/unparsable": 0.0, "judge/missing": 1.0,
        "judge/first": pytest.approx((1 + 0 + 0 + 1 + 0.5 + 0.5 + 1 + 0 + 1 + 1 + 1) / 11),
    }  # fmt: skip
    assert verdicts.metrics([{"score": 1.0}]) == {}
