"""Shifted pairs: what is new about them and nothing else, labels by the gold reward, reproducible."""

from __future__ import annotations

import math

import pytest

from rlhf.data.demo import demo_rows, gold_reward, held_out, preference
from rlhf.data.grammar import EDGES, LEXICON, POLARITY, RULES, VOCABULARY, compile_rules, parses, render, tokenize
from rlhf.data.shifts import EXCHANGED, MUSIC, OTHER_EDGES, OTHER_RULES, SHIFTS, about_music, shift_rows

COUNT = 300
NEW_WORDS = {word for line in MUSIC.values() for word in line.split()}
BACK = {new: min(old for old, other in EXCHANGED.items() if other == new) for new in NEW_WORDS}


def rows(name: str) -> list[dict[str, str]]:
    return shift_rows(name, count=COUNT)


def denials(answers: list[str]) -> float:
    return sum(word in LEXICON["NEG"] for answer in answers for word in tokenize(answer)) / len(answers)


def answers_of(found: list[dict[str, str]]) -> list[str]:
    return [row[side] for row in found for side in ("chosen", "rejected")]


@pytest.mark.parametrize("name", SHIFTS)
def test_files(name):
    found = rows(name)
    assert len(found) == COUNT == len({tuple(row.values()) for row in found})
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in found)
    assert found == shift_rows.__wrapped__(name, count=COUNT) != shift_rows.__wrapped__(name, 1, COUNT)


@pytest.mark.parametrize("name", SHIFTS)
def test_prompts_are_about_music_where_they_should_be(name):
    for row in rows(name):
        words = tokenize(row["prompt"])
        assert any(word in NEW_WORDS for word in words) == SHIFTS[name].prompts
        assert not set(words) & set(EXCHANGED) or not SHIFTS[name].prompts
        assert not set(tokenize(row["chosen"] + row["rejected"])) - VOCABULARY, "answers are in the task's own words"
        assert SHIFTS[name].prompts or held_out(row["prompt"])


def test_the_new_words_are_new_and_say_nothing_good_or_bad():
    assert not NEW_WORDS & VOCABULARY and len(NEW_WORDS) == sum(len(line.split()) for line in MUSIC.values())
    assert not set(MUSIC) & set(POLARITY) and set(MUSIC) <= set(LEXICON)
    assert about_music("my aunt saw this western, but the plot was dull") != "my aunt saw this western"
    assert about_music("but i was not dull") == "but i was not dull"
    assert len(tokenize(about_music("we saw this western, and"))) == len(tokenize("we saw this western, and"))


def test_the_other_writer_denies_and_keeps_to_the_grammar():
    own, other = answers_of(rows("true_pairs")), answers_of(rows("shift_answers"))
    assert denials(other) > 4 * denials(own) and denials(other) > 0.8
    texts = [row["prompt"] + row[side] for row in rows("shift_answers") for side in ("chosen", "rejected")]
    assert 0.88 < sum(map(parses, texts)) / len(texts) < 0.98, "damaged as often as the task's own answers"
    assert denials(answers_of(rows("shift_prompts"))) < 0.3, "new prompts have answers of the old kind"
    assert denials(answers_of(rows("shift_both"))) > 0.8
    lengths = [sum(map(len, map(tokenize, each))) / len(each) for each in (own, other)]
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1), "length does not give the writer away"


def test_both_writers_have_the_states_of_one_automaton():
    assert [[(e.kind, e.to) for e in state] for state in EDGES] == [[(e.kind, e.to) for e in s] for s in OTHER_EDGES]
    assert all(sum(edge.weight for edge in state) == pytest.approx(1.0) for state in OTHER_EDGES if state)
    assert compile_rules(RULES)[0] == EDGES != OTHER_EDGES
    assert [text for _, text in OTHER_RULES["VERDICT"]] == [text for _, text in RULES["VERDICT"]]


def gold(row: dict[str, str]) -> float:
    return gold_reward(row["prompt"], row["chosen"]) - gold_reward(row["prompt"], row["rejected"])


def test_labels_without_noise_are_the_gold_rewards():
    for name in ("true_pairs", "true_shift_answers"):
        assert all(gold(row) > 0 for row in rows(name))


def test_labels_of_new_prompts_are_those_of_the_old_ones():
    for row in rows("true_shift_prompts"):
        words = [BACK[word] if word in BACK else word for word in tokenize(row["prompt"])]
        assert gold(row | {"prompt": render(words)}) > 0


def test_noisy_labels_are_wrong_as_often_as_bradley_terry_says():
    found = [gold(row) for row in shift_rows("shift_answers")]
    chances = [preference(abs(difference), 0.0) for difference in found]
    right = sum(1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in found)
    expected, spread = sum(chances), math.sqrt(sum(p * (1 - p) for p in chances))
    assert abs(right - expected) < 4 * spread and right < len(found)


def test_true_files_hold_the_pairs_of_the_noisy_ones():
    for true, noisy in (("true_shift_both", rows("shift_both")), ("true_pairs", demo_rows("eval_pairs"))):
        texts = [(row["prompt"], frozenset(answers_of([row]))) for row in rows(true)]
        assert sum(text in {(r["prompt"], frozenset(answers_of([r]))) for r in noisy} for text in texts) > 0.8 * COUNT
