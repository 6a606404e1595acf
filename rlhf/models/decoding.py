"""The weights that sampling runs on, for the time of a rollout: adapters merged, cast, and packed for the CPU.

The model's own parameters are not touched. Layers and parameters are exchanged for others and put back, so that
optimizers and sharding, which hold on to the parameters themselves, never notice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlhf.models.cpu_decoder import Packed
from rlhf.models.head import TokenHead
from rlhf.models.linear import FastConv1D, FastLinear

_PACKED = (torch.float32, torch.bfloat16)
_PLAIN = (nn.Linear, FastLinear, TokenHead, Conv1D, FastConv1D)


@contextmanager
def decoding_weights(
    core: nn.Module, dtype: torch.dtype | None, *, merge: bool = True, pack: bool = True
) -> Iterator[None]:
    """Inside, `core` computes in `dtype` (None: its own); active adapters are merged, or stay apart.

    Weights that are in this dtype already, and have no adapter, are shared and not copied; only packed layers, which
    a CPU multiplies up to twice as fast, are always copies.
    """
    dtype = core.dtype if dtype is None else dtype
    layers = {}  # (parent, name) -> stand-in
    merged = {id(part) for layer in core.modules() if merge and _is_adapted(layer) for part in layer.modules()}
    for parent in core.modules():
        for name, child in parent.named_children() if id(parent) not in merged else ():
            if (merge or not _is_adapted(child)) and (stand_in := _stand_in(child, dtype, pack)) is not None:
                layers[parent, name] = stand_in
    old_layers = {place: place[0]._modules[place[1]] for place in layers}
    _put(layers)
    casts: dict[Tensor, nn.Parameter] = {}  # one per parameter, which may be tied
    old_parameters = {}
    for module in core.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                if parameter not in casts:
                    casts[parameter] = _frozen(parameter.detach().to(dtype))
                old_parameters[module, name] = parameter
                module._parameters[name] = casts[parameter]
    try:
        yield
    finally:
        for (module, name), parameter in old_parameters.items():
            module._parameters[name] = parameter
        _put(old_layers)


def _put(layers: dict[tuple[nn.Module, str], nn.Module]) -> None:
    for (parent, name), layer in layers.items():
        parent._modules[name] = layer


def _is_adapted(layer: nn.Module) -> bool:
    return isinstance(layer, (LoraLinear, LoraEmbedding))


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _stand_in(layer: nn.Module, dtype: torch.dtype, pack: bool) -> nn.Module | None:
    """What computes the same as a linear or adapted layer while answers are sampled; None: the layer itself does."""
    if isinstance(layer, LoraEmbedding):
        return nn.Embedding.from_pretrained(_merged(layer, dtype), padding_idx=layer.base_layer.padding_idx)
    if not isinstance(layer, LoraLinear) and type(layer) not in _PLAIN:
        return None
    base = layer.base_layer if isinstance(layer, LoraLinear) else layer
    weight = _merged(layer, dtype) if isinstance(layer, LoraLinear) else base.weight.detach().to(dtype)
    is_packed = pack and weight.device.type == "cpu" and dtype in _PACKED and torch.backends.mkldnn.is_available()
    if not is_packed and weight.data_ptr() == base.weight.data_ptr():
        return None
    bias = None if base.bias is None else base.bias.detach().to(dtype)
    if isinstance(base, Conv1D):
        weight = weight.T.contiguous()
    if is_packed:
        return PackedLinear(weight, bias)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=dtype)
    linear.weight, linear.bias = _frozen(weight), None if bias is None else _frozen(bias)
    return linear


def _merged(layer: LoraLinear | LoraEmbedding, dtype: torch.dtype) -> Tensor:
    """The weight with the updates of the active adapters, added in float32 and rounded once."""
    weight: Tensor = layer.base_layer.weight.detach()
    active = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.scaling]
    if not active:
        return weight.to(dtype)
    updates = torch.stack([layer.get_delta_weight(name).detach().float() for name in active])
    return (weight.float() + updates.sum(0)).to(dtype)


class PackedLinear(nn.Module):
    """A linear layer with a packed weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = _frozen(weight), None if bias is None else _frozen(bias)  # some models look at them
        self.packed = Packed(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.packed(x)
