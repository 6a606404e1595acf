"""Two policies that answer as one: every token is drawn from the normalised product of their distributions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from rlhf.algo.logprobs import mixed_logits
from rlhf.models.decoding import decoding_weights
from rlhf.models.forward import RoleModule


@dataclass(frozen=True)
class Caches:
    """The keys and values of both policies, cut and repeated together."""

    both: tuple[Any, Any]

    @property
    def layers(self) -> list[Any]:
        """The layers of both."""
        return [layer for cache in self.both for layer in cache.layers]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        for cache in self.both:
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, rows: Tensor) -> None:
        """These rows only."""
        for cache in self.both:
            cache.batch_select_indices(rows)


class Mixture(nn.Module):
    """policy^(1 - mixture) * reference^mixture, sampled from like a policy: see `sample.generate`.

    reference: a module, which may be the policy's own; inside `as_reference` it plays the reference.
    """

    def __init__(
        self,
        policy: RoleModule,
        reference: RoleModule,
        mixture: float,
        as_reference: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__()
        self.policy, self.reference, self.mixture, self.as_reference = policy, reference, mixture, as_reference

    @property
    def core(self) -> Mixture:
        """What is called with `inputs`."""
        return self

    @property
    def config(self) -> PreTrainedConfig:
        """The policy's; its reference has room for as many tokens."""
        config: PreTrainedConfig = self.policy.core.config
        return config

    def inputs(self, ids: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """Arguments of `forward`; each policy makes its own positions of them."""
        return {"input_ids": ids, "attention_mask": attention.long()}

    @contextmanager
    def decoding(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Inside, both policies are ready to sample; adapters stay apart, since the reference may be without."""
        with ExitStack() as entered:
            for core in {id(each): each for each in (self.policy.core, self.reference.core)}.values():
                entered.enter_context(decoding_weights(core, dtype, merge=False))
            yield

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past_key_values: Caches | None = None, **options: Any
    ) -> CausalLMOutputWithPast:
        """Mixed logits (b, T', V) in float32 and both caches."""
        own, other = (None, None) if past_key_values is None else past_key_values.both
        first = self.policy.core(**self.policy.inputs(input_ids, attention_mask), past_key_values=own, **options)
        with self.as_reference():
            inputs = self.reference.inputs(input_ids, attention_mask)
            second = self.reference.core(**inputs, past_key_values=other, **options)
        has_caches = all("past_key_values" in output for output in (first, second))
        return CausalLMOutputWithPast(
            logits=mixed_logits(first.logits, second.logits, mixture=self.mixture),
            past_key_values=Caches((first.past_key_values, second.past_key_values)) if has_caches else None,  # type: ignore[arg-type]
        )
