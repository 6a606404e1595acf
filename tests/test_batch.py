"""Records of tensors: cut into rows whatever they hold, and checked when they are made."""

from __future__ import annotations

import pytest
import torch

from rlhf.batch import Answers, Lists, Pairs, Tokens


def tokens(rows: int) -> Tokens:
    flags = torch.ones(rows, 2, dtype=torch.bool)
    return Tokens(torch.arange(2 * rows).reshape(rows, 2), flags, flags)


def answers(rows: int, **fields: object) -> Answers:
    numbers = torch.arange(rows)
    return Answers(tokens(rows), numbers > 1, numbers.float(), numbers.float(), numbers, **fields)  # type: ignore[arg-type]


def test_extras_and_nested_records_are_cut_with_their_rows() -> None:
    batch = answers(5, mismatched=tokens(5), extras={"shift": torch.arange(5.0)})
    assert [len(piece) for piece in batch.split(2)] == [2, 2, 1]
    middle = list(batch.split(2))[1]
    assert middle.extras is not None and middle.mismatched is not None
    assert (middle.row.tolist(), middle.extras["shift"].tolist()) == ([2, 3], [2.0, 3.0])
    assert middle.mismatched.ids[:, 0].tolist() == [4, 6]
    picked = batch.select([4, 0])
    assert picked.extras is not None and picked.extras["shift"].tolist() == [4.0, 0.0]
    pairs = Pairs(tokens(3), tokens(3), torch.zeros(3), row=torch.arange(3), extras={"weight": torch.arange(3)})
    last = pairs.select([2])
    assert last.row is not None and last.extras is not None
    assert (last.row.tolist(), last.extras["weight"].tolist()) == ([2], [2])
    assert last.to(torch.device("cpu")).scores is None


def test_shapes_are_checked() -> None:
    with pytest.raises(AssertionError, match=r"shift: expected \(3,\), found \(2,\)"):
        answers(3, extras={"shift": torch.zeros(2)})
    with pytest.raises(AssertionError, match="mismatched"):
        answers(3, mismatched=tokens(2))
    with pytest.raises(AssertionError, match=r"scores: expected \(3, 2\), found \(3,\)"):
        Pairs(tokens(3), tokens(3), torch.zeros(3), scores=torch.zeros(3))
    grid, flags = torch.zeros(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool)
    with pytest.raises(AssertionError, match=r"present: expected \(2, 3\), found \(2, 4\)"):
        Lists(grid, flags, flags, torch.zeros(2, 3), torch.ones(2, 4), torch.arange(2))
