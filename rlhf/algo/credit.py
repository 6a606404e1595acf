"""What a policy that was trained against a reference says about answers: rewards of tokens and of whole answers."""

from __future__ import annotations

from torch import Tensor

from rlhf.algo.kl import k1
from rlhf.algo.masked import row_sums, select


def implicit_reward(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, beta: float) -> tuple[Tensor, Tensor]:
    """beta * log(policy / reference) of tokens and of answers.              [arXiv:2305.18290 sec. 4; arXiv:2404.12358]

    logprobs, ref_logprobs, mask: (B, R).  Returns (token_rewards (B, R), 0 where mask is 0; seq_rewards (B,), their
    sums), at least float32. An answer's reward is known up to a number that depends on its prompt only: compare answers
    to the same prompt. A token's is Q*(s, a) - V*(s) of the token-level problem, its credit.
    """
    tokens = beta * k1(select(logprobs, mask), select(ref_logprobs, mask))
    return tokens, row_sums(tokens, mask)
