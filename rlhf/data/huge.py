"""Rows of a million characters and more: told to be too long without being tokenised.

A tokenizer takes some hundred bytes per character of a text: a line of 50 MB would need more than a machine has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import Kind, Record
from rlhf.data.limits import Limits, cut, cut_list
from rlhf.data.messages import Message
from rlhf.errors import DataError

HUGE = 1_000_000  # characters of a row from which on it is looked at before it is tokenised
_WHITE = re.compile(r"\s+")


def too_long(record: Record, kind: Kind, limits: Limits, tokenizer: PreTrainedTokenizerBase) -> str:
    """Why a huge row is dropped, empty for one that is to be tokenised.

    A text has at least as many tokens as its characters, white space left out, make of the vocabulary's longest token.
    A row that is too long even so is dropped where `on_long` drops, and refused where it would have to be cut.
    """
    prompt, sides = _characters(record.prompt), [_characters(side) for side in _sides(record, kind)]
    if sum(sides, prompt) < HUGE:
        return ""
    longest = max(map(len, tokenizer.get_vocab()))
    least = [_dense(side) // longest for side in _sides(record, kind)]
    what = (cut_list if kind == "lists" else cut)(
        _dense(record.prompt) // longest, least, replace(limits, on_long="drop")
    )
    if not what.reason and not what.without:
        return ""
    if limits.on_long == "drop" and what.reason:
        return what.reason
    raise DataError(
        f"expected at most {limits.total:,} tokens, found {sum(sides, prompt):,} characters, which are not cut to that",
        where=record.where,
        fix="Split or remove the row, or leave rows that are too long out: data.on_long: drop.",
    )


def _sides(record: Record, kind: Kind) -> Sequence[list[Message]]:
    """What follows the prompt, for this kind of example."""
    if kind == "prompts":
        return []
    if record.kind == "text":
        return [[{"role": "text", "content": record.text}]]
    if record.kind == "list":
        return record.answers
    if record.kind == "pair":
        return [record.chosen] if kind == "tokens" else [record.chosen, record.rejected]
    return [record.answer]


def _characters(messages: Sequence[Message]) -> int:
    return sum(len(m["content"]) for m in messages)


def _dense(messages: Sequence[Message]) -> int:
    """Characters that are no white space; piece by piece, for the sake of memory."""
    texts = [m["content"] for m in messages]
    pieces = (text[at : at + HUGE] for text in texts for at in range(0, len(text), HUGE))
    return sum(len(_WHITE.sub("", piece)) for piece in pieces)
