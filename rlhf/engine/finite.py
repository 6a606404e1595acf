"""Which tensors of an engine hold a number that is not finite: weights, gradients, optimizer state.

Every function looks at what this rank holds and meets no other rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.engine.zero import is_sharded

GRADIENT, WEIGHT = "gradient of ", "weight "  # how they are called, with their names behind


def not_finite(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """name -> the first value in it that is not finite (nan, inf, -inf), of every tensor that has one.

    One reduction over all of them where all are finite: the largest absolute value of each, which NaN passes through.
    """
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    named = [(name, t.detach()) for name, t in pairs if t.is_floating_point() and t.numel()]
    if not named:
        return {}
    largest = torch._foreach_norm([tensor for _, tensor in named], ord=float("inf"))
    together = torch.stack([value.to(named[0][1].device, torch.float32) for value in largest])
    if together.isfinite().all():
        return {}
    return {name: first_of(tensor) for name, tensor in named if not tensor.isfinite().all()}


def first_of(tensor: Tensor) -> str:
    """The first value that is not finite, in words."""
    return str(float(tensor[~tensor.isfinite()].flatten()[0]))


def held(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """What this rank holds of parameters: the shard of one that ZeRO-3 has cut up, else all of it."""
    for name, parameter in parameters:
        yield name, (parameter.ds_tensor if is_sharded(parameter) else parameter)


def gradients(optimizer: Any, stage: int) -> Iterator[tuple[int, Tensor]]:
    """(id of a parameter, this rank's part of its accumulated gradient), as DeepSpeed's ZeRO optimizers keep them.

    With offload they keep none apart: there is nothing to name then.
    """
    groups = optimizer.fp16_groups if stage == 3 else optimizer.params_in_partition
    for index, group in enumerate(groups):
        parts = optimizer.averaged_gradients[index] if index in optimizer.averaged_gradients else None
        for parameter, gradient in zip(group, parts or (), strict=False):  # padding may follow
            if gradient is not None:
                yield id(parameter), gradient


def state_tensors(optimizer: Any, stage: int) -> Iterator[tuple[str, Tensor]]:
    """(what it is, tensor) of an optimizer's state on this rank, master weights included."""
    base = optimizer if stage == 0 else optimizer.optimizer
    for number, state in enumerate(base.state.values()):
        for name, value in state.items():
            if torch.is_tensor(value):
                yield f"optimizer state {name}, part {number}", value
    if stage:
        masters = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        for number, master in enumerate(masters):
            yield f"master weights, part {number}", master
