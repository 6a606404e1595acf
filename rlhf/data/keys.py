"""When two rows count as the same: digests of prompts and answers, equal where texts are equal up to white space."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf.data.formats import Kind, Record
from rlhf.data.messages import Message


@dataclass(frozen=True, slots=True)
class RowKey:
    """A row by its content. `sides` are its answers in order: chosen and rejected, those of a list, one, or none."""

    prompt: bytes  # empty where a row has none: plain texts
    sides: tuple[bytes, ...]
    verdict: str = ""  # what single answers and lists are judged by; the order of a pair's sides says it

    @property
    def answers(self) -> tuple[bytes, tuple[bytes, ...]]:
        """The prompt and its answers, whatever their order."""
        return self.prompt, tuple(sorted(self.sides))


def row_key(record: Record, kind: Kind) -> RowKey:
    """The key of a record for a stage that makes examples of this kind of it; of prompts to answer, of these only."""
    prompt = _digest(record.prompt) if record.prompt else b""
    if kind == "prompts":
        return RowKey(prompt, ())
    verdict = repr((record.label, record.reward, record.scores)) if kind in ("answers", "lists") else ""
    return RowKey(prompt, tuple(map(_digest, sides(record))), verdict)


def sides(record: Record) -> list[list[Message]]:
    """The answers of a record; a plain text is one."""
    if record.kind == "pair":
        return [record.chosen, record.rejected]
    if record.kind == "text":
        return [[{"role": "text", "content": record.text}]]
    if record.kind == "list":
        return record.answers
    return [record.answer] if record.answer else []


def as_words(text: str) -> str:
    """A text with single spaces between its words."""
    return " ".join(text.split())


def _digest(messages: Sequence[Message]) -> bytes:
    said = [[m["role"], as_words(m["content"])] for m in messages]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).digest()
