"""L1 on what training changes: after every optimizer step each weight goes towards its start, and stays there if near.

Weight by weight, so it is the same however DeepSpeed has cut the weights up, and exact zeros come of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class PullToStart:
    """A hook behind an optimizer's step: the proximal step of lr x l1 x |weight - start|_1.

    Like decoupled weight decay it is apart from the gradient, which Adam would rescale. The weights are those that the
    optimizer steps: whole parameters, or the float32 pieces that ZeRO keeps. A copy of them is held as the start.
    """

    def __init__(self, weights: Iterable[Tensor], l1: float) -> None:
        self.l1 = l1
        self.starts = {weight: weight.detach().clone() for weight in weights}

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.copy_(pulled(weight, self.starts[weight], group["lr"] * self.l1))


def pulled(weight: Tensor, start: Tensor, distance: float) -> Tensor:
    """argmin_x (x - weight)^2 / 2 + distance |x - start|: nearer by `distance`, exactly the start within it."""
    change = weight - start
    return torch.where(change.abs() <= distance, start, weight - distance * change.sign())
