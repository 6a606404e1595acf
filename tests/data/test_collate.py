"""Padding: on the right for training, on the left for prompts, never by id."""

from __future__ import annotations

import numpy as np

from rlhf.data import collate
from rlhf.data.examples import AnswerExample, ListExample, PairExample, PromptExample, TokenExample

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
    assert batch.row is not None and batch.row.tolist() == [7, 3]
    assert batch.scores is batch.win_rates is None


def test_pairs_with_scores_of_every_row() -> None:
    row = PairExample(ints(1), ints(2), bools(1), ints(3), bools(1), 0.0, 0, (3.0, 1.5), (0.75, 0.25))
    batch = collate.pairs([row, row], PAD)
    assert batch.scores is not None and batch.scores.tolist() == [[3.0, 1.5]] * 2
    assert batch.win_rates is not None and batch.win_rates.tolist() == [[0.75, 0.25]] * 2
    bare = PairExample(ints(1), ints(2), bools(1), ints(3), bools(1), 0.0, 0, None, (0.5, 0.5))
    mixed = collate.pairs([row, bare], PAD)
    assert mixed.scores is None and mixed.win_rates is not None


def test_answers() -> None:
    rows = [
        AnswerExample(ints(1, 2), ints(3), bools(1), True, 0.5, 0.25, 7),
        AnswerExample(ints(4), ints(5, PAD, 6), bools(1, 0, 1), False, -1.0, 0.5, 3),
    ]
    batch = collate.answers(rows, PAD)
    assert batch.tokens.ids.tolist() == [[1, 2, 3, PAD], [4, 5, PAD, 6]]
    assert batch.tokens.attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.tokens.mask.int().tolist() == [[0, 0, 1, 0], [0, 1, 0, 1]]
    assert (batch.is_good.tolist(), batch.rewards.tolist()) == ([True, False], [0.5, -1.0])
    assert (batch.density.tolist(), batch.row.tolist()) == ([0.25, 0.5], [7, 3])
    assert batch.mismatched is None
    crossed = collate.answers(rows, PAD, rows[::-1]).mismatched
    assert crossed is not None and crossed.ids.tolist() == [[1, 2, 5, PAD, 6], [4, 3, PAD, PAD, PAD]]
    assert crossed.mask.int().tolist() == [[0, 0, 1, 0, 1], [0, 1, 0, 0, 0]]


def test_lists() -> None:
    rows = [
        ListExample(ints(1), ((ints(2), bools(1)), (ints(3, 4), bools(0, 1))), (0.5, 2.0), 7),
        ListExample(ints(), tuple((ints(n), bools(1)) for n in (5, 6, PAD)), (1.0, 1.0, -1.0), 3),
    ]
    batch = collate.lists(rows, PAD)
    blank = [PAD, PAD, PAD]
    assert batch.ids.tolist() == [[[1, 2, PAD], [1, 3, 4], blank], [[5, PAD, PAD], [6, PAD, PAD], blank]]
    assert batch.attention.sum(-1).tolist() == [[2, 3, 0], [1, 1, 1]]
    assert batch.mask.int().tolist() == [[[0, 1, 0], [0, 0, 1], [0] * 3], [[1, 0, 0], [1, 0, 0], [1, 0, 0]]]
    assert batch.scores.tolist() == [[0.5, 2.0, 0.0], [1.0, 1.0, -1.0]]
    assert batch.present.int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.row.tolist() == [7, 3]


def test_prompts() -> None:
    rows = [PromptExample(ints(1, PAD), 4, {"answer": "a"}), PromptExample(ints(1, 2, 3), 5, {})]
    batch = collate.prompts(rows, PAD)
    assert batch.ids.tolist() == [[PAD, 1, PAD], [1, 2, 3]]
    assert batch.attention.int().tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch.rows == [{"answer": "a", "row": 4}, {"row": 5}]
