"""Records -> token rows before any limit, and the same rows cut to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rlhf.data.chat import ChatTemplate
from rlhf.data.encode import Conversation, Ids, Mask
from rlhf.data.formats import BAD_LABEL, NO_ANSWER, Kind, Record
from rlhf.data.limits import ANSWER_CUT, PROMPT_CUT, Cut, Limits, cut
from rlhf.errors import DataError

EMPTY = "empty answer"
EMPTY_PROMPT = "empty prompt"
EQUAL = "chosen equals rejected"
UNTRAINED = "nothing to train on"
REWRITTEN = "an earlier answer that the template rewrites is context only"
OTHER_START = "the template shows the prompt otherwise in one of the answers"


@dataclass(frozen=True)
class Draft:
    """One row as tokens: the prompt, and after it no answer (prompts), one (tokens) or two (chosen, rejected)."""

    where: str
    prompt: Ids
    sides: tuple[tuple[Ids, Mask], ...]
    changes: tuple[str, ...] = ()
    problem: str = ""

    def cut(self, limits: Limits) -> Cut:
        """What the limits do to this row."""
        return Cut(self.problem) if self.problem else cut(len(self.prompt), [len(ids) for ids, _ in self.sides], limits)

    def fit(self, limits: Limits) -> tuple[Draft, str]:
        """The row within the limits, and why it is dropped if it is."""
        what = self.cut(limits)
        if what.reason:
            if limits.on_long == "error" and not self.problem:
                raise DataError(
                    f"expected at most {limits.total} tokens, found a row that is {what.reason}",
                    where=self.where,
                    fix="Raise data.max_length or choose another data.on_long.",
                )
            return self, what.reason
        kept = replace(
            self,
            prompt=self.prompt[self.kept_prompt(what.prompt, limits)],
            sides=tuple((ids[: what.answer], mask[: what.answer]) for ids, mask in self.sides),
            changes=self._changes(what),
        )
        if any(not mask.any() for _, mask in kept.sides):
            return kept, UNTRAINED
        if len(kept.sides) == 2 and np.array_equal(kept.sides[0][0], kept.sides[1][0]):
            return kept, EQUAL
        return kept, ""

    def kept_prompt(self, taken: int, limits: Limits) -> Mask:
        """Which of the prompt's tokens stay when `taken` are taken off: the last ones, and the begin token."""
        kept = np.arange(len(self.prompt)) >= taken
        if 0 < taken < len(self.prompt) and self.prompt[0] == limits.begin:
            kept[0], kept[taken] = True, False
        return kept

    def _changes(self, what: Cut) -> tuple[str, ...]:
        longest = max((len(ids) for ids, _ in self.sides), default=0)
        is_cut = what.answer is not None and longest > what.answer
        return (*self.changes, *[PROMPT_CUT] * bool(what.prompt), *[ANSWER_CUT] * is_cut)


def unusable(record: Record, kind: Kind, on_empty: Literal["drop", "error"]) -> str:
    """Why a record cannot be used for this kind of example, empty for one that can. Empty answers may raise instead."""
    if record.problem:
        return record.problem
    if kind == "prompts":
        has_words = any(m["content"].strip() for m in record.prompt if m["role"] != "system")
        return "" if has_words else _empty(record, on_empty, "prompt", EMPTY_PROMPT)
    if record.kind == "prompt":
        return NO_ANSWER
    if kind == "tokens" and record.label is False:
        return BAD_LABEL
    if record.kind == "text":
        answers = [("text", record.text)]
    elif record.kind == "completion":
        answers = [("completion", record.answer[-1]["content"])]
    else:
        answers = [("chosen", record.chosen[-1]["content"]), ("rejected", record.rejected[-1]["content"])]
    for column, words in answers[:1] if kind == "tokens" else answers:
        if not words.strip():
            return _empty(record, on_empty, column, EMPTY)
    return ""


def _empty(record: Record, on_empty: Literal["drop", "error"], column: str, reason: str) -> str:
    if on_empty == "error":
        raise DataError(
            f"{column}: expected words, found empty text",
            where=record.where,
            fix="data.on_empty: drop leaves such rows out.",
        )
    return reason


def draft(
    records: Sequence[Record], chat: ChatTemplate, kind: Kind, train_on: Literal["all_answers", "last_answer"]
) -> Iterator[Draft]:
    """Token rows of usable records; they are tokenised together, which is faster."""
    planned = [_conversations(record, chat, kind, train_on) for record in records]
    encoded = iter(chat.encode([conversation for row in planned for conversation in row]))
    for record, row in zip(records, planned, strict=True):
        rows = [next(encoded) for _ in row]
        if kind == "prompts":
            yield Draft(record.where, rows[0][0], ())
        elif kind == "tokens":
            yield _split(record, rows[0], _changes(record, row[0], train_on))
        else:
            yield _pair(record, rows)


def _conversations(
    record: Record, chat: ChatTemplate, kind: Kind, train_on: Literal["all_answers", "last_answer"]
) -> list[Conversation]:
    """What is tokenised for a record: its prompt, its one row, or its prompt and both sides."""
    if kind == "prompts":
        return [chat.prompt(record.prompt, record.where)]
    if kind == "pairs":
        first = len(record.prompt)  # answers in the prompt are the same on both sides
        sides = [[*record.prompt, *side] for side in (record.chosen, record.rejected)]
        rows = [chat.conversation(s, len(s) - 1 if train_on == "last_answer" else first, record.where) for s in sides]
        return [chat.prompt(record.prompt, record.where), *rows]
    if record.kind == "text":
        return [chat.text(record.text, record.where)]
    messages = [*record.prompt, *(record.answer or record.chosen)]
    return [chat.conversation(messages, len(messages) - 1 if train_on == "last_answer" else 0, record.where)]


def _changes(record: Record, row: Conversation, train_on: str) -> tuple[str, ...]:
    if train_on == "last_answer" or record.kind == "text":
        return ()
    answers = sum(m["role"] == "assistant" for m in (*record.prompt, *record.answer, *record.chosen))
    return (REWRITTEN,) if sum(region.trained for region in row.regions) < answers else ()


def _split(record: Record, row: tuple[Ids, Mask], changes: tuple[str, ...]) -> Draft:
    """A row whose prompt is what comes before the first trained token."""
    ids, mask = row
    start = int(mask.argmax()) if mask.any() else len(ids)
    return Draft(record.where, ids[:start], ((ids[start:], mask[start:]),), changes)


def _pair(record: Record, rows: list[tuple[Ids, Mask]]) -> Draft:
    (prompt, _), *sides = rows
    size = len(prompt)
    same = all(np.array_equal(ids[:size], prompt) for ids, _ in sides)
    return Draft(
        record.where,
        prompt,
        tuple((ids[size:], mask[size:]) for ids, mask in sides),
        problem="" if same else OTHER_START,
    )
