"""Padding: on the right for training, on the left for prompts, never by id."""

from __future__ import annotations

import numpy as np

from rlhf.data import collate
from rlhf.data.examples import PairExample, PromptExample, TokenExample

PAD = 9


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def bools(*values: int) -> np.ndarray:
    return np.array(values, np.bool_)


def test_tokens() -> None:
    rows = [TokenExample(ints(1, PAD, 3), bools(0, 1, 1), 0), TokenExample(ints(4), bools(1), 1)]
    batch = collate.tokens(rows, PAD)
    assert batch.ids.tolist() == [[1, PAD, 3], [4, PAD, PAD]]
    assert batch.attention.int().tolist() == [[1, 1, 1], [1, 0, 0]]  # a token equal to the padding is a token
    assert batch.mask.int().tolist() == [[0, 1, 1], [1, 0, 0]]


def test_pairs() -> None:
    rows = [
        PairExample(ints(1, 2), ints(3, 4), bools(1, 1), ints(5), bools(1), 0.5, 7),
        PairExample(ints(), ints(6), bools(1), ints(7, 8, PAD), bools(1, 0, 1), 0.0, 3, weight=0.25),
    ]
    batch = collate.pairs(rows, PAD)
    assert batch.chosen.ids.tolist() == [[1, 2, 3, 4], [6, PAD, PAD, PAD]]
    assert batch.chosen.mask.int().tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert batch.rejected.ids.tolist() == [[1, 2, 5], [7, 8, PAD]]
    assert batch.rejected.attention.int().tolist() == [[1, 1, 1], [1, 1, 1]]
    assert batch.rejected.mask.int().tolist() == [[0, 0, 1], [1, 0, 1]]
    assert batch.margin.tolist() == [0.5, 0.0]
    assert batch.weight is not None and batch.weight.tolist() == [1.0, 0.25]


def test_prompts() -> None:
    rows = [PromptExample(ints(1, PAD), 4, {"answer": "a"}), PromptExample(ints(1, 2, 3), 5, {})]
    batch = collate.prompts(rows, PAD)
    assert batch.ids.tolist() == [[PAD, 1, PAD], [1, 2, 3]]
    assert batch.attention.int().tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.rows == [{"answer": "a", "row": 4}, {"row": 5}]
