"""The modules that engines wrap: log-probs of a policy, values and scores of a scorer.

Everything that touches weights happens inside `forward`, head included, because sharded weights are whole only there.
Padding may stand on either side: positions are counted over real tokens, and nothing is found by looking for pad ids.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlhf.algo.logprobs import entropy as distribution_entropy
from rlhf.algo.logprobs import (
    scale_logits,
    token_contrast,
    token_forward_kl,
    token_logprobs,
    truncate_logits,
)
from rlhf.errors import CheckpointError
from rlhf.recipe.schema import SamplingBlock

# The model's own distribution: what SFT and preference losses are about.
UNCHANGED = SamplingBlock(temperature=1.0, top_k=0, top_p=1.0)


class RoleModule(nn.Module):
    """A Hugging Face model in one role. Its weights are named `model.*`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = "position_ids" in inspect.signature(self.called.forward).parameters

    @property
    def core(self) -> nn.Module:
        """The Hugging Face model itself; adapters live inside its layers."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def called(self) -> nn.Module:
        """The part of the model that `forward` calls first; it takes the ids."""
        return self.core

    def inputs(self, ids: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """Arguments of the Hugging Face forward for ids padded on either side.

        attention: (B, T); ids: its last columns, all of them or those that a cache does not hold yet.
        """
        attention = attention.long()
        inputs = {"input_ids": ids, "attention_mask": attention}
        if self._takes_positions:
            inputs["position_ids"] = (attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return inputs


class PolicyModule(RoleModule):
    """Log-probs of given tokens under a causal language model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if "logits_to_keep" not in inspect.signature(self.core.forward).parameters:
            raise CheckpointError(
                f"expected a model that can compute logits of chosen positions, found a {type(self.core).__name__}",
                fix="Use an architecture whose transformers class takes logits_to_keep.",
            )

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        start: int,
        sampling: SamplingBlock = UNCHANGED,
        entropy: Literal["none", "value", "gradient"] = "none",
        ref_distribution: Tensor | None = None,
        contrast: int = 0,
        whole: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Log-probs of ids[:, start:] under `sampling`'s distribution, (B, T - start) float32, in nats.

        ids, attention: (B, T). Only the positions that predict these tokens enter the head. Where the attention is 0
        the numbers are finite and mean nothing. Behind the log-probs, of the same shape and in this order, what was
        asked for of every position:
        entropy: of its distribution, without or with gradient.
        ref_distribution: a reference's log-probs (B, T - start, V): KL(reference || policy).
        contrast: the CRINGE loss of its token against this many others, see `token_contrast`.
        whole: instead of all this, the log-probs of every token of the vocabulary, (B, T - start, V).
        """
        length = ids.shape[1]
        assert 1 <= start < length, f"start: expected 1..{length - 1}, found {start}"
        positions = torch.arange(start - 1, length - 1, device=ids.device)
        logits = self.core(**self.inputs(ids, attention), use_cache=False, logits_to_keep=positions).logits  # (B, R, V)
        if whole:
            return logits.float().log_softmax(-1)
        cut = {"top_k": sampling.top_k, "top_p": sampling.top_p}
        found = [token_logprobs(logits, ids[:, start:], temperature=sampling.temperature, **cut)]
        if entropy != "none":
            with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
                scaled = scale_logits(logits, temperature=sampling.temperature)
                found.append(distribution_entropy(truncate_logits(scaled, **cut)))
        if ref_distribution is not None:
            found.append(token_forward_kl(ref_distribution, logits.float().log_softmax(-1)))
        if contrast:
            found.append(token_contrast(logits, ids[:, start:], k=contrast))
        return found[0] if len(found) == 1 else tuple(found)

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Inside, a LoRA policy is its own base: the reference, for free. No parameter's `requires_grad` changes.

        For use without gradients: with checkpointing the recomputation would run after the adapter is on again.
        """
        layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        assert layers, "only a LoRA policy has a base to fall back on"
        before = [layer._disable_adapters for layer in layers]
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, was in zip(layers, before, strict=True):
                layer._disable_adapters = was


class ScorerModule(RoleModule):
    """Scores of whole sequences, or values of each state, under a model with a scalar head."""

    def __init__(self, model: nn.Module) -> None:
        core = model.get_base_model() if isinstance(model, PeftModel) else model
        if not hasattr(core, "score") or not hasattr(core, core.base_model_prefix):
            raise CheckpointError(
                f"expected a decoder with a `score` head, found a {type(core).__name__}",
                fix="Use an architecture whose transformers class for sequence classification has one.",
            )
        super().__init__(model)

    @property
    def called(self) -> nn.Module:
        """The model without its head."""
        return getattr(self.core, self.core.base_model_prefix)

    def forward(self, ids: Tensor, attention: Tensor, start: int | None = None) -> Tensor:
        """start None: the score at each row's last attended token, (B,) float32.

        Else values (B, T - start) float32: of the state before token t, for t in start..T-1, so read at position t - 1.
        """
        hidden = self.called(**self.inputs(ids, attention), use_cache=False).last_hidden_state  # (B, T, H)
        return read_scores(self.core.score, hidden, attention, start)


def read_scores(head: nn.Module, hidden: Tensor, attention: Tensor, start: int | None) -> Tensor:
    """Scores (B,) or values (B, T - start) of hidden states (B, T, H), float32; see `ScorerModule.forward`."""
    if start is not None:
        assert 1 <= start < hidden.shape[1], f"start: expected 1..{hidden.shape[1] - 1}, found {start}"
        return _head(head, hidden[:, start - 1 : -1])
    columns = torch.arange(hidden.shape[1], device=hidden.device)
    last = (columns * attention.long()).argmax(-1)  # (B,)
    return _head(head, hidden[torch.arange(len(hidden), device=hidden.device), last])


def _head(head: nn.Module, hidden: Tensor) -> Tensor:
    """(..., H) -> (...,) float32. Called as a module, which is what makes a sharded head whole."""
    return head(hidden.to(next(head.parameters()).dtype)).float().squeeze(-1)
