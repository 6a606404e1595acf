"""KL estimators on a distribution whose true KL is known, in value and in expected gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.algo.kl import KL_ESTIMATORS, absolute, k1, k2, k3, seq_kl_exact
from rlhf.algo.logprobs import token_forward_kl

POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
TRUE_KL = 0.274887


def expected_gradient(name: str) -> Tensor:
    """E over tokens from the policy of the estimator's gradient with respect to the policy's logits."""
    logits = POLICY.log().requires_grad_()
    total = (POLICY * KL_ESTIMATORS[name].function(logits.log_softmax(-1), REFERENCE.log())).sum()
    return torch.autograd.grad(total, logits)[0]


def true_gradient(forward: bool) -> Tensor:
    logits = POLICY.log().requires_grad_()
    log_policy, log_reference = logits.log_softmax(-1), REFERENCE.log()
    kl = log_policy.exp() * (log_policy - log_reference) if forward else REFERENCE * (log_reference - log_policy)
    return torch.autograd.grad(kl.sum(), logits)[0]


@pytest.mark.parametrize(("estimator", "mean"), [(k1, TRUE_KL), (k2, 0.293856), (k3, TRUE_KL), (absolute, 0.641403)])
def test_expected_value(estimator: object, mean: float) -> None:
    values = estimator(POLICY.log(), REFERENCE.log())  # type: ignore[operator]
    assert abs(float((POLICY * values).sum()) - mean) < 1e-6


def test_expected_gradient_as_a_loss_term() -> None:
    assert expected_gradient("k1").abs().max() < 1e-12
    torch.testing.assert_close(expected_gradient("k2"), true_gradient(forward=True), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradient("k3"), true_gradient(forward=False), atol=1e-12, rtol=0)


def test_no_estimator_but_k1_is_ever_negative() -> None:
    torch.manual_seed(0)
    for scale in (1e-4, 1.0, 10.0):
        log_ratio = scale * torch.randn(1000)
        for name in ("k2", "k3", "abs"):
            assert (KL_ESTIMATORS[name].function(log_ratio, torch.zeros(1000)) >= 0).all(), (name, scale)


def test_k3_keeps_its_digits_near_0() -> None:
    small = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(k3(small, torch.zeros(2)), torch.full((2,), 5e-9), atol=1e-11, rtol=0)


def test_equal_policies_are_at_distance_0() -> None:
    logprobs = torch.tensor([-1.0, -30.0, 0.0])
    for entry in KL_ESTIMATORS:
        assert (entry.function(logprobs, logprobs) == 0).all()


def test_extreme_log_ratios_are_clamped_where_they_would_overflow() -> None:
    far = torch.tensor([-2000.0, 2000.0], requires_grad=True)
    values = k3(far, torch.zeros(2))
    torch.testing.assert_close(values.detach(), torch.tensor([math.exp(20) - 21, 1999.0]), atol=64, rtol=0)
    (grad,) = torch.autograd.grad(values.sum(), far)
    assert grad.tolist() == [0, 1]


def test_bfloat16_is_widened() -> None:
    for entry in KL_ESTIMATORS:
        assert entry.function(torch.zeros(2).bfloat16(), torch.ones(2).bfloat16()).dtype == torch.float32


def test_exact_sequence_kl_sums_positions_under_the_mask() -> None:
    logits, ref_logits = POLICY.log().expand(2, 3, 3), REFERENCE.log().expand(2, 3, 3)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    found = seq_kl_exact(logits, ref_logits, mask)
    torch.testing.assert_close(found, torch.tensor([2 * TRUE_KL, TRUE_KL], dtype=torch.float64), atol=1e-6, rtol=0)
    assert seq_kl_exact(logits + 5, ref_logits - 3, mask).allclose(found)


def test_forward_kl_of_tokens_by_hand() -> None:
    reference, policy = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.2, 0.3, 0.5], [0.5, 0.3, 0.2]))
    policy.requires_grad_()
    found = token_forward_kl(reference, policy)
    assert found.tolist() == pytest.approx([0.3 * math.log(2.5)], abs=1e-12)
    assert token_forward_kl(policy, policy).abs().max() == 0
    (grad,) = torch.autograd.grad(found.sum(), policy)
    torch.testing.assert_close(grad, -reference.exp(), atol=1e-12, rtol=0)
