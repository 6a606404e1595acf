"""Matrix products of float32 on CPUs where PyTorch's own choice of library leaves most of the machine unused.

PyTorch multiplies float32 matrices with MKL, which does not use the widest instructions of other makers' processors.
oneDNN, the library that it multiplies narrower types with, does: on an AMD processor with AVX-512 it is about twice as
fast, at the same precision.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D


@cache
def prefers_onednn() -> bool:
    """Whether this processor is one where oneDNN multiplies float32 faster than MKL. A fact, not a measurement.

    A measurement could turn out differently after a resume, and with it the last bits of every number.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    facts = {line.split(":")[0].strip(): line.split(":")[1] for line in lines if ":" in line}
    is_wide_amd = "AuthenticAMD" in facts.get("vendor_id", "") and "avx512f" in facts.get("flags", "").split()
    return is_wide_amd and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def is_for_onednn(x: Tensor) -> bool:
    """Whether products with `x` are computed by oneDNN here."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.enabled and prefers_onednn()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): (..., out). Has no gradient; see `linear`."""
    if not x.numel() or not weight.numel():  # nothing to multiply, which oneDNN refuses
        return nn.functional.linear(x, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`nn.functional.linear` by oneDNN, with its gradient. Only where `is_for_onednn`."""
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class FastLinear(nn.Linear):
    """A linear layer that takes the faster library where there is one."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return linear(x, self.weight, self.bias) if is_for_onednn(x) else super().forward(x)


class FastConv1D(Conv1D):
    """The same for GPT-2's layers, whose weights are (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if is_for_onednn(x):
            return linear(x, self.weight.T, self.bias)
        found: Tensor = super().forward(x)
        return found


_FAST: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FastLinear, Conv1D: FastConv1D}


def hasten(model: nn.Module) -> None:
    """Let all plain linear layers of a model take the faster library, in place."""
    for module in model.modules():
        if type(module) in _FAST:
            module.__class__ = _FAST[type(module)]


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        return (
            product(rows, weight.T).view(x.shape) if needs_x else None,
            product(rows.T, x.reshape(-1, x.shape[-1]).T) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
