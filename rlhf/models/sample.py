"""Sampling answers: each prompt is read once, its answers share that work, and finished answers leave the batch.

An answer is a function of the weights, its prompt and its seed: not of the other rows, nor of the rank. (Equal up to
the rounding of batched matrix products, which can turn a draw only where it falls on the edge between two tokens.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.logprobs import scale_logits, truncate_logits
from rlhf.batch import Prompts, Rollout
from rlhf.errors import CheckpointError, RecipeError
from rlhf.models.build import max_positions
from rlhf.models.forward import PolicyModule, evaluating
from rlhf.recipe.schema import SamplingBlock

# Dropping finished rows copies the whole cache, which every decoding step does anyway; below this share of live rows
# the smaller batch has won it back within a few tokens.
_COMPACT_BELOW = 0.85


@torch.no_grad()
def generate(
    policy: PolicyModule,
    prompts: Prompts,
    *,
    answers: int,
    sampling: SamplingBlock,
    stop_ids: Collection[int],
    pad_id: int,
    seeds: list[int],
    decode: Callable[[list[int]], str],
) -> Rollout:
    """`answers` answers to each prompt; row n * answers + g is answer g of prompt n. Tensors come back on the CPU.

    Tokens are drawn by inverting the cumulative distribution at uniforms drawn up front from each row's seed (of which
    torch uses the lower 32 bits). An answer ends with a token of `stop_ids`, which belongs to it, or unfinished after
    `sampling.max_new_tokens`. R is the length of the longest answer of this call.
    """
    assert len(seeds) == len(prompts) * answers, f"{len(prompts)} x {answers} rows need as many seeds, got {len(seeds)}"
    _check_room(policy, prompts, sampling.max_new_tokens)
    with evaluating(policy):
        decoding = _Decoding(policy, prompts, answers, sampling, stop_ids, pad_id, seeds)
        while decoding.step():
            pass
    return decoding.rollout(prompts, answers, decode)


class _Decoding:
    """The state of one batch while it is sampled. B rows of the result, b <= B rows still in the cache."""

    def __init__(
        self,
        policy: PolicyModule,
        prompts: Prompts,
        answers: int,
        sampling: SamplingBlock,
        stop_ids: Collection[int],
        pad_id: int,
        seeds: list[int],
    ) -> None:
        device = next(policy.parameters()).device
        self.policy, self.sampling, self.pad_id = policy, sampling, pad_id
        self.stop_ids = torch.tensor(sorted(stop_ids), device=device)
        total, width = len(seeds), sampling.max_new_tokens
        self.tokens = torch.full((total, width), pad_id, device=device)
        self.logprobs = torch.zeros(total, width, device=device)
        self.lengths = torch.zeros(total, dtype=torch.long, device=device)
        self.finished = torch.zeros(total, dtype=torch.bool, device=device)
        self.uniforms = uniforms(seeds, width).to(device)
        self.done = 0  # tokens sampled so far
        # Of the rows in the cache: their number in the result, whether they still grow, what they attend to.
        self.rows = torch.arange(total, device=device)
        self.alive = torch.ones(total, dtype=torch.bool, device=device)
        inputs = policy.inputs(prompts.ids.to(device), prompts.attention.to(device))
        output = policy.core(**inputs, use_cache=True, logits_to_keep=1)
        self.cache = _repeated(output, answers, policy)
        self.logits = output.logits[:, -1].repeat_interleave(answers, 0)  # (b, V)
        grown = torch.ones(len(prompts), width, dtype=torch.long, device=device)
        self.attention = torch.cat([inputs["attention_mask"], grown], 1).repeat_interleave(answers, 0)  # (b, P + width)
        self.prompt_width = prompts.ids.shape[1]

    def step(self) -> bool:
        """Sample one token of every growing row. False when there is nothing left to sample."""
        choice, logprob = draw(self.logits, self.uniforms[self.rows, self.done], self.sampling)
        self.tokens[self.rows, self.done] = torch.where(self.alive, choice, self.pad_id)
        self.logprobs[self.rows, self.done] = torch.where(self.alive, logprob, 0.0)
        self.lengths[self.rows] += self.alive
        self.done += 1
        stops = torch.isin(choice, self.stop_ids)
        self.finished[self.rows] |= stops  # rows that do not grow are finished already
        self.alive = self.alive & ~stops
        num_alive = int(self.alive.sum())
        if num_alive == 0 or self.done == self.tokens.shape[1]:
            return False
        if num_alive <= _COMPACT_BELOW * len(self.rows):
            choice = self.compact(choice)
        self.advance(choice)
        return True

    def compact(self, choice: Tensor) -> Tensor:
        """Take the finished rows out of the cache."""
        kept = self.alive.nonzero().squeeze(-1)
        self.cache.batch_select_indices(kept)
        self.rows, self.attention, self.alive = self.rows[kept], self.attention[kept], self.alive[kept]
        return choice[kept]

    def advance(self, choice: Tensor) -> None:
        """Run the model on the tokens just drawn, one per row."""
        seen = self.attention[:, : self.prompt_width + self.done]
        inputs = self.policy.inputs(choice[:, None], seen)
        output = self.policy.core(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]

    def rollout(self, prompts: Prompts, answers: int, decode: Callable[[list[int]], str]) -> Rollout:
        """The finished record, as wide as its longest answer."""
        lengths = self.lengths.cpu()
        width = int(lengths.max())
        tokens = self.tokens[:, :width].cpu()
        mask = torch.arange(width) < lengths[:, None]  # (B, R)
        return Rollout(
            ids=torch.cat([prompts.ids.cpu().repeat_interleave(answers, 0), tokens], 1),
            attention=torch.cat([prompts.attention.cpu().bool().repeat_interleave(answers, 0), mask], 1),
            response_mask=mask,
            sample_logprobs=self.logprobs[:, :width].cpu(),
            finished=self.finished.cpu(),
            texts=[decode(row[:length].tolist()) for row, length in zip(tokens, lengths.tolist(), strict=True)],
            rows=[row for row in prompts.rows for _ in range(answers)],
        )


def uniforms(seeds: list[int], count: int) -> Tensor:
    """(B, count) numbers in [0, 1), each row from its own seed."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingBlock) -> tuple[Tensor, Tensor]:
    """One token per row of (b, V) logits by inverting the cumulative distribution at (b,) uniforms, and its log-prob.

    The token is the first whose cumulative probability exceeds the uniform. The log-prob is the one that training
    computes: temperature, then top-k, then top-p, renormalised, in float32.
    """
    scaled = scale_logits(logits, temperature=sampling.temperature)
    scaled = truncate_logits(scaled, top_k=sampling.top_k, top_p=sampling.top_p)
    largest, likeliest = scaled.max(-1, keepdim=True)
    shifted = scaled - largest
    cumulative = shifted.exp().cumsum(-1)
    total = cumulative[:, -1:]
    choice = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp(max=logits.shape[-1] - 1)
    # A product rounded up to the total, or parallel sums that do not quite rise, can point at a token of probability 0.
    choice = torch.where(shifted.gather(-1, choice) == -torch.inf, likeliest, choice)
    return choice.squeeze(-1), (shifted.gather(-1, choice) - total.log()).squeeze(-1)


