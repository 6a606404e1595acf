"""Examples -> padded batches. What is padding is known from lengths; no token id is ever compared with the pad id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.batch import Pairs, Prompts, Tokens
from rlhf.data.examples import PairExample, PromptExample, TokenExample


def tokens(examples: Sequence[TokenExample], pad_id: int) -> Tokens:
    """Right-padded token rows (B, T), T the longest of them."""
    return _right([e.ids for e in examples], [e.mask for e in examples], pad_id)


def pairs(examples: Sequence[PairExample], pad_id: int) -> Pairs:
    """Both sides of every pair with the prompt in front, each side padded to its own longest row."""
    sides: dict[str, Tokens] = {}
    for name in ("chosen", "rejected"):
        answers = [getattr(e, f"{name}_ids") for e in examples]
        masks = [getattr(e, f"{name}_mask") for e in examples]
        ids = [np.concatenate([e.prompt_ids, answer]) for e, answer in zip(examples, answers, strict=True)]
        prompt = [np.zeros(len(e.prompt_ids), np.bool_) for e in examples]
        sides[name] = _right(ids, [np.concatenate(both) for both in zip(prompt, masks, strict=True)], pad_id)
    margin = torch.tensor([e.margin for e in examples], dtype=torch.float32)
    weight = torch.tensor([e.weight for e in examples], dtype=torch.float32)
    return Pairs(sides["chosen"], sides["rejected"], margin, weight=weight)


def prompts(examples: Sequence[PromptExample], pad_id: int) -> Prompts:
    """Left-padded prompts (B, P), so that every answer starts in the same column."""
    width = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), width), pad_id, dtype=torch.int64)
    attention = torch.zeros((len(examples), width), dtype=torch.bool)
    for i, example in enumerate(examples):
        ids[i, width - len(example.ids) :] = _tensor(example.ids, torch.int64)
        attention[i, width - len(example.ids) :] = True
    return Prompts(ids, attention, [{**e.fields, "row": e.row} for e in examples])


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
