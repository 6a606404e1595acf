"""Llama and its kin as few operations as a CPU can do them in, for sampling.

Of a decoding step of a small model, most of the time goes into calling many small operations one by one. Here a layer
multiplies four times instead of seven, with weights in oneDNN's order; the sums of the residual stream are part of
these products, and one complex product turns all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

from rlhf.models.attention import Layout

# Classes of transformers whose forward pass is the one below, which a class that derives from them may change, and how
# many tokens a layer's attention looks back.
_WINDOWS: dict[str, Callable[[Any], int | None]] = {
    "LlamaForCausalLM": lambda attention: None,
    "MistralForCausalLM": lambda attention: attention.config.sliding_window,
    "Qwen2ForCausalLM": lambda attention: attention.sliding_window,
}


class Packed:
    """A weight (out, in) in the order in which oneDNN multiplies: on some CPUs twice as fast as without."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(weight), bias

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return found

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """The same plus `other` (..., out)."""
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return found


@dataclass(frozen=True)
class _Layer:
    first_norm: tuple[Tensor, float]
    second_norm: tuple[Tensor, float]
    heads: Packed  # of queries, keys and values
    out: Packed
    gates: Packed  # gate and up
    down: Packed
    window: int | None


def has_cpu_decoder(core: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `CpuDecoder` computes what this model does, on this device."""
    if type(core).__name__ not in _WINDOWS or type(core).__module__.split(".")[0] != "transformers":
        return False
    if not all(type(part).__module__.startswith("transformers.") for part in _parts(core)):
        return False
    is_cpu = core.get_input_embeddings().weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return is_cpu and dtype in (torch.float32, torch.bfloat16) and core.config.hidden_act == "silu"


def _parts(core: Any) -> Iterator[nn.Module]:
    """What must be as its class made it; linear layers inside may be adapted."""
    yield core.model.norm
    for layer in core.model.layers:
        yield from (layer, layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm)


class CpuDecoder:
    """The forward pass of a model of a known class, from weights that it holds now, merged and in one dtype."""

    def __init__(self, core: Any) -> None:
        config, body = core.config, core.model
        self.embed, self.rotary = body.embed_tokens.weight.detach(), body.rotary_emb
        self.norm, self.head = _norm(body.norm), Packed(core.lm_head.weight.detach())
        attention = body.layers[0].self_attn
        self.size = attention.head_dim
        self.queries, self.groups = config.num_attention_heads, config.num_key_value_heads
        # The scores' scale is part of the queries' turn.
        self.scales = torch.ones(self.queries + self.groups, 1)
        self.scales[: self.queries] = attention.scaling
        self.layers = [self._layer(layer, _WINDOWS[type(core).__name__]) for layer in body.layers]

    def _layer(self, layer: Any, window: Callable[[Any], int | None]) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        parts = [attention.q_proj, attention.k_proj, attention.v_proj]
        heads = [_rows(part) for part in parts]
        turned = [self._paired(rows) for rows in heads[:2]]
        return _Layer(
            first_norm=_norm(layer.input_layernorm),
            second_norm=_norm(layer.post_attention_layernorm),
            heads=_packed([*turned, heads[2]]),
            out=_packed([_rows(attention.o_proj)]),
            gates=_packed([_rows(mlp.gate_proj), _rows(mlp.up_proj)]),
            down=_packed([_rows(mlp.down_proj)]),
            window=window(attention),
        )

    def _paired(self, rows: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Rows of each head so ordered that the two that turn together are neighbours: a complex number.

        Queries and keys are ordered alike, so their products are what they were.
        """

        def ordered(x: Tensor) -> Tensor:
            return x.unflatten(0, (-1, 2, self.size // 2)).transpose(1, 2).reshape(x.shape)

        weight, bias = rows
        return ordered(weight), None if bias is None else ordered(bias)

    @torch.no_grad()
    def __call__(self, ids: Tensor, positions: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        """ids, positions (b, t) -> logits (., V) of the positions to keep; None: of all b x t."""
        count, length = ids.shape
        x = self.embed[ids.flatten()]  # (b * t, H)
        turns = self.turns(positions)
        for number, layer in enumerate(self.layers):
            heads = layer.heads(rms_norm(x, x.shape[-1:], *layer.first_norm)).unflatten(-1, (-1, self.size)).float()
            both = self.turned(heads[:, : self.queries + self.groups], turns)
            values = heads[:, self.queries + self.groups :]
            parts = (both[:, : self.queries], both[:, self.queries :], values)  # each (b * t, heads, D)
            query, key, value = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
            seen = layout.attend(number, query, key, value, scale=1.0, window=layer.window)  # (b, t, H, D)
            x = layer.out.added(seen.reshape(count * length, -1).to(x.dtype), x)
            gate, up = layer.gates(rms_norm(x, x.shape[-1:], *layer.second_norm)).chunk(2, -1)
            x = layer.down.added(silu(gate).mul_(up), x)
        if keep is not None:
            x = x[keep]
        return self.head(rms_norm(x, x.shape[-1:], *self.norm))

    def turns(self, positions: Tensor) -> Tensor:
        """(b * t, heads, D / 2) complex numbers that queries and keys at these positions are multiplied with."""
        cos, sin = self.rotary(self.scales, positions)  # (b, t, D), of which the second half repeats the first
        half = torch.complex(cos[..., : self.size // 2], sin[..., : self.size // 2])
        return half.flatten(0, 1)[:, None] * self.scales

    def turned(self, heads: Tensor, turns: Tensor) -> Tensor:
        """(b * t, heads, D) with every head turned."""
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2)


def _norm(layer: Any) -> tuple[Tensor, float]:
    return layer.weight.detach(), layer.variance_epsilon


def _rows(layer: Any) -> tuple[Tensor, Tensor | None]:
    return layer.weight.detach(), None if layer.bias is None else layer.bias.detach()


def _packed(parts: list[tuple[Tensor, Tensor | None]]) -> Packed:
    """Layers with one input as one."""
    biases = [bias for _, bias in parts if bias is not None]
    zeros = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
    return Packed(torch.cat([weight for weight, _ in parts]), torch.cat(zeros) if biases else None)
