"""Records -> token rows that fit, with every dropped or changed row counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import ChatTemplate
from rlhf.data.drafts import Draft, draft, unusable
from rlhf.data.encode import Ids, Mask
from rlhf.data.filters import RowFilter
from rlhf.data.formats import Kind, Record, reward_fields
from rlhf.data.huge import too_long
from rlhf.data.limits import Limits, limits_of
from rlhf.data.order import generator
from rlhf.data.records import read_records
from rlhf.data.report import DataReport, SourceReport, TokenCounts
from rlhf.data.sources import fingerprint, locate, named_sources
from rlhf.errors import DataError
from rlhf.recipe.schema import DataBlock, SourceBlock

_CHUNK = 1000  # records that are tokenised together
LEFT_OUT = "left out by the source's weight"
Fate = tuple[str, tuple[str, ...]]  # why a record was dropped, empty where it was not; what was changed
See = Callable[[Record, int, Fate], None]  # is told of every record, its number and its fate


@dataclass(frozen=True, slots=True)
class TokenExample:
    """One row for SFT."""

    ids: Ids
    mask: Mask
    row: int  # the record's number over all sources, before any was dropped

    def lengths(self) -> tuple[int, int]:
        """Tokens, and trained tokens."""
        return len(self.ids), int(self.mask.sum())

    def cost(self) -> int:
        """Tokens that a model computes."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class PairExample:
    """A prompt with a better and a worse answer."""

    prompt_ids: Ids
    chosen_ids: Ids
    chosen_mask: Mask
    rejected_ids: Ids
    rejected_mask: Mask
    margin: float
    row: int
    scores: tuple[float, float] | None = None  # of chosen and rejected
    win_rates: tuple[float, float] | None = None  # how often each wins against other answers, in [0, 1]
    weight: float = 1.0  # in the loss

    def lengths(self) -> tuple[int, int]:
        """Tokens of both sides, and trained tokens."""
        answers = len(self.chosen_ids) + len(self.rejected_ids)
        return 2 * len(self.prompt_ids) + answers, int(self.chosen_mask.sum() + self.rejected_mask.sum())

    def cost(self) -> int:
        """Tokens that a model computes: the prompt once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True, slots=True)
class PromptExample:
    """A prompt to sample answers to."""

    ids: Ids
    row: int
    fields: dict[str, Any]  # the row's columns for rewards, and prompt, messages, completion
    where: str = ""  # file:line, for messages

    def lengths(self) -> tuple[int, int]:
        """Tokens; none is trained."""
        return len(self.ids), 0


@dataclass(frozen=True, slots=True)
class AnswerExample:
    """A prompt with one answer that is good or bad."""

    prompt_ids: Ids
    answer_ids: Ids
    answer_mask: Mask
    is_good: bool
    reward: float  # its score, or +1 and -1 by label
    density: float  # the share of good answers among the answers to such a prompt
    row: int

    def lengths(self) -> tuple[int, int]:
        """Tokens, and trained tokens."""
        return self.cost(), int(self.answer_mask.sum())

    def cost(self) -> int:
        """Tokens that a model computes."""
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class ListExample:
    """A prompt with two or more scored answers."""

    prompt_ids: Ids
    answers: tuple[tuple[Ids, Mask], ...]
    scores: tuple[float, ...]  # of every answer, higher is better
    row: int

    def lengths(self) -> tuple[int, int]:
        """Tokens of all answers, each with the prompt in front, and trained tokens."""
        tokens = sum(len(self.prompt_ids) + len(ids) for ids, _ in self.answers)
        return tokens, sum(int(mask.sum()) for _, mask in self.answers)

    def cost(self) -> int:
        """Tokens that a model computes: the prompt once."""
        return len(self.prompt_ids) + sum(len(ids) for ids, _ in self.answers)


Example = TokenExample | PairExample | PromptExample | AnswerExample | ListExample


@dataclass(frozen=True)
class Loaded:
    """A stage's data."""

    train: Sequence[Any]  # of one kind of example
    eval: Sequence[Any]
    report: DataReport
    pretraining: Loaded | None = None  # supervised rows beside the prompts


def load_examples(
    data: DataBlock,
    tokenizer: PreTrainedTokenizerBase,
    kind: Kind,
    seed: int,
    max_new_tokens: int = 0,
    see: Sequence[See] = (),
) -> Loaded:
    """Read, convert, tokenise, fit and filter all rows of a stage.

    The mix of several sources: from a source of weight w the share w / (largest weight) of its rows is taken, chosen by
    seed, none twice. Equal weights take everything. `eval_rows` are chosen by seed from all sources before that, and
    before rows are filtered, so that they are the same rows whatever the filter.
    max_new_tokens: for prompts, what the answer still needs of max_length.
    """
    limits = limits_of(data, kind, max_new_tokens, tokenizer.bos_token_id)
    filtered = RowFilter(data, kind)
    loader = _Loader(ChatTemplate(tokenizer), kind, data, limits, (filtered.see, *see))
    parts = [loader.load(source, key) for key, source in named_sources(data)]
    held_out: list[Example] = []
    if data.eval is not None:
        held_out = loader.load(data.eval, f"{data.key}.eval")
    elif data.eval_rows:
        parts, held_out = _hold_out(parts, data.eval_rows, seed, data.key)
    parts = filtered.keep(parts, held_out, loader.reports)
    train = filtered.weigh(_mix(parts, named_sources(data), loader.reports, seed))
    counts = [TokenCounts.of(example.lengths() for example in examples) for examples in (train, held_out)]
    return Loaded(train, held_out, DataReport(loader.reports, counts[0], counts[1]))


