"""Records -> token rows before any limit, and the same rows cut to fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rlhf.data.chat import ChatTemplate
from rlhf.data.encode import Conversation, Ids, Mask
from rlhf.data.formats import BAD_LABEL, EQUAL, NO_ANSWER, Kind, Record
from rlhf.data.limits import ANSWER_CUT, ANSWERS_OUT, PROMPT_CUT, Cut, Limits, cut, cut_list
from rlhf.data.messages import Message
from rlhf.errors import DataError

EMPTY = "empty answer"
EMPTY_PROMPT = "empty prompt"
ALL_EQUAL = "all answers are equal"
UNTRAINED = "nothing to train on"
REWRITTEN = "an earlier answer that the template rewrites is context only"
OTHER_START = "the template shows the prompt otherwise in one of the answers"


@dataclass(frozen=True)
class Draft:
    """One row as tokens: the prompt, and what may follow it.

    That is nothing (prompts), one answer (tokens, answers), two (pairs: chosen, rejected) or more (lists).
    """

    where: str
    kind: Kind
    prompt: Ids
    sides: tuple[tuple[Ids, Mask], ...]
    changes: tuple[str, ...] = ()
    problem: str = ""
    scores: tuple[float, ...] = ()  # lists: of every answer

    def cut(self, limits: Limits) -> Cut:
        """What the limits do to this row."""
        if self.problem:
            return Cut(self.problem)
        rule = cut_list if self.kind == "lists" else cut
        return rule(len(self.prompt), [len(ids) for ids, _ in self.sides], limits)

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
        sides = [side for i, side in enumerate(self.sides) if i not in what.without]
        kept = replace(
            self,
            prompt=self.prompt[self.kept_prompt(what.prompt, limits)],
            sides=tuple((ids[: what.answer], mask[: what.answer]) for ids, mask in sides),
            scores=tuple(score for i, score in enumerate(self.scores) if i not in what.without),
            changes=self._changes(what, max((len(ids) for ids, _ in sides), default=0)),
        )
        if any(not mask.any() for _, mask in kept.sides):
            return kept, UNTRAINED
        if len(kept.sides) > 1 and all(np.array_equal(kept.sides[0][0], ids) for ids, _ in kept.sides[1:]):
            return kept, EQUAL if self.kind == "pairs" else ALL_EQUAL
        return kept, ""

    def kept_prompt(self, taken: int, limits: Limits) -> Mask:
        """Which of the prompt's tokens stay when `taken` are taken off: the last ones, and the begin token."""
        kept = np.arange(len(self.prompt)) >= taken
        if 0 < taken < len(self.prompt) and self.prompt[0] == limits.begin:
            kept[0], kept[taken] = True, False
        return kept

    def _changes(self, what: Cut, longest: int) -> tuple[str, ...]:
        is_cut = what.answer is not None and longest > what.answer
        cuts = (*[PROMPT_CUT] * bool(what.prompt), *[ANSWER_CUT] * is_cut, *[ANSWERS_OUT] * bool(what.without))
        return (*self.changes, *cuts)


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
    elif record.kind == "list":
        answers = [(f"answers[{i}]", answer[-1]["content"]) for i, answer in enumerate(record.answers)]
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
            yield Draft(record.where, kind, rows[0][0], ())
        elif kind == "tokens":
            yield _split(record, rows[0], _changes(record, row[0], train_on))
        else:
            yield _answered(record, kind, rows)


def _conversations(
    record: Record, chat: ChatTemplate, kind: Kind, train_on: Literal["all_answers", "last_answer"]
) -> list[Conversation]:
    """What is tokenised for a record: its prompt, its one row, or its prompt and the prompt with each answer."""
    if kind == "prompts":
        return [chat.prompt(record.prompt, record.where)]
    if kind != "tokens":
        first = len(record.prompt)  # answers in the prompt are the same on all sides
        sides = [[*record.prompt, *side] for side in _sides(record)]
        rows = [chat.conversation(s, len(s) - 1 if train_on == "last_answer" else first, record.where) for s in sides]
        return [chat.prompt(record.prompt, record.where), *rows]
    if record.kind == "text":
        return [chat.text(record.text, record.where)]
    messages = [*record.prompt, *(record.answer or record.chosen)]
    return [chat.conversation(messages, len(messages) - 1 if train_on == "last_answer" else 0, record.where)]


def _sides(record: Record) -> Sequence[list[Message]]:
    """What may follow the prompt."""
    if record.kind == "pair":
        return record.chosen, record.rejected
    return record.answers if record.kind == "list" else [record.answer]


def _changes(record: Record, row: Conversation, train_on: str) -> tuple[str, ...]:
    if train_on == "last_answer" or record.kind == "text":
        return ()
    answers = sum(m["role"] == "assistant" for m in (*record.prompt, *record.answer, *record.chosen))
    return (REWRITTEN,) if sum(region.trained for region in row.regions) < answers else ()


def _split(record: Record, row: tuple[Ids, Mask], changes: tuple[str, ...]) -> Draft:
    """A row whose prompt is what comes before the first trained token."""
    ids, mask = row
    start = int(mask.argmax()) if mask.any() else len(ids)
    return Draft(record.where, "tokens", ids[:start], ((ids[start:], mask[start:]),), changes)


def _answered(record: Record, kind: Kind, rows: list[tuple[Ids, Mask]]) -> Draft:
    """A prompt and its answers, each tokenised with the prompt in front."""
    (prompt, _), *sides = rows
    size = len(prompt)
    same = all(np.array_equal(ids[:size], prompt) for ids, _ in sides)
    return Draft(
        record.where,
        kind,
        prompt,
        tuple((ids[size:], mask[size:]) for ids, mask in sides),
        problem="" if same else OTHER_START,
        scores=record.scores if kind == "lists" else (),
    )
