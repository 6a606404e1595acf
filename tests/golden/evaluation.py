"""How each published vector of an evaluation figure is computed with ours; `test_vectors.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.eval.metrics import cohen_kappa, distinct_n, fleiss_kappa, pass_at_k, win_rate

Inputs = dict[str, Tensor]
Computed = dict[str, Any]


def as_tensors(values: dict[str, float]) -> Computed:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def share(inputs: Inputs, hyper: Computed) -> Computed:
    found = win_rate(*(inputs[name].item() for name in ("wins", "ties", "losses")), z=hyper["z"])
    return as_tensors({"win_rate": found.mean, "wilson_low": found.low, "wilson_high": found.high})


def two_raters(inputs: Inputs, hyper: Computed) -> Computed:
    found = cohen_kappa(inputs["confusion"].tolist())
    return as_tensors({"agreement": found.share, "kappa": found.kappa})


def many_raters(inputs: Inputs, hyper: Computed) -> Computed:
    found = fleiss_kappa(inputs["counts"].tolist())
    return as_tensors({"P_bar": found.share, "kappa": found.kappa})


def distinct(inputs: Inputs, hyper: Computed) -> Computed:
    return as_tensors({"distinct": distinct_n(ragged(inputs["tokens"]), n=hyper["n"])})


def ragged(tokens: Tensor) -> list[list[float]]:
    """Rows without the filling that made them a tensor."""
    return [[token for token in row if token >= 0] for row in tokens.tolist()]


def passed(inputs: Inputs, hyper: Computed) -> Computed:
    return as_tensors({"value": pass_at_k(int(inputs["n"]), int(inputs["c"]), k=hyper["k"])})


COMPUTE: dict[str, Callable[[Inputs, Computed], Computed]] = {
    "win_rate": share,
    "cohen_kappa": two_raters,
    "fleiss_kappa": many_raters,
    "distinct_n": distinct,
    "pass_at_k": passed,
}
