"""Near-duplicates: shingles and similarities against plain sets, and candidates against all pairs."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from rlhf.data.near import THRESHOLD, Sketches

WORDS = [f"w{i}" for i in range(2000)]


def by_hand(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def jaccard(first: str, second: str) -> float:
    a, b = by_hand(first), by_hand(second)
    return len(a & b) / len(a | b)


def sketches(texts: list[str]) -> Sketches:
    found = Sketches()
    assert [found.add(text) for text in texts] == list(range(len(texts)))
    return found


def corpus(seed: int = 0) -> list[str]:
    """Texts, and after every second one a copy with some words changed."""
    rng = random.Random(seed)
    texts = []
    for i in range(120):
        words = rng.choices(WORDS, k=rng.randint(30, 90))
        texts.append(" ".join(words))
        if i % 2:
            for _ in range(rng.randint(1, 5)):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
            texts.append(" ".join(words))
    return texts


def test_similarity_is_that_of_word_shingles() -> None:
    texts = ["a b c d e", "A, b: c d!", "a b", "b a", "", "?", "x y z"]
    found = sketches(texts)
    for (i, first), (j, second) in itertools.product(enumerate(texts), repeat=2):
        assert found.similarity(i, j) == pytest.approx(jaccard(first, second), abs=1e-12)
    assert found.similarity(0, 1) == pytest.approx(2 / 3)


def test_near_texts_are_found_and_no_others() -> None:
    texts = corpus()
    expected = {j for i, j in itertools.combinations(range(len(texts)), 2) if jaccard(texts[i], texts[j]) >= THRESHOLD}
    found = sketches(texts).near(range(len(texts)))
    assert set(found) == expected and 20 < len(expected) < 60
    assert all(other < text and jaccard(texts[text], texts[other]) >= THRESHOLD for text, other in found.items())


def test_texts_are_compared_with_others_alone_where_there_are_some() -> None:
    texts = corpus(1)
    half = list(range(0, len(texts), 2)), list(range(1, len(texts), 2))
    found = sketches(texts).near(*half)
    expected = {i for i in half[0] if any(jaccard(texts[i], texts[j]) >= THRESHOLD for j in half[1])}
    assert set(found) == expected and len(expected) > 5
    assert set(found.values()) <= set(half[1])
    assert sketches(texts).near(half[0], [len(texts) - 1]).keys() <= set(half[0])


def test_many_that_are_alike_are_all_found() -> None:
    """A group of a band is not compared all with all."""
    rng = random.Random(2)
    base = rng.choices(WORDS, k=60)
    texts = []
    for _ in range(300):
        words = list(base)
        words[rng.randrange(60)] = rng.choice(WORDS)
        texts.append(" ".join(words))
    assert set(sketches(texts).near(range(300))) == set(range(1, 300))


def test_nothing_is_near_nothing() -> None:
    assert sketches([]).near([]) == {} and sketches(["a b c"]).near([0]) == {}
    assert sketches(["a", "b"]).near([], [0, 1]) == {}


def test_texts_are_hashed_in_chunks_as_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = corpus(3)
    whole = sketches(texts)
    monkeypatch.setattr("rlhf.data.near._CHUNK", 500)
    cut = sketches(texts)
    assert (whole.minima() == cut.minima()).all()
    assert whole.near(range(len(texts))) == cut.near(range(len(texts)))
