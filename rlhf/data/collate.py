"""Examples -> padded batches. What is padding is known from lengths; no token id is ever compared with the pad id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.batch import Answers, Lists, Pairs, Prompts, Tokens
from rlhf.data.encode import Ids, Mask
from rlhf.data.examples import AnswerExample, ListExample, PairExample, PromptExample, TokenExample


def tokens(examples: Sequence[TokenExample], pad_id: int) -> Tokens:
    """Right-padded token rows (B, T), T the longest of them."""
    return _right([e.ids for e in examples], [e.mask for e in examples], pad_id)


def pairs(examples: Sequence[PairExample], pad_id: int) -> Pairs:
    """Both sides of every pair with the prompt in front, each side padded to its own longest row."""
    chosen = [(e.prompt_ids, e.chosen_ids, e.chosen_mask) for e in examples]
    rejected = [(e.prompt_ids, e.rejected_ids, e.rejected_mask) for e in examples]
    return Pairs(
        _answered(chosen, pad_id),
        _answered(rejected, pad_id),
        _floats([e.margin for e in examples]),
        scores=_floats_if_all([e.scores for e in examples]),
        win_rates=_floats_if_all([e.win_rates for e in examples]),
        row=_numbers(examples),
        weight=_floats([e.weight for e in examples]),
    )


def answers(examples: Sequence[AnswerExample], pad_id: int, partners: Sequence[AnswerExample] | None = None) -> Answers:
    """Prompts with one answer each. partners: for every row the one whose answer is put after its prompt, too."""
    rows = [(e.prompt_ids, e.answer_ids, e.answer_mask) for e in examples]
    mismatched = None
    if partners is not None:
        pairs = zip(examples, partners, strict=True)
        mismatched = _answered([(e.prompt_ids, other.answer_ids, other.answer_mask) for e, other in pairs], pad_id)
    return Answers(
        _answered(rows, pad_id),
        torch.tensor([e.is_good for e in examples]),
        _floats([e.reward for e in examples]),
        _floats([e.density for e in examples]),
        _numbers(examples),
        mismatched=mismatched,
    )


def lists(examples: Sequence[ListExample], pad_id: int) -> Lists:
    """Lists of answers (B, K, T): K the longest list, T the longest row."""
    most = max(len(e.answers) for e in examples)
    rows = [(e.prompt_ids, *answer) for e in examples for answer in e.answers]
    tokens = _answered(rows, pad_id)
    present = torch.tensor([[i < len(e.answers) for i in range(most)] for e in examples])
    shape = (len(examples), most, tokens.ids.shape[1])
    spread = [torch.full(shape, pad_id, dtype=torch.int64), *(torch.zeros(shape, dtype=torch.bool) for _ in range(2))]
    for whole, part in zip(spread, (tokens.ids, tokens.attention, tokens.mask), strict=True):
        whole[present] = part  # (rows, T)
    scores = _floats([[*e.scores, *[0.0] * (most - len(e.scores))] for e in examples])
    return Lists(*spread, scores, present, _numbers(examples))


def prompts(examples: Sequence[PromptExample], pad_id: int) -> Prompts:
    """Left-padded prompts (B, P), so that every answer starts in the same column."""
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention = torch.zeros((len(examples), width), dtype=torch.bool)
    for i, example in enumerate(examples):
        ids[i, width - len(example.ids) :] = _tensor(example.ids, torch.int64)
        attention[i, width - len(example.ids) :] = True
    return Prompts(ids, attention, [{**e.fields, "row": e.row} for e in examples])


def _answered(rows: Sequence[tuple[Ids, Ids, Mask]], pad_id: int) -> Tokens:
    """(prompt, answer, which of the answer's tokens are trained) -> rows, right-padded to the longest."""
    ids = [np.concatenate([prompt, answer]) for prompt, answer, _ in rows]
    masks = [np.concatenate([np.zeros(len(prompt), np.bool_), mask]) for prompt, _, mask in rows]
    return _right(ids, masks, pad_id)


def _right(rows: Sequence[Any], masks: Sequence[Any], pad_id: int) -> Tokens:
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention = torch.zeros((len(rows), width), dtype=torch.bool)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, (row, trained) in enumerate(zip(rows, masks, strict=True)):
        ids[i, : len(row)] = _tensor(row, torch.int64)
        attention[i, : len(row)] = True
        mask[i, : len(row)] = _tensor(trained, torch.bool)
    return Tokens(ids, attention, mask)


def _tensor(array: Any, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(array, dtype=dtype)


def _floats(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)


def _floats_if_all(numbers: Sequence[tuple[float, float] | None]) -> Tensor | None:
    """(B, 2), None where any row has none."""
    return None if any(each is None for each in numbers) else _floats(numbers)


def _numbers(examples: Sequence[PairExample | AnswerExample | ListExample]) -> Tensor:
    return torch.tensor([e.row for e in examples], dtype=torch.int64)
