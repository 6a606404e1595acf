"""Drawing tokens: where a cumulative distribution passes uniforms that come from seeds. What was drawn is kept here."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlhf.algo.logprobs import scale_logits, truncate_logits
from rlhf.batch import Prompts, Rollout
from rlhf.recipe.schema import SamplingBlock


def uniforms(seeds: list[int], count: int) -> Tensor:
    """(B, count) numbers in [0, 1), each row from its own seed, of which torch uses the lower 32 bits."""
    return torch.stack([torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def draw(logits: Tensor, uniform: Tensor, sampling: SamplingBlock) -> tuple[Tensor, Tensor]:
    """One token per row of (b, V) logits by inverting the cumulative distribution at (b,) uniforms, and its log-prob.

    The token is the first whose cumulative probability exceeds the uniform. The log-prob is the one that training
    computes: temperature, then top-k, then top-p, renormalised, in float32.
    """
    scaled = scale_logits(logits, temperature=sampling.temperature)
    probs = truncate_logits(scaled, top_k=sampling.top_k, top_p=sampling.top_p).softmax(-1)
    blocks = pad(probs, (0, -probs.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))  # (b, blocks, tokens)
    mass = blocks.sum(-1)
    until = mass.cumsum(-1)
    target = uniform[:, None] * until[:, -1:]
    block = _passed(until, mass, target)  # (b, 1)
    within = blocks.gather(1, block[..., None].expand(-1, -1, _BLOCK)).squeeze(1)
    token = _passed(within.cumsum(-1), within, target - until.gather(1, block) + mass.gather(1, block))
    return (block * _BLOCK + token).squeeze(-1), within.gather(1, token).log().squeeze(-1)


_BLOCK = 256  # tokens whose probabilities are added first: a cumulative sum of everything takes several times as long


def _passed(until: Tensor, mass: Tensor, target: Tensor) -> Tensor:
    """(b, 1) where the cumulative sum (b, X) of the mass first exceeds the target (b, 1).

    A product rounded up to the total, or parallel sums that do not quite rise, can point at a place without mass: then
    it is the heaviest one.
    """
    place = torch.searchsorted(until, target, right=True).clamp(max=until.shape[-1] - 1)
    return torch.where(mass.gather(1, place) > 0, place, mass.argmax(-1, keepdim=True))


class Drawn:
    """The answers of one call as they grow: B rows of at most `sampling.max_new_tokens` tokens."""

    def __init__(
        self, sampling: SamplingBlock, seeds: list[int], stop_ids: Collection[int], pad_id: int, device: torch.device
    ) -> None:
        total, width = len(seeds), sampling.max_new_tokens
        self.sampling = sampling
        self.stop_ids = frozenset(stop_ids)
        self.uniforms = uniforms(seeds, width).to(device)
        self.tokens = torch.full((total, width), pad_id, device=device)
        self.logprobs = torch.zeros(total, width, device=device)
        self.lengths = [0] * total
        self.finished = [False] * total

    def draw(self, rows: list[int], logits: Tensor) -> tuple[Tensor, list[bool]]:
        """The next token of these rows (b,) from logits (b, V), and which of the rows go on after it."""
        places = torch.tensor(rows, device=logits.device)
        columns = torch.tensor([self.lengths[row] for row in rows], device=logits.device)
        choice, logprobs = draw(logits, self.uniforms[places, columns], self.sampling)
        self.tokens[places, columns], self.logprobs[places, columns] = choice, logprobs
        for row, token in zip(rows, choice.tolist(), strict=True):
            self.lengths[row] += 1
            self.finished[row] = token in self.stop_ids
        full = self.sampling.max_new_tokens
        return choice, [not self.finished[row] and self.lengths[row] < full for row in rows]

    def rollout(self, prompts: Prompts, answers: int, decode: Callable[[list[int]], str]) -> Rollout:
        """The finished record on the CPU, as wide as its longest answer."""
        lengths = torch.tensor(self.lengths)
        width = max(self.lengths)
        tokens = self.tokens[:, :width].cpu()
        mask = torch.arange(width) < lengths[:, None]  # (B, R)
        return Rollout(
            ids=torch.cat([prompts.ids.cpu().repeat_interleave(answers, 0), tokens], 1),
            attention=torch.cat([prompts.attention.cpu().bool().repeat_interleave(answers, 0), mask], 1),
            response_mask=mask,
            sample_logprobs=self.logprobs[:, :width].cpu(),
            finished=torch.tensor(self.finished),
            texts=[decode(row[:length].tolist()) for row, length in zip(tokens, self.lengths, strict=True)],
            rows=[row for row in prompts.rows for _ in range(answers)],
        )
