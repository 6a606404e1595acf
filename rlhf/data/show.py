"""What a stage sees of its data: the tokens of the first rows, by what happens to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.rule import Rule
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rlhf.data.chat import ChatTemplate
from rlhf.data.drafts import Draft, draft, unusable
from rlhf.data.encode import Ids, Mask
from rlhf.data.formats import Kind, Record
from rlhf.data.huge import too_long
from rlhf.data.limits import Limits, limits_of
from rlhf.data.records import read_records
from rlhf.data.report import SourceReport
from rlhf.data.sources import named_sources
from rlhf.recipe.schema import DataBlock

# State -> (style, opening and closing bracket where there are no colours).
_TRAINED, _CONTEXT, _DROPPED = ("bold green", "[", "]"), ("dim", "", ""), ("red strike", "{", "}")


def show(
    data: DataBlock, tokenizer: PreTrainedTokenizerBase, kind: Kind, count: int, max_new_tokens: int = 0
) -> Iterator[Shown | Legend]:
    """The first `count` rows of every source as rich renderables, a legend first. Rows are shown, not refused."""
    limits = limits_of(data, kind, max_new_tokens, tokenizer.bos_token_id)
    if limits.on_long == "error":
        limits = replace(limits, on_long="drop")
    chat = ChatTemplate(tokenizer)
    yield Legend()
    for key, source in named_sources(data):
        report = SourceReport(key, str(source.path), "", "")
        for record in itertools.islice(read_records(source, key, kind, report), count):
            yield _shown(record, report.format, chat, kind, data, limits)


def _shown(record: Record, found: str, chat: ChatTemplate, kind: Kind, data: DataBlock, limits: Limits) -> Shown:
    problem = unusable(record, kind, "drop") or too_long(record, kind, limits, chat.tokenizer)
    if problem:
        return Shown(f"{record.where}  {found}  dropped: {problem}", ())
    (one,) = draft([record], chat, kind, data.train_on)
    fitted, problem = one.fit(limits)
    kept = sum(len(part) for part in (fitted.prompt, *(ids for ids, _ in fitted.sides))) if not problem else 0
    notes = [f"dropped: {problem}"] if problem else list(fitted.changes)
    title = "  ".join([record.where, found, f"{kept} tokens kept", *notes])
    sides = one.sides or ((np.zeros(0, np.int32), np.zeros(0, np.bool_)),)
    left_out = range(len(sides)) if problem else one.cut(limits).without
    lines = [
        _line(name, one, side, chat.tokenizer, limits, i in left_out)
        for i, (name, side) in enumerate(zip(_names(record, kind), sides, strict=True))
    ]
    return Shown(title, tuple(lines))


def _names(record: Record, kind: Kind) -> list[str]:
    """What each sequence of a row is called."""
    if kind == "lists":
        return [f"answer {i}, score {score:g}" for i, score in enumerate(record.scores, start=1)]
    if kind == "answers":
        return [f"{'good' if record.label else 'bad'} answer, reward {record.reward:g}"]
    return {"prompts": ["prompt"], "tokens": ["row"], "pairs": ["chosen", "rejected"]}[kind]


def _line(
    name: str, one: Draft, side: tuple[Ids, Mask], tokenizer: PreTrainedTokenizerBase, limits: Limits, is_dropped: bool
) -> Side:
    """One sequence with the state of each of its tokens."""
    ids, mask = side
    what = one.cut(limits)
    prompt_kept = one.kept_prompt(what.prompt, limits)
    answer_kept = np.arange(len(ids)) < (len(ids) if what.answer is None else what.answer)
    kept = np.concatenate([prompt_kept, answer_kept]) & (not is_dropped)
    trained = np.concatenate([np.zeros(len(one.prompt), np.bool_), mask]) & kept
    states = np.where(kept, np.where(trained, "trained", "context"), "dropped").tolist()
    return Side(name, tuple(token_texts(tokenizer, np.concatenate([one.prompt, ids]).tolist())), tuple(states))


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Each token's own text. Tokens that are part of a character show as the vocabulary writes them."""
    words = []
    for index, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        text = str(tokenizer.decode([index], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if token[:1] == "▁" and not text.startswith(" "):  # decoding strips the space of a first token
            text = " " + text
        words.append(str(token) if "\ufffd" in text else text)
    return words


@dataclass(frozen=True)
class Legend:
    """What the colours, or the brackets without colours, mean."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = Text()
        for word, (style, opening, closing) in (
            ("trained", _TRAINED),
            ("context", _CONTEXT),
            ("dropped", _DROPPED),
        ):
            plain = f"{opening}{word}{closing}"
            text.append(word if console.color_system else plain, style).append("  ")
        yield text


@dataclass(frozen=True)
class Side:
    """One token sequence: texts of the tokens, and for each whether it is trained, context or dropped."""

    name: str
    words: tuple[str, ...]
    states: tuple[str, ...]

    def text(self, coloured: bool) -> Text:
        """The sequence with its counts; without colours, trained tokens stand in [ ] and dropped ones in { }."""
        counts = {state: self.states.count(state) for state in ("trained", "context", "dropped")}
        summary = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        text = Text(f"{self.name} ({summary}): ")
        styles = {"trained": _TRAINED, "context": _CONTEXT, "dropped": _DROPPED}
        for state, group in itertools.groupby(zip(self.words, self.states, strict=True), key=lambda pair: pair[1]):
            style, opening, closing = styles[state]
            words = [word for word, _ in group]
            if not coloured:
                text.append(opening + "".join(words) + closing)
                continue
            for place, word in enumerate(words):  # every other token underlined, to tell tokens apart
                text.append(word, f"{style} underline" if place % 2 else style)
        return text


@dataclass(frozen=True)
class Shown:
    """One row: its place, format and fate, and its sequences."""

    title: str
    sides: tuple[Side, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Rule(Text(self.title), align="left")
        for side in self.sides:
            yield side.text(console.color_system is not None)
