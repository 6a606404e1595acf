"""The supervised loss."""

from __future__ import annotations

import torch

from rlhf.algo.logprobs import token_logprobs
from rlhf.algo.masked import masked_sum
from rlhf.algo.sft import sft


def test_negative_logprob_under_the_mask() -> None:
    logprobs = torch.tensor([[-1.0, -2.5, -torch.inf]])
    assert sft(logprobs, torch.tensor([[True, True, False]])).tolist() == [[1.0, 2.5, 0.0]]
    assert sft(logprobs.bfloat16(), torch.tensor([[True, True, False]])).dtype == torch.float32


def test_sum_and_gradient_are_cross_entropys_and_split_over_micro_batches() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 10, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, 10, (4, 6))
    mask = torch.arange(6) < torch.tensor([[6], [2], [4], [1]])
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}

    def total(rows: slice) -> torch.Tensor:
        return masked_sum(sft(token_logprobs(logits[rows], targets[rows], **off), mask[rows]), mask[rows])

    labels = torch.where(mask, targets, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    (wanted,) = torch.autograd.grad(expected, logits)
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]):
        found = torch.stack([total(rows) for rows in parts]).sum()
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(found, logits)[0], wanted, atol=1e-12, rtol=0)
    assert (wanted[~mask] == 0).all()