def raw_texts(data: DataBlock, kind: Kind) -> Iterator[str]:
    """All text of the training sources, message by message: what a tokenizer is trained on."""
    for key, source in named_sources(data):
        report = SourceReport(key, str(source.path), "", "")
        for record in read_records(source, key, kind, report):
            if record.kind == "text":
                yield record.text
            answers = (record.answer, record.chosen, record.rejected, *record.answers)
            for message in itertools.chain(record.prompt, *answers):
                yield message["content"]


class _Loader:
    """Loads source after source, numbering the records through."""

    def __init__(self, chat: ChatTemplate, kind: Kind, data: DataBlock, limits: Limits, see: Sequence[See]) -> None:
        self._chat, self._kind, self._data, self._limits, self._see = chat, kind, data, limits, see
        self._row = itertools.count()
        self.reports: list[SourceReport] = []

    def load(self, source: SourceBlock, key: str) -> list[Example]:
        """The examples of one source, in file order."""
        report = SourceReport(key, str(source.path), "", fingerprint(source, locate(source, key)))
        self.reports.append(report)
        records = read_records(source, key, self._kind, report)
        examples: list[Example] = []
        while chunk := list(itertools.islice(records, _CHUNK)):
            examples += self._fit(chunk, report)
        report.kept = len(examples)
        if not examples:
            reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.most_common())
            raise DataError(
                f"expected rows to learn from, found none among {report.read}: {reasons}",
                where=report.path,
                fix="Look at them with `rlhf show RECIPE`; the limits are data.max_length and max_prompt_length.",
            )
        return examples

    def _fit(self, records: list[Record], report: SourceReport) -> Iterator[Example]:
        """Examples of the records that can be used and fit."""
        numbered = list(zip(records, self._row, strict=False))
        usable = []
        for record, row in numbered:
            problem = unusable(record, self._kind, self._data.on_empty)
            if problem := problem or too_long(record, self._kind, self._limits, self._chat.tokenizer):
                report.dropped[problem] += 1
                self._tell(record, row, (problem, ()))
            else:
                usable.append((record, row))
        drafts = draft([record for record, _ in usable], self._chat, self._kind, self._data.train_on)
        for one, (record, row) in zip(drafts, usable, strict=True):
            fitted, problem = one.fit(self._limits)
            report.changed.update(fitted.changes)
            self._tell(record, row, (problem, fitted.changes))
            if problem:
                report.dropped[problem] += 1
            else:
                yield to_example(fitted, record, row)

    def _tell(self, record: Record, row: int, fate: Fate) -> None:
        for see in self._see:
            see(record, row, fate)


def to_example(fitted: Draft, record: Record, row: int) -> Example:
    """The example of a draft that fits."""
    if fitted.kind == "prompts":
        return PromptExample(fitted.prompt, row, reward_fields(record), record.where)
    if fitted.kind == "lists":
        return ListExample(fitted.prompt, fitted.sides, fitted.scores, row)
    if fitted.kind == "pairs":
        (chosen, chosen_mask), (rejected, rejected_mask) = fitted.sides
        numbers = (_two(record.scores), _two(record.win_rates))
        return PairExample(fitted.prompt, chosen, chosen_mask, rejected, rejected_mask, record.margin, row, *numbers)
    ((ids, mask),) = fitted.sides
    if fitted.kind == "answers":
        assert record.label is not None and record.reward is not None
        return AnswerExample(fitted.prompt, ids, mask, record.label, record.reward, record.density, row)
    before = np.zeros(len(fitted.prompt), np.bool_)
    return TokenExample(np.concatenate([fitted.prompt, ids]), np.concatenate([before, mask]), row)


def _two(numbers: tuple[float, ...]) -> tuple[float, float] | None:
    return (numbers[0], numbers[1]) if numbers else None


def _hold_out(
    parts: Sequence[list[Example]], count: int, seed: int, key: str
) -> tuple[list[list[Example]], list[Example]]:
    """`count` examples of all sources, chosen by seed, and the rest of every source."""
    total = sum(map(len, parts))
    if count >= total:
        raise DataError(
            f"expected more rows than are held out, found {total}",
            where=f"{key}.eval_rows",
            fix=f"It is {count}: set it below {total}.",
        )
    chosen = set(generator(seed, "eval_rows").permutation(total)[:count].tolist())
    rest, held_out, at = [], [], 0
    for part in parts:
        rest.append([example for i, example in enumerate(part, start=at) if i not in chosen])
        held_out += [example for i, example in enumerate(part, start=at) if i in chosen]
        at += len(part)
    return rest, held_out


def _mix(
    parts: Sequence[list[Example]], sources: Sequence[tuple[str, SourceBlock]], reports: list[SourceReport], seed: int
) -> list[Example]:
    """Every source's share of its rows, in file order. See `load_examples`."""
    largest = max(source.weight for _, source in sources)
    mixed: list[Example] = []
    for number, (part, (_, source), report) in enumerate(zip(parts, sources, reports, strict=False)):
        taken = max(1, round(len(part) * source.weight / largest)) if part else 0
        if taken < len(part):
            report.dropped[LEFT_OUT] += len(part) - taken
            report.kept -= len(part) - taken
            chosen = sorted(generator(seed, "mix", number).permutation(len(part))[:taken].tolist())
            part = [part[i] for i in chosen]
        mixed += part
    return mixed
