"""The attention function that our forward passes give to Hugging Face models, through their own registry.

Where a `layout` is handed to the model's forward, the layout attends: it knows how the tokens of one flat row belong
together, or where a decoding step finds its keys. Without one, everything is as transformers has it (SDPA).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf"


class Layout(Protocol):
    """How the tokens of one forward pass attend to each other."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        dropout: float = 0.0,
    ) -> Tensor:
        """query (B, H, N, D), key and value (B, Hkv, N, D) -> (B, N, H, D).

        layer: the layer's number. scale: of the scores; None: 1 / sqrt(D). window: the most tokens one attends to.
        dropout: the probability that an attention weight is set to 0.
        """


class Step(Protocol):
    """A forward pass in which a layout attends."""

    def __call__(self, ids: Tensor, positions: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """ids, positions (b, t) -> logits (., V) of the positions to keep in each row; None: of all b x t."""


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; the signature is its own."""
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    unknown = [name for name in ("softcap", "position_bias", "s_aux") if options.get(name) is not None]
    if unknown:
        raise RuntimeError(f"attention with {', '.join(unknown)}")
    number: int = module.layer_idx  # type: ignore[assignment]
    rules = {"scale": options.get("scaling"), "window": options.get("sliding_window")}
    return layout.attend(number, query, key, value, **rules, dropout=options.get("dropout", 0.0)), None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def install(core: PreTrainedModel) -> bool:
    """Let a model that runs on SDPA take layouts. False where it cannot."""
    if core.config._attn_implementation == NAME:
        return True
    if core.config._attn_implementation != "sdpa" or not core._supports_attention_backend:
        return False
    core.set_attn_implementation(NAME)
    return True


def laid_out(core: nn.Module, ids: Tensor, positions: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
    """The `Step` of a Hugging Face model that takes layouts."""
    output = core(
        input_ids=ids,
        attention_mask=torch.zeros(1, 1, 1, 1, device=ids.device),  # keeps the model from making one
        position_ids=positions,
        use_cache=False,
        logits_to_keep=0 if keep is None else keep,
        layout=layout,
    )
    logits: Tensor = output.logits
    return logits.flatten(0, 1)
