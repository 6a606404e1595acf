"""The head in pieces against log-softmax written out: values, gradients, and what it keeps in memory."""

from __future__ import annotations

import pytest
import torch

from rlhf.models import head
from rlhf.models.head import Extras, Question, TokenHead, adopt
from rlhf.recipe.schema import SamplingBlock

SAMPLINGS = [SamplingBlock(), SamplingBlock(temperature=0.6), SamplingBlock(temperature=1.3, top_k=4, top_p=0.9)]


@pytest.mark.parametrize("kept", [0, 2**20], ids=["made again", "kept"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["plain", "temperature", "truncated"])
@pytest.mark.parametrize("rows", [0, 1, 11])
def test_pieces_are_the_whole(monkeypatch, kept, bias, sampling, rows):
    monkeypatch.setattr(head, "PIECE", 60)  # three rows
    monkeypatch.setattr(head, "KEPT", kept)
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 20, bias=bias).double()
    hidden = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    question = Question(torch.randint(20, (rows,)), sampling, Extras(entropy="value"))
    weights = torch.randn(rows, dtype=torch.float64)
    found = []
    for ask in (lambda: question.answer(layer(hidden)), lambda: layer(hidden, question)):
        numbers = ask()
        wanted = [hidden, *layer.parameters()]
        grads = torch.autograd.grad((numbers[0] * weights).sum(), wanted)
        found.append([*numbers, *grads])
        adopt(layer)
    assert isinstance(layer, TokenHead) and layer(hidden.detach()).shape == (rows, 20)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-12, rtol=1e-9)
    assert not numbers[1].requires_grad


def test_nothing_is_kept_where_there_is_no_gradient(monkeypatch):
    layer = torch.nn.Linear(8, 20)
    adopt(layer)
    with torch.no_grad():
        (logprobs,) = layer(torch.randn(5, 8), Question(torch.arange(5), SamplingBlock()))
    assert logprobs.shape == (5,) and not logprobs.requires_grad


def test_a_frozen_head_gets_no_gradient():
    layer = torch.nn.Linear(8, 20).requires_grad_(False)
    adopt(layer)
    hidden = torch.randn(5, 8, requires_grad=True)
    layer(hidden, Question(torch.arange(5), SamplingBlock()))[0].sum().backward()
    assert hidden.grad is not None and layer.weight.grad is None


def test_other_modules_stay_what_they_are():
    other = torch.nn.Sequential(torch.nn.Linear(2, 2))
    adopt(other)
    assert type(other) is torch.nn.Sequential
