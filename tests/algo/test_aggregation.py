"""Ways to add up token losses, by hand and against a loop over answers."""

from __future__ import annotations

import torch

from rlhf.algo.aggregation import AGGREGATIONS, DENOMINATORS, constant, sequence_mean, sequence_sum, token_mean

LOSSES = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)


def test_by_hand() -> None:
    assert token_mean(LOSSES, MASK, length=8) == 10
    assert sequence_mean(LOSSES, MASK, length=8) == 6  # 2 + 4, and an answer without tokens adds nothing
    assert sequence_sum(LOSSES, MASK, length=8) == 10
    assert constant(LOSSES, MASK, length=8) == 1.25


def test_averages_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    losses = torch.randn(5, 6, dtype=torch.float64)
    lengths = [6, 1, 3, 2, 5]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    rows = [row[:n].tolist() for row, n in zip(losses, lengths, strict=True)]
    expected = {
        "token_mean": sum(map(sum, rows)) / sum(lengths),
        "sequence_mean": sum(sum(row) / len(row) for row in rows) / 5,
        "sequence_sum": sum(map(sum, rows)) / 5,
        "constant": sum(sum(row) / 6 for row in rows) / 5,
    }
    counts = {"tokens": mask.sum(), "sequences": mask.any(-1).sum()}
    for entry in AGGREGATIONS:
        found = entry.function(losses, mask, length=6) / counts[DENOMINATORS[entry.name]]
        assert abs(float(found) - expected[entry.name]) < 1e-12, entry.name


def test_where_all_answers_have_the_full_length_three_of_them_agree() -> None:
    mask = torch.ones_like(MASK)
    tokens = token_mean(LOSSES, mask, length=3) / 9
    assert tokens == sequence_mean(LOSSES, mask, length=3) / 3 == constant(LOSSES, mask, length=3) / 3 == 5
    assert sequence_sum(LOSSES, mask, length=3) / 3 == 15


def test_how_much_a_token_weighs() -> None:
    losses = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    weights = {}
    for entry in AGGREGATIONS:
        (grad,) = torch.autograd.grad(entry.function(losses, mask, length=8), losses)
        assert (grad[~mask] == 0).all()
        weights[entry.name] = (float(grad[0, 0]), float(grad[1, 0]))
    assert weights == {
        "token_mean": (1, 1),
        "sequence_mean": (0.25, 1),  # a short answer's tokens weigh more
        "sequence_sum": (1, 1),
        "constant": (0.125, 0.125),
    }


def test_padding_holds_anything_and_narrow_types_are_summed_in_float32() -> None:
    for garbage in (torch.nan, torch.inf):
        dirty = torch.where(MASK, LOSSES, garbage)
        for entry in AGGREGATIONS:
            assert torch.equal(entry.function(dirty, MASK, length=8), entry.function(LOSSES, MASK, length=8))
    many, mask = torch.full((1, 3000), 0.1, dtype=torch.bfloat16), torch.ones(1, 3000, dtype=torch.bool)
    for entry in AGGREGATIONS:
        assert entry.function(many, mask, length=1).dtype == torch.float32
    assert abs(float(token_mean(many, mask, length=1)) - 3000 * float(many[0, 0])) < 1e-2
