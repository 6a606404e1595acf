"""The grammar: what it generates it accepts, near misses it rejects, its probabilities add up."""

from __future__ import annotations

import random

import pytest

from rlhf.data.grammar import (
    ACCEPTING,
    EDGES,
    LEXICON,
    POLARITY,
    RULES,
    VOCABULARY,
    go_on,
    parses,
    reach,
    render,
    tokenize,
)

REVIEW = "we watched this western at the festival in march, and the script was really sharp, but i hated the ending."


def generated(count: int, seed: int = 0) -> list[list[str]]:
    rng = random.Random(seed)
    return [go_on([], rng) for _ in range(count)]


def test_every_generated_review_parses():
    for words in generated(2000):
        text = render(words)
        assert parses(text), text
        assert tokenize(text) == words
        assert 8 <= len(words) <= 32


def test_every_continuation_of_every_beginning_parses():
    rng = random.Random(1)
    for words in generated(100, seed=1):
        for cut in range(len(words)):
            assert parses(render(words[:cut] + go_on(words[:cut], rng)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "the script was sharp.",  # a single clause is no review
        REVIEW[:-1],
        REVIEW + ".",
        REVIEW + " " + REVIEW,
        " " + REVIEW,
        REVIEW.replace(" script", "  script"),
        REVIEW.replace(", and", " , and"),
        REVIEW.replace(",", ""),
        REVIEW.replace("really sharp", "sharp really"),
        REVIEW.replace("sharp", "great"),
        REVIEW.replace("sharp", "sharp sharp"),
        REVIEW.replace("We", "we").title(),
        REVIEW[:-1] + ", and the plot was funny.",  # one clause too many
        "sharp sharp sharp sharp sharp sharp sharp sharp.",
    ],
)
def test_near_misses_do_not_parse(text):
    assert parses(REVIEW)
    assert not parses(text)


def test_outgoing_probabilities_sum_to_one():
    for state, edges in enumerate(EDGES):
        assert (not edges) == (state in ACCEPTING)
        if edges:
            assert sum(edge.weight for edge in edges) == pytest.approx(1, abs=1e-12)


def test_probabilities_of_reach_are_those_of_the_walk():
    # Every word of a beginning multiplies in its probability, so that all first words together have probability 1.
    first_words = {word for edge in EDGES[0] for word in edge.words}
    assert sum(sum(reach([word]).values()) for word in first_words) == pytest.approx(1, abs=1e-12)
    assert reach(["nonsense"]) == {}


def test_lexicon_is_clean():
    for kind, words in LEXICON.items():
        assert len(set(words)) == len(words), kind
    polar = [word for kind in POLARITY for word in LEXICON[kind]]
    assert len(set(polar)) == len(polar), "a word has one value"
    used = {part.rstrip("?") for alternatives in RULES.values() for _, text in alternatives for part in text.split()}
    assert set(LEXICON) <= used, "a class that no rule uses"
    assert {name for name in used if name.isupper()} <= set(LEXICON) | set(RULES), (
        "a name that is neither class nor rule"
    )
    assert len(VOCABULARY) >= 200


def test_same_seed_same_reviews():
    assert generated(50, seed=3) == generated(50, seed=3) != generated(50, seed=4)
