"""Examples in a mapped file are equal to those that were written, field by field and type by type."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

from rlhf.data import collate
from rlhf.data.columns import StoredExamples, can_store, write_examples
from rlhf.data.examples import AnswerExample, PairExample, PromptExample, TokenExample


def ids(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def mask(*flags: int) -> np.ndarray:
    return np.array(flags, np.bool_)


ROWS = {
    "tokens": [TokenExample(ids(5, 6, 7), mask(0, 1, 1), 0), TokenExample(ids(9), mask(1), 4)],
    "pairs": [
        PairExample(ids(), ids(1, 2), mask(1, 1), ids(3), mask(0), 0.1, 2),
        PairExample(ids(8), ids(4), mask(1), ids(), mask(), -3.0, 3, (0.25, 1e9), (0.0, 1.0), 0.5),
    ],
    "answers": [
        AnswerExample(ids(1), ids(2, 3), mask(1, 0), True, 0.5, 1.0, 0),
        AnswerExample(ids(1, 1), ids(2), mask(1), False, -1.0, 0.0, 1),
    ],
}


def assert_same(found, expected):
    assert type(found) is type(expected)
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert type(one) is type(other), field.name
        if isinstance(other, np.ndarray):
            assert one.dtype == other.dtype and np.array_equal(one, other), field.name
        else:
            assert one == other, field.name


@pytest.mark.parametrize("kind", ROWS)
def test_rows_come_back_as_they_were(tmp_path, kind):
    rows = ROWS[kind]
    assert can_store(rows)
    write_examples(tmp_path / "rows.arrow", rows)
    found = StoredExamples(tmp_path / "rows.arrow")
    assert len(found) == 2 and len(list(found)) == 2
    for i, expected in enumerate(rows):
        assert_same(found[i], expected)
        assert_same(found[i - 2], expected)
        assert found[i].lengths() == expected.lengths()
    assert [example.row for example in found[:1]] == [rows[0].row]
    with pytest.raises(IndexError):
        found[2]


def test_batches_are_the_same_and_no_array_of_the_file_can_be_written_to(tmp_path):
    write_examples(tmp_path / "rows.arrow", ROWS["pairs"])
    found = StoredExamples(tmp_path / "rows.arrow")
    one, other = collate.pairs(found, 0), collate.pairs(ROWS["pairs"], 0)
    for side in ("chosen", "rejected"):
        for name in ("ids", "attention", "mask"):
            assert getattr(getattr(one, side), name).equal(getattr(getattr(other, side), name))
    with pytest.raises(ValueError, match="read-only"):
        found[0].chosen_ids[0] = 1


def test_the_file_is_one_that_datasets_opens(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_examples(tmp_path / "rows.arrow", ROWS["tokens"])
    assert datasets.Dataset.from_file(str(tmp_path / "rows.arrow"))["ids"][:] == [[5, 6, 7], [9]]


def test_prompts_mixed_rows_and_nothing_have_no_columns():
    assert not can_store([PromptExample(ids(1), 0, {})])
    assert not can_store([*ROWS["tokens"], *ROWS["pairs"]])
    assert not can_store([])
