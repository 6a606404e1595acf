"""The embedded task: the gold reward by hand, its optimum by search, labels by simulation, files by seed."""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics

import pytest

from rlhf.data.demo import (
    CAP,
    FLOOR,
    JUDGE_TEMPLATE,
    SOFTNESS,
    DemoSizes,
    bayes_accuracy,
    demo_rows,
    gold_reward,
    held_out,
    join,
    lists,
    optimum,
    pairs,
    preference,
    reasons,
    score_of,
    sentiment,
    write_demo_data,
)
from rlhf.data.grammar import go_on, parses, render, tokenize

SMALL = DemoSizes(
    sft=300,
    pairs=300,
    prompts=200,
    eval_prompts=100,
    eval_pairs=150,
    lists=200,
    eval_lists=50,
    judgements=300,
    eval_judgements=100,
)
PROMPT = "we saw this western at the festival"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the plot was sharp", 1.0),
        ("the plot was really sharp", 1.5),
        ("the plot was slightly sharp", 1.0),  # not a word of the grammar: no degree
        ("the plot was rather sharp", 0.5),
        ("the plot was not sharp", -0.5),
        ("the plot was not really sharp", -0.75),
        ("the plot was never dull", 0.5),
        ("the plot was dull and stale", -2.0),
        ("the plot was busy", 0.0),
        ("i truly loved the plot, but i hated the cast", 0.5),
        ("the plot was sharp and sharp", 1.0),  # a repeated word adds nothing
        ("really the plot was sharp", 1.0),  # a degree is for the next word only
        ("not the plot was sharp", 1.0),
        ("", 0.0),
    ],
)
def test_sentiment(text, expected):
    assert sentiment(tokenize(text)) == expected


def test_gold_reward_by_hand():
    better = " in march, and the script was really sharp, but i hated the ending."
    assert gold_reward(PROMPT, better) == pytest.approx(CAP * math.tanh(0.5 / SOFTNESS), abs=1e-12)
    assert gold_reward(PROMPT, better.strip()) == gold_reward(PROMPT, better), "a missing space between both is put in"
    assert gold_reward(PROMPT, better[:-1]) == FLOOR
    assert gold_reward(PROMPT, " sharp sharp sharp sharp.") == FLOOR
    assert gold_reward(PROMPT, "") == FLOOR
    assert gold_reward("the plot was not", " dull, and i liked the cast.") > 0, "the prompt's words count too"


def test_reward_is_bounded_and_diverse():
    rows = demo_rows("sft", sizes=SMALL)
    rewards = [gold_reward(row["prompt"], row["completion"]) for row in rows]
    assert all(FLOOR < reward < CAP for reward in rewards)
    assert statistics.stdev(rewards) > 1.5
    assert abs(statistics.mean(rewards)) < 0.5
    best = statistics.mean(optimum(row["prompt"]) for row in rows)
    assert best - statistics.mean(rewards) > 3


def test_optimum_bounds_every_continuation():
    rng = random.Random(0)
    for row in demo_rows("eval_prompts", sizes=SMALL):
        beginning = tokenize(row["prompt"])
        bound = optimum(row["prompt"])
        answers = [render(beginning + go_on(beginning, rng))[len(row["prompt"]) :] for _ in range(40)]
        found = max(gold_reward(row["prompt"], answer) for answer in answers)
        assert FLOOR < found <= bound + 1e-12 <= CAP


@pytest.mark.parametrize(
    ("prompt", "best"),
    [
        (
            "we saw this western",
            "at the club in may, and the plot was truly sharp and funny, and the cast was very warm and lively.",
        ),
        (
            "the plot was not",
            "really dull, and the cast was truly sharp and funny, and the score was very warm and lively.",
        ),
        ("i hated the plot, and the cast was truly sharp, and the", "score was truly warm and lively."),
        (
            "i hated the plot, but we saw this western near the club with my",
            "aunt, and the cast was really sharp and warm.",
        ),
    ],
)
def test_optimum_is_attained(prompt, best):
    assert parses(join(prompt, best))
    assert gold_reward(prompt, best) == pytest.approx(optimum(prompt), abs=1e-12)


def test_optimum_equals_exhaustive_search():
    # Near the end of a review few class sequences are left: try all of them with words that are not used before.
    prompt = "we saw this western at the club in may, and i loved the plot, and the cast was"
    words = ["sharp", "warm", "dull", "really", "not", "and", "."]
    endings = (render(e) for length in range(1, 6) for e in itertools.product(words, repeat=length))
    assert max(gold_reward(prompt, ending) for ending in endings) == pytest.approx(optimum(prompt), abs=1e-12)


def test_optimum_of_no_beginning():
    assert optimum("purple prose") == FLOOR


def test_damaged_answers_are_a_minority_that_the_reward_sees():
    rows = demo_rows("pairs", sizes=SMALL)
    answers = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    damaged = [answer for answer in answers if not parses(join(*answer))]
    assert 0.05 < len(damaged) / len(answers) < 0.12
    assert all(gold_reward(*answer) == FLOOR for answer in damaged)


