"""Records of one shape as records of another: labelled answers as pairs, pairs as single answers or as lists of two."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

from rlhf.data.formats import EQUAL, NO_ANSWER, NO_PARTNER, Record


def pair_up(records: Iterable[Record], unpaired: Counter[str]) -> Iterator[Record]:
    """Labelled answers as pairs: each label-true answer with one label-false answer to the same prompt, in file order.

    Every answer is used once at most; what finds no partner is added to `unpaired`.
    """
    waiting: dict[tuple[str, ...], tuple[deque[Record], deque[Record]]] = defaultdict(lambda: (deque(), deque()))
    for record in records:
        assert record.label is not None
        if record.kind != "completion":
            unpaired[NO_ANSWER] += 1
            continue
        prompt = tuple(part for m in record.prompt for part in (m["role"], m["content"]))
        good, bad = waiting[prompt]
        (good if record.label else bad).append(record)
        if good and bad:
            better, worse = good.popleft(), bad.popleft()
            yield replace(better, kind="pair", answer=[], chosen=better.answer, rejected=worse.answer, label=None)
    left = sum(len(queue) for queues in waiting.values() for queue in queues)
    if left:
        unpaired[NO_PARTNER] += left


def as_answers(records: Iterable[Record]) -> Iterator[Record]:
    """Single answers, each good or bad and with a reward.

    A label is worth +1 or -1; a score makes an answer good if it is above 0. A pair is its chosen answer, which is
    good, and its rejected one, which is bad, worth their own scores where the pair has some.
    """
    for record in records:
        if record.kind == "pair":
            problem = _pair_problem(record)
            rewards = record.scores or (1.0, -1.0)
            for answer, is_good, reward in zip((record.chosen, record.rejected), (True, False), rewards, strict=True):
                yield Record(
                    "completion",
                    record.where,
                    record.fields,
                    prompt=record.prompt,
                    answer=answer,
                    label=is_good,
                    reward=reward,
                    problem=problem,
                )
        elif record.label is None:
            assert record.reward is not None
            yield replace(record, label=record.reward > 0)
        else:
            yield replace(record, reward=1.0 if record.label else -1.0)


def as_lists(records: Iterable[Record]) -> Iterator[Record]:
    """Lists of scored answers; a pair is a list of two with its own scores, or 1 and 0."""
    for record in records:
        if record.kind != "pair":
            yield record
            continue
        yield Record(
            "list",
            record.where,
            record.fields,
            prompt=record.prompt,
            answers=[record.chosen, record.rejected],
            scores=record.scores or (1.0, 0.0),
            problem=_pair_problem(record),
        )


def _pair_problem(record: Record) -> str:
    """Pairs are left out for the same reasons as where they stay pairs."""
    return record.problem or (EQUAL if record.chosen == record.rejected else "")
