"""The implicit reward of a policy: by hand, as sums, and as the closed form of the best policy says."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.algo.credit import implicit_reward
from rlhf.algo.preference import implicit_rewards
from rlhf.batch import PairLogprobs

LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-0.3, -1.2, 0.0]], dtype=torch.float64)
REFERENCE = torch.tensor([[-1.2, -1.5, -0.5], [-0.4, -2.0, 0.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_by_hand():
    tokens, sums = implicit_reward(LOGPROBS, REFERENCE, MASK, beta=0.1)
    expected = torch.tensor([[0.02, -0.05, 0.0], [0.01, 0.08, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(tokens, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(sums, torch.tensor([-0.03, 0.09], dtype=torch.float64), atol=1e-12, rtol=0)


def test_it_is_the_reward_that_preference_losses_report():
    _, sums = implicit_reward(LOGPROBS, REFERENCE, MASK, beta=0.3)
    logprobs, reference = (torch.where(MASK, x, 0).sum(-1) for x in (LOGPROBS, REFERENCE))
    pairs = PairLogprobs(logprobs, logprobs, reference, reference, logprobs, logprobs)
    torch.testing.assert_close(sums, implicit_rewards(pairs, beta=0.3)[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("padding", [math.inf, -math.inf, math.nan])
def test_padding_counts_for_nothing(padding):
    logprobs = torch.where(MASK, LOGPROBS, padding).requires_grad_()
    tokens, sums = implicit_reward(logprobs, REFERENCE, MASK, beta=0.1)
    assert tokens[1, 2] == 0 and sums.isfinite().all()
    sums.sum().backward()
    torch.testing.assert_close(logprobs.grad, 0.1 * MASK.double(), atol=1e-12, rtol=0)


def test_the_best_policy_gives_back_the_reward_it_was_made_from():
    # policy ~ reference * exp(reward / beta), arXiv:2305.18290 eq. 4: differences within a prompt are exact.
    generator = torch.Generator().manual_seed(0)
    reward = torch.randn(6, generator=generator, dtype=torch.float64)
    reference = torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(-1)
    policy = (reference + reward / 0.7).log_softmax(-1)
    _, found = implicit_reward(policy[:, None], reference[:, None], torch.ones(6, 1, dtype=torch.bool), beta=0.7)
    torch.testing.assert_close(found - found[0], reward - reward[0], atol=1e-12, rtol=0)


def test_half_precision_is_summed_in_float32():
    tokens, sums = implicit_reward(LOGPROBS.bfloat16(), REFERENCE.bfloat16(), MASK, beta=0.1)
    assert tokens.dtype == sums.dtype == torch.float32
