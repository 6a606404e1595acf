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


def _expect_present(tensors: dict[str, Tensor | None], shape: tuple[int, ...]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None:
            _expect(name, tensor, shape)


class Rows:
    """A record whose tensors (and lists) share their first axis, so that it can be cut into rows."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))  # type: ignore[arg-type]

    def map(self, change: Callable[[Any], Any]) -> Self:
        """The same record with `change` applied to every present field (to what nested records and dicts hold too)."""

        def changed(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: changed(each) for name, each in value.items()}
            return value.map(change) if isinstance(value, Rows) else None if value is None else change(value)

        return type(self)(**{f.name: changed(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]

    def select(self, rows: list[int]) -> Self:
        """The given rows, in the given order."""

        def pick(value: Any) -> Any:
            if not torch.is_tensor(value):
                return [value[i] for i in rows]
            return value[torch.tensor(rows, dtype=torch.int64, device=value.device)]

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
    ref: Tensor | None = None  # (B, 2) summed reference log-probs of chosen and rejected, where precomputed
    scores: Tensor | None = None  # (B, 2) float32 of chosen and rejected; None where any row lacks them
    win_rates: Tensor | None = None  # (B, 2) float32 in [0, 1], the same
    row: Tensor | None = None  # (B,) int64, numbers of the dataset's records
    extras: dict[str, Tensor] | None = None  # (B,) each: what the whole batch says of every row
    weight: Tensor | None = None  # (B,) float32, of every pair in the loss; None: 1

    def weighted(self, losses: Tensor) -> Tensor:
        """The pairs' losses (B,) times their weights."""
        return losses if self.weight is None else losses * self.weight.to(losses)

    def __post_init__(self) -> None:
        _expect("rejected", self.rejected.ids[:, 0], (len(self.chosen),))
        _expect("margin", self.margin, (len(self.chosen),))
        _expect_present({"ref": self.ref, "scores": self.scores, "win_rates": self.win_rates}, (len(self.chosen), 2))
        _expect_present({"row": self.row, "weight": self.weight, **(self.extras or {})}, (len(self.chosen),))


@dataclass(frozen=True)
class Answers(Rows):
    """Single answers that are good or bad, each with the prompt in front."""

    tokens: Tokens
    is_good: Tensor  # (B,) bool
    rewards: Tensor  # (B,) float32, the answer's score, or +1 and -1 by label
    density: Tensor  # (B,) float32 in (0, 1), the share of good answers among the answers to such a prompt
    row: Tensor  # (B,) int64, numbers of the dataset's records
    ref: Tensor | None = None  # (B,) summed reference log-probs, where precomputed
    mismatched: Tokens | None = None  # every prompt with an answer to another one
    ref_mismatched: Tensor | None = None  # (B,)
    extras: dict[str, Tensor] | None = None  # (B,) each: what the whole batch says of every row

    def __post_init__(self) -> None:
        shape = (len(self.tokens),)
        for name in ("is_good", "rewards", "density", "row"):
            _expect(name, getattr(self, name), shape)
        _expect_present({"ref": self.ref, "ref_mismatched": self.ref_mismatched, **(self.extras or {})}, shape)
        _expect_present({"mismatched": None if self.mismatched is None else self.mismatched.ids[:, 0]}, shape)


@dataclass(frozen=True)
class Lists(Rows):
    """Up to K scored answers to each prompt, each with the prompt in front. Absent answers are padding throughout."""

    ids: Tensor  # (B, K, T) int64
    attention: Tensor  # (B, K, T) bool
    mask: Tensor  # (B, K, T) bool
    scores: Tensor  # (B, K) float32, higher is better, 0 where absent
    present: Tensor  # (B, K) bool
    row: Tensor  # (B,) int64, numbers of the dataset's records
    ref: Tensor | None = None  # (B, K) summed reference log-probs, where precomputed
    extras: dict[str, Tensor] | None = None  # (B,) each: what the whole batch says of every row

    def answers(self) -> Tokens:
        """The answers that are there, list by list, as rows."""
        return Tokens(self.ids[self.present], self.attention[self.present], self.mask[self.present])

    def __post_init__(self) -> None:
        shape = tuple(self.ids.shape)
        _expect_present({"attention": self.attention, "mask": self.mask}, shape)
        _expect_present({"scores": self.scores, "present": self.present, "ref": self.ref}, shape[:2])
        _expect("row", self.row, shape[:1])


@dataclass(frozen=True)
class PairLogprobs(Rows):
    """Sequence log-probs (nats, summed over answer tokens) of both sides under the policy and the reference."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)
    ref_chosen: Tensor | None  # (B,), None for losses that compare with no reference
    ref_rejected: Tensor | None
    chosen_len: Tensor  # (B,) answer tokens
    rejected_len: Tensor  # (B,)


@dataclass(frozen=True)
class AnswerLogprobs(Rows):
    """Sequence log-probs of single answers that are known to be good or bad, or that have a score."""

    logprobs: Tensor  # (B,)
    ref_logprobs: Tensor | None  # (B,)
    length: Tensor  # (B,) answer tokens
    is_good: Tensor  # (B,) bool


@dataclass(frozen=True)
class ListLogprobs(Rows):
    """Sequence log-probs of up to K scored answers to each prompt; the numbers of absent ones mean nothing."""

    logprobs: Tensor  # (B, K)
    ref_logprobs: Tensor | None  # (B, K)
    length: Tensor  # (B, K) answer tokens
    scores: Tensor  # (B, K) higher is better
    present: Tensor  # (B, K) bool


@dataclass(frozen=True)
class TokenLogprobs(Rows):
    """Log-probs of every answer token of one side."""

    logprobs: Tensor  # (B, R)
    mask: Tensor  # (B, R) bool


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
    old_logprobs: Tensor | None  # (B, R), None: those that the only update on this rollout finds itself
    ref_logprobs: Tensor  # (B, R)
    advantages: Tensor  # (B, R)
    scores: Tensor  # (B,)
    sample_logprobs: Tensor | None = None  # (B, R) as reported by the sampler, where nothing has compared them yet
    rewards: Tensor | None = None  # (B, R)
    old_values: Tensor | None = None  # (B, R)
    returns: Tensor | None = None  # (B, R)

    def __post_init__(self) -> None:
        shape = tuple(self.response_mask.shape)
        tokens = ("old_logprobs", "ref_logprobs", "sample_logprobs", "advantages", "rewards", "old_values", "returns")
        _expect_present({name: getattr(self, name) for name in tokens}, shape)
        _expect("scores", self.scores, (shape[0],))


@dataclass(frozen=True)
class Loss:
    """A loss as sums. Dividing by the global count of each denominator is the engine's job.

    terms: name -> (sum, denominator name, weight); the loss is sum_i weight_i * sum_i / count[denominator_i].
    metrics: name -> (sum, denominator name), detached.
    """

    terms: dict[str, tuple[Tensor, str, float]]
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