def test_bayes_accuracy_matches_simulation():
    rows = list(itertools.islice(pairs(random.Random(1), evaluation=True), 1500))
    hits = 0.0
    for row in rows:
        better, worse = (gold_reward(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        hits += 0.5 if better == worse else better > worse
    ceiling = bayes_accuracy(rows)
    assert 0.75 < ceiling < 0.92
    assert hits / len(rows) == pytest.approx(ceiling, abs=4 * math.sqrt(ceiling * (1 - ceiling) / len(rows)))


def test_preference():
    assert preference(0.0, 0.0) == 0.5
    assert preference(1.0, 0.0) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-12)
    assert preference(2.0, -1.0) + preference(-1.0, 2.0) == pytest.approx(1, abs=1e-12)
    rows = [{"prompt": PROMPT, "chosen": "x", "rejected": "y"}]
    assert bayes_accuracy(rows) == 0.5, "both at the floor"


def test_lists_are_ordered_by_plackett_luce():
    """How often each answer is the best, and how often the first beats the second, as the gold rewards have it."""
    rows = list(itertools.islice(lists(random.Random(1), evaluation=False), 2000))
    is_best, is_better, spread = 0.0, 0.0, 0.0
    for row in rows:
        gold = [gold_reward(row["prompt"], answer) for answer in row["answers"]]
        assert len(set(row["answers"])) == len(row["scores"]) == 4
        chance = math.exp(gold[0]) / sum(map(math.exp, gold))
        first, second = row["scores"][:2]
        is_best += (max(row["scores"]) == first) - chance
        is_better += (first > second) - preference(gold[0], gold[1])
        spread += chance * (1 - chance)
    assert abs(is_best) < 4 * math.sqrt(spread)
    assert abs(is_better) < 4 * math.sqrt(len(rows) / 4)
    noise = statistics.mean(row["scores"][2] - gold_reward(row["prompt"], row["answers"][2]) for row in rows)
    assert noise == pytest.approx(0.5772, abs=4 * math.pi / math.sqrt(6 * len(rows)))


def test_files(tmp_path):
    paths = write_demo_data(tmp_path / "a", 5, SMALL)
    again = write_demo_data(tmp_path / "b", 5, SMALL)
    other = write_demo_data(tmp_path / "c", 6, SMALL)
    answered = {"prompt", "completion"}
    keys = {
        "sft": answered,
        "judgements": answered,
        "eval_judgements": answered,
        "prompts": {"prompt"},
        "eval_prompts": {"prompt"},
    }
    keys |= {name: {"prompt", "answers", "scores"} for name in ("lists", "eval_lists")}
    for name, path in paths.items():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert path.read_bytes() == again[name].read_bytes() != other[name].read_bytes()
        assert len(rows) == vars(SMALL)[name] == len(set(map(str, rows)))
        assert rows == demo_rows(name, 5, SMALL)
        assert all(row.keys() == (keys[name] if name in keys else {"prompt", "chosen", "rejected"}) for row in rows)
    assert paths.keys() == {*keys, "pairs", "eval_pairs"}


def test_held_out_prompts_are_in_no_training_file():
    for name in (name for name in vars(SMALL) if not name.endswith("judgements")):
        for seed in (0, 1):
            prompts = {row["prompt"] for row in demo_rows(name, seed, SMALL)}
            assert all(held_out(prompt) == name.startswith("eval_") for prompt in prompts)


def test_prompt_and_completion_make_a_review():
    for row in demo_rows("sft", sizes=SMALL):
        assert parses(row["prompt"] + row["completion"])
        assert join(row["prompt"], row["completion"]) == row["prompt"] + row["completion"]
        assert 4 <= len(tokenize(row["prompt"])) <= 9


@pytest.mark.parametrize(
    ("gold", "score"),
    [(-4.0, 0), (-2.67, 0), (-2.66, 1), (-1.0, 2), (0.0, 3), (1.4, 4), (2.66, 4), (2.67, 5), (4.0, 5)],
)
def test_scores_are_six_equal_parts_of_the_gold_reward(gold, score):
    assert score_of(gold) == score


def test_a_judgement_gives_a_sign_per_word_that_counts_and_the_score():
    assert reasons("we saw this western at the club in may, and the cast was not sharp, but i loved the plot.") == "- +"
    assert reasons("we saw this western at the club in may, and the cast was sharp and the.") == "?"
    assert reasons("we saw this western at the club in may, and the cast was quiet.") == "0"


def test_judgements_are_of_reviews_on_their_own_side():
    for name in ("judgements", "eval_judgements"):
        rows = demo_rows(name, sizes=SMALL)
        for row in rows:
            text = row["prompt"].removeprefix(JUDGE_TEMPLATE.partition("{")[0]).removesuffix("\n")
            said, _, score = row["completion"].rpartition(" Score: ")
            assert said == reasons(text)
            first, _, rest = text.partition(" ")
            assert int(score) == score_of(gold_reward(first, rest))
        assert {row["completion"][-1] for row in rows} == set("012345")
    both = [{row["prompt"] for row in demo_rows(name, sizes=SMALL)} for name in ("judgements", "eval_judgements")]
    assert not both[0] & both[1]
