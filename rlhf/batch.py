"""Frozen records of tensors that travel between the packages. Shapes are checked once, at construction.

Notation: B rows, N prompts, G answers per prompt (B = N x G), P prompt columns, R response columns, T = P + R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    assert tensor.shape == shape, f"{name}: expected {shape}, found {tuple(tensor.shape)}"


class Rows:
    """A record whose tensors (and lists) share their first axis, so that it can be cut into rows."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def map(self, change: Callable[[Any], Any]) -> Self:
        """The same record with `change` applied to every present field (nested records are mapped too)."""
        values = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            values[f.name] = value.map(change) if isinstance(value, Rows) else None if value is None else change(value)
        return type(self)(**values)

    def select(self, rows: list[int]) -> Self:
        """The given rows, in the given order."""

        def pick(value: Any) -> Any:
            return (
                value[torch.tensor(rows, device=value.device)] if torch.is_tensor(value) else [value[i] for i in rows]
            )

        return self.map(pick)

    def split(self, size: int) -> Iterator[Self]:
        """Consecutive pieces of at most `size` rows."""
        for start in range(0, len(self), size):
            yield self.map(lambda value, s=start: value[s : s + size])

    def to(self, device: torch.device) -> Self:
        """The same record with its tensors on `device`."""
        return self.map(lambda value: value.to(device) if torch.is_tensor(value) else value)


@dataclass(frozen=True)
class Tokens(Rows):
    """Right-padded token rows. `mask` is 1 on tokens that count in the loss, `attention` 1 on real tokens."""

    ids: Tensor  # (B, T) int64
    attention: Tensor  # (B, T) bool
    mask: Tensor  # (B, T) bool

    def __post_init__(self) -> None:
        _expect("attention", self.attention, tuple(self.ids.shape))
        _expect("mask", self.mask, tuple(self.ids.shape))


@dataclass(frozen=True)
class Pairs(Rows):
    """A better and a worse answer to the same prompt, each with the prompt in front."""

    chosen: Tokens
    rejected: Tokens
    margin: Tensor  # (B,) float32, 0 where the data has none
    ref_chosen: Tensor | None = None  # (B,) summed reference log-probs, where precomputed
    ref_rejected: Tensor | None = None
    weight: Tensor | None = None  # (B,) float32, of every pair in the loss; None: 1

    def weighted(self, losses: Tensor) -> Tensor:
        """The pairs' losses (B,) times their weights."""
        return losses if self.weight is None else losses * self.weight.to(losses)

    def __post_init__(self) -> None:
        _expect("rejected", self.rejected.ids[:, 0], (len(self.chosen),))
        _expect("margin", self.margin, (len(self.chosen),))
        if self.weight is not None:
            _expect("weight", self.weight, (len(self.chosen),))


@dataclass(frozen=True)
class PairLogprobs(Rows):
    """Sequence log-probs (nats, summed over answer tokens) of both sides under the policy and the reference."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)
    ref_chosen: Tensor  # (B,)
    ref_rejected: Tensor  # (B,)
    chosen_len: Tensor  # (B,) answer tokens
    rejected_len: Tensor  # (B,)


@dataclass(frozen=True)
class Prompts(Rows):
    """Left-padded prompts."""

    ids: Tensor  # (B, P) int64
    attention: Tensor  # (B, P) bool
    rows: list[dict[str, Any]]  # the dataset row each prompt came from: `row` number, answer columns, prompt text


@dataclass(frozen=True)
class Rollout(Rows):
    """Prompts with one sampled answer each: columns [0, P) are the prompt, [P, T) the answer."""

    ids: Tensor  # (B, T) int64
    attention: Tensor  # (B, T) bool
    response_mask: Tensor  # (B, R) bool, 1 on answer tokens, the end token included
    sample_logprobs: Tensor  # (B, R) as reported by the sampler
    finished: Tensor  # (B,) bool, the answer ended by itself
    texts: list[str]  # answers without special tokens
    rows: list[dict[str, Any]]

    def __post_init__(self) -> None:
        _expect("attention", self.attention, tuple(self.ids.shape))
        _expect("sample_logprobs", self.sample_logprobs, tuple(self.response_mask.shape))
        _expect("finished", self.finished, (self.ids.shape[0],))


@dataclass(frozen=True)
class Experience(Rows):
    """A rollout with everything the update needs. Fields an algorithm has no use for are None."""

    ids: Tensor  # (B, T)
    attention: Tensor  # (B, T)
    response_mask: Tensor  # (B, R)
    old_logprobs: Tensor  # (B, R)
    ref_logprobs: Tensor  # (B, R)
    advantages: Tensor  # (B, R)
    scores: Tensor  # (B,)
    rewards: Tensor | None = None  # (B, R)
    old_values: Tensor | None = None  # (B, R)
    returns: Tensor | None = None  # (B, R)
    pretraining: Tokens | None = None  # (B, ...) supervised rows that the same update learns from

    def __post_init__(self) -> None:
        shape = tuple(self.response_mask.shape)
        for name in ("old_logprobs", "ref_logprobs", "advantages", "rewards", "old_values", "returns"):
            value = getattr(self, name)
            if value is not None:
                _expect(name, value, shape)
        _expect("scores", self.scores, (shape[0],))


@dataclass(frozen=True)
class Loss:
    """A loss as sums. Dividing by the global count of each denominator is the engine's job.

    terms: name -> (sum, denominator name, weight); the loss is sum_i weight_i * sum_i / count[denominator_i].
    metrics: name -> (sum, denominator name), detached.
    """

    terms: dict[str, tuple[Tensor, str, float]]
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
