"""Sampling through the cache of transformers, for models that cannot take a layout and for mixtures of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.batch import Prompts
from rlhf.errors import CheckpointError
from rlhf.models.draw import Drawn
from rlhf.models.forward import PolicyModule


class Wave:
    """All answers to some of the prompts, sampled at once. Ended ones leave, and none enter."""

    def __init__(self, policy: PolicyModule, prompts: Prompts, answers: int, drawn: Drawn, numbers: range) -> None:
        device, width = drawn.tokens.device, drawn.tokens.shape[1]
        self.policy, self.drawn = policy, drawn
        self.rows = list(range(numbers.start * answers, numbers.stop * answers))
        own = slice(numbers.start, numbers.stop)
        inputs = policy.inputs(prompts.ids[own].to(device), prompts.attention[own].to(device))
        output = policy.core(**inputs, use_cache=True, logits_to_keep=1)
        self.cache = _repeated(output, answers, policy)
        self.logits = output.logits[:, -1].repeat_interleave(answers, 0)  # (b, V)
        grown = torch.ones(len(numbers), width, dtype=torch.long, device=device)
        self.attention = torch.cat([inputs["attention_mask"], grown], 1).repeat_interleave(answers, 0)  # (b, P + width)
        self.seen = prompts.ids.shape[1]  # columns

    def step(self) -> bool:
        """Sample one token of every row. False when there is nothing left to sample."""
        choice, keep = self.drawn.draw(self.rows, self.logits)
        if not any(keep):
            return False
        if not all(keep):
            choice = self.leave(choice, [i for i, stays in enumerate(keep) if stays])
        self.seen += 1
        inputs = self.policy.inputs(choice[:, None], self.attention[:, : self.seen])
        output = self.policy.core(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = output.past_key_values, output.logits[:, -1]
        return True

    def leave(self, choice: Tensor, keep: list[int]) -> Tensor:
        """Take ended rows out of the cache."""
        kept = torch.tensor(keep, device=choice.device)
        self.cache.batch_select_indices(kept)
        self.rows, self.attention = [self.rows[i] for i in keep], self.attention[kept]
        return choice[kept]


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
