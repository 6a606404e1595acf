"""Texts that are nearly the same: Jaccard similarity of word shingles, candidates found by MinHash and banding.

    J(A, B) = |A & B| / |A | B|, A and B the sets of runs of SHINGLE words of two texts, lower case, marks left out

Two texts share one MinHash with probability J, and all of a band of ROWS with J^ROWS, so that one of BANDS bands brings
them together with probability 1 - (1 - J^ROWS)^BANDS: 0.9998 at J = 0.8, 0.64 at 0.5, 0.03 at 0.2. What was brought
together is then compared exactly. In a band, a text is compared with the first text of its group and with the one
before it, not with all, which would be quadratic where thousands are alike.

[Broder 1997, On the resemblance and containment of documents; banding: Leskovec et al., Mining of Massive Datasets,
ch. 3.4]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

SHINGLE = 3  # words
BANDS, ROWS = 16, 4
THRESHOLD = 0.8  # the similarity from which on texts are nearly the same

_WORD = re.compile(r"\w+")
_CHUNK = 1 << 20  # shingles that are hashed together: 8 MB for every array
_SLACK = 0.25  # four standard errors of a similarity of 0.8 that is estimated from 64 hashes
Hashes = NDArray[np.uint32]
Words = NDArray[np.uint64]


class Sketches:
    """The shingles and MinHashes of texts, which are numbered in the order in which they come."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}  # every word's number, which stands for it
        self._waiting: list[list[int]] = []
        self._size = 0
        self._shingles: list[Hashes] = []  # sorted, each once
        self._minima: list[Hashes] = []
        draws = np.random.default_rng(0).integers(0, 2**63, (2, BANDS * ROWS), dtype=np.uint64)
        self._factors, self._offsets = draws[0] * np.uint64(2) + np.uint64(1), draws[1]

    def __len__(self) -> int:
        return len(self._shingles) + len(self._waiting)

    def add(self, text: str) -> int:
        """Take in a text; returns its number."""
        ids = self._ids
        words = [ids.setdefault(word, len(ids) + 1) for word in _WORD.findall(text.lower())]
        self._waiting.append(words)
        self._size += len(words)
        if self._size > _CHUNK:
            self._hash()
        return len(self) - 1

    def _hash(self) -> None:
        """Hash the texts that wait."""
        if not self._waiting:
            return
        new = [np.unique(_shingles(words)) for words in self._waiting]
        starts = np.cumsum([0, *map(len, new[:-1])])
        flat = np.concatenate(new).astype(np.uint64)
        minima = np.empty((len(new), BANDS * ROWS), np.uint32)
        for i, (factor, offset) in enumerate(zip(self._factors, self._offsets, strict=True)):
            # Multiply-shift: the upper half of a x + b modulo 2^64.
            hashed = ((flat * factor + offset) >> np.uint64(32)).astype(np.uint32)
            minima[:, i] = np.minimum.reduceat(hashed, starts)
        self._shingles += new
        self._minima.append(minima)
        self._waiting, self._size = [], 0

    def minima(self) -> Hashes:
        """(texts, BANDS x ROWS)."""
        self._hash()
        self._minima = [np.concatenate(self._minima)] if self._minima else [np.empty((0, BANDS * ROWS), np.uint32)]
        return self._minima[0]

    def similarity(self, first: int, second: int) -> float:
        """The Jaccard similarity of two texts; of texts without a word it is 1."""
        self._hash()
        a, b = self._shingles[first], self._shingles[second]
        common = len(np.intersect1d(a, b, assume_unique=True))
        return common / (len(a) + len(b) - common)

    def near(self, texts: Sequence[int], others: Iterable[int] = ()) -> dict[int, int]:
        """text -> one of `others` that is nearly the same; without others, one that comes before it in `texts`."""
        ranks = {text: rank for rank, text in enumerate([*others, *texts])}
        corpus = len(ranks) - len(texts)
        numbers = np.fromiter(ranks, np.int64, len(ranks))
        found: dict[int, int] = {}
        for text, other in _candidates(self.minima()[numbers], corpus):
            text, other = int(numbers[text]), int(numbers[other])
            if text not in found and self.similarity(text, other) >= THRESHOLD:
                found[text] = other
        return found


def _shingles(words: list[int]) -> Hashes:
    """A number for every run of SHINGLE words; a shorter text is one run."""
    ids = np.array(words or [0], np.uint64)
    size = min(SHINGLE, len(ids))
    hashed = np.zeros(len(ids) - size + 1, np.uint64)
    for i in range(size):
        hashed = (hashed ^ ids[i : len(ids) - size + 1 + i]) * np.uint64(0x9E3779B97F4A7C15)
        hashed ^= hashed >> np.uint64(29)
    return (hashed >> np.uint64(32)).astype(np.uint32)


def _candidates(minima: Hashes, corpus: int) -> Iterator[tuple[int, int]]:
    """(text, one before it) that share a band and about enough hashes, by rank, each once.

    With a corpus, which has the first ranks, texts are behind it and compared with it only.
    """
    pairs: set[int] = set()
    for band in range(BANDS):
        keys = _band_keys(minima[:, band * ROWS : (band + 1) * ROWS])
        order = np.argsort(keys, kind="stable")  # ranks rise within a group
        places = np.arange(len(order))
        starts_group = np.ones(len(order), np.bool_)
        starts_group[1:] = keys[order][1:] != keys[order][:-1]
        first = np.maximum.accumulate(np.where(starts_group, places, 0))
        before = np.maximum(places - 1, first)
        if corpus:  # the last of the corpus in the group, or one of another group, which is sorted out below
            before = np.maximum.accumulate(np.where(order < corpus, places, 0))
        for other in (first, before):
            is_pair = (other >= first) & (other < places)
            if corpus:
                is_pair &= (order >= corpus) & (order[other] < corpus)
            pairs.update((order[is_pair].astype(np.int64) * len(order) + order[other][is_pair]).tolist())
    texts, others = np.divmod(np.array(sorted(pairs), np.int64), max(1, len(minima)))
    for start in range(0, len(texts), _CHUNK // (BANDS * ROWS)):
        part = slice(start, start + _CHUNK // (BANDS * ROWS))
        likely = (minima[texts[part]] == minima[others[part]]).mean(1) >= THRESHOLD - _SLACK
        yield from zip(texts[part][likely].tolist(), others[part][likely].tolist(), strict=True)


def _band_keys(rows: Hashes) -> Words:
    """One number for each row of a band."""
    keys = np.zeros(len(rows), np.uint64)
    for column in rows.T:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(31)
    return keys