def _repeated(output: Any, answers: int, policy: PolicyModule) -> Any:
    """The prompts' cache, once per answer."""
    cache = output.past_key_values if "past_key_values" in output else None
    if not hasattr(cache, "layers") or not all(map(_can_be_cut, cache.layers)):
        raise CheckpointError(
            f"expected a model with a key/value cache per layer, found a {type(policy.core).__name__} without",
            fix="Answers can be sampled from attention models only; choose another architecture.",
        )
    if answers > 1:
        cache.batch_repeat_interleave(answers)
    return cache


def _can_be_cut(layer: Any) -> bool:
    """Whether rows of a layer's cache can be repeated and dropped; recurrent states cannot."""
    has_methods = hasattr(layer, "batch_repeat_interleave") and hasattr(layer, "batch_select_indices")
    return has_methods and not hasattr(layer, "update_conv_state")


def _check_room(policy: PolicyModule, prompts: Prompts, max_new_tokens: int) -> None:
    room, longest = max_positions(policy.core.config), int(prompts.attention.sum(-1).max())
    if room is not None and longest + max_new_tokens > room:
        raise RecipeError(
            f"expected at most {room - longest}: the model has {room} positions and a prompt takes {longest},"
            f" found {max_new_tokens}",
            where="sampling.max_new_tokens",
            fix="Lower it, or limit prompts with data.max_prompt_length.",
        )
