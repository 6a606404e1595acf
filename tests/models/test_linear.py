"""Products by oneDNN against PyTorch's own, values and gradients; they need no particular processor."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from rlhf.models import linear
from rlhf.models.forward import PolicyModule
from rlhf.models.linear import FastConv1D, FastLinear, hasten


@pytest.fixture(autouse=True)
def _any_processor(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(linear, "prefers_onednn", lambda: True)


@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (1, 6), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_values_and_gradients(shape, bias):
    plain = torch.nn.Linear(6, 4, bias=bias)
    fast = copy.deepcopy(plain)
    hasten(fast)
    assert type(fast) is FastLinear
    x = torch.randn(shape)
    for weigh in (
        lambda y: y.sum(),
        lambda y: (y * torch.arange(4.0)).sum(),
        lambda y: y.transpose(0, -1).pow(2).sum(),
    ):
        found = []
        for layer in (plain, fast):
            given = x.clone().requires_grad_()
            out = layer(given)
            found.append([out, *torch.autograd.grad(weigh(out), [given, *layer.parameters()])])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


def test_a_layer_of_gpt2():
    plain = Conv1D(4, 6)
    fast = copy.deepcopy(plain)
    hasten(fast)
    assert type(fast) is FastConv1D
    x = torch.randn(2, 3, 6, requires_grad=True)
    one, other = (torch.autograd.grad(layer(x).pow(2).sum(), [x, *layer.parameters()]) for layer in (plain, fast))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-5)


def test_only_float32_goes_there(monkeypatch):
    def refuse(*_):
        raise AssertionError("not for this type")

    monkeypatch.setattr(linear, "product", refuse)
    for dtype in (torch.float64, torch.bfloat16):
        layer = torch.nn.Linear(6, 4).to(dtype)
        hasten(layer)
        assert layer(torch.randn(2, 6, dtype=dtype)).dtype == dtype


def test_a_policy_says_the_same_either_way(tiny, family, monkeypatch):
    ids = torch.randint(5, 300, (2, 9))
    mask = torch.ones_like(ids, dtype=torch.bool)[:, 3:]
    policy = PolicyModule(tiny(family))
    found = []
    for fast in (True, False):
        monkeypatch.setattr(linear, "prefers_onednn", lambda fast=fast: fast)
        policy.zero_grad()
        out = policy(ids, torch.ones_like(ids), mask)
        out.sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in policy.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
