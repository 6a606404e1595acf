"""Row formats: what the columns say a row is, and the one canonical record that every format becomes."""

from __future__ import annotations

import difflib
import itertools
import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf.data.mapping import NAMES, did_you_mean
from rlhf.data.messages import (
    Message,
    as_text,
    check_text,
    common_prefix,
    is_dialogue,
    message,
    parse_dialogue,
    parse_messages,
)
from rlhf.data.numbers import both_sides, density, list_scores, number, win_rates
from rlhf.data.readers import describe, name_list
from rlhf.errors import DataError, RecipeError
from rlhf.recipe.schema import SourceBlock

Kind = Literal["tokens", "pairs", "prompts", "answers", "lists"]  # what a stage makes of records

# Reasons for which a row is dropped and counted.
NO_ANSWER = "no answer at the end"
OTHER_PROMPT = "chosen and rejected answer different prompts"
OTHER_PROMPTS = "answers to different prompts"
EQUAL = "chosen equals rejected"
BAD_LABEL = "label is false"
NO_PARTNER = "no answer with the other label to the same prompt"

# Which columns a format needs; of several that fit, the one with the most mapped columns wins, then the first.
_SHAPES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("sharegpt_pairs", ("conversations", "chosen", "rejected")),
    ("pairs", ("prompt", "chosen", "rejected")),
    ("dialogue_pairs", ("chosen", "rejected")),
    ("pairs", ("chosen", "rejected")),
    ("lists", ("prompt", "answers", "scores")),
    ("lists", ("prompt", "answers", "ranks")),
    ("labelled", ("prompt", "completion", "label")),
    ("labelled", ("messages", "label")),
    ("labelled", ("conversations", "label")),
    ("labelled", ("text", "label")),
    ("scored", ("prompt", "completion", "score")),
    ("scored", ("messages", "score")),
    ("scored", ("conversations", "score")),
    ("prompt_completion", ("prompt", "completion")),
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("text", ("text",)),
    ("prompts", ("prompt",)),
)
_PAIRS = {"pairs", "dialogue_pairs", "sharegpt_pairs"}
# Columns that became messages; the others stay in `Record.fields` for rewards.
_CONSUMED = {"messages", "conversations", "chosen", "rejected"}
_SINGLE_LOSSES = "losses of single answers (kto, bco, ...)"
_PAIR_FIXES = {
    "labelled": f"Set pair_labels: true to pair answers by label, or choose one of the {_SINGLE_LOSSES}.",
    "scored": f"Choose one of the {_SINGLE_LOSSES}.",
    "lists": "Choose a loss of lists, or make rows of the two answers to compare: chosen, rejected.",
}
_WHICH_SCORE = "Say which column holds the label or the score: columns: {score: ...}."
_TRUTH = {"1": True, "true": True, "0": False, "false": False}


@dataclass(frozen=True, slots=True)
class Record:
    """One row, whatever its format was."""

    kind: Literal["completion", "text", "pair", "prompt", "list"]
    where: str  # file:line
    fields: dict[str, Any] = field(default_factory=dict)  # the row's other columns
    prompt: list[Message] = field(default_factory=list)
    answer: list[Message] = field(default_factory=list)  # completion: begins and ends with an assistant message
    chosen: list[Message] = field(default_factory=list)  # pair: what follows the prompt
    rejected: list[Message] = field(default_factory=list)
    answers: list[list[Message]] = field(default_factory=list)  # list: two or more
    text: str = ""
    label: bool | None = None
    reward: float | None = None  # completion: its score
    density: float = 0.5  # completion: the share of good answers to such a prompt
    margin: float = 0.0
    scores: tuple[float, ...] = ()  # list: of every answer; pair: of chosen and rejected, or none
    win_rates: tuple[float, ...] = ()  # pair: of chosen and rejected, or none
    problem: str = ""  # a reason to drop the row, empty for a good one


# --- detection -----------------------------------------------------------------------------------------------------


def detect(row: dict[str, Any], where: str, source: SourceBlock, key: str) -> str:
    """The format of a source, from its mapped first row; the recipe's `format` is checked instead where it is given.

    key: the source's place in the recipe, e.g. data.sources[1].
    """
    fitting = [(name, needs) for name, needs in _SHAPES if _fits(name, needs, row, source)]
    if source.format != "auto":
        fitting = [(name, needs) for name, needs in fitting if name == source.format]
    if not fitting:
        raise _unknown(row, where, source)
    mapped = {*source.columns, *source.templates}
    found, needs = max(fitting, key=lambda shape: len(mapped.intersection(shape[1])))
    if source.prompt_words and "text" not in needs:
        raise RecipeError(f"expected rows with a text, found the format {found}", where=f"{key}.prompt_words")
    if source.system and found == "text" and not source.prompt_words:
        raise RecipeError("expected conversations, found plain texts, which have no turns", where=f"{key}.system")
    return found


def _fits(name: str, needs: tuple[str, ...], row: dict[str, Any], source: SourceBlock) -> bool:
    if not all(column in row for column in needs):
        return False
    if name == "dialogue_pairs" and source.format == "auto":
        return is_dialogue(row["chosen"]) and is_dialogue(row["rejected"])
    if needs == ("chosen", "rejected") and name == "pairs":
        return not isinstance(row["chosen"], str)
    if needs == ("text", "label"):  # a text with a label is a plain text unless labels are asked for
        return source.pair_labels or source.format == "labelled"
    return name == "labelled" or not source.pair_labels


def _unknown(row: dict[str, Any], where: str, source: SourceBlock) -> DataError:
    if source.format != "auto":
        shapes = [needs for name, needs in _SHAPES if name == source.format]
    else:
        shapes = [needs for name, needs in _SHAPES if name == "labelled" or not source.pair_labels]
    wanted = dict.fromkeys(" + ".join(needs) for needs in shapes)
    return DataError(
        f"columns: expected {', or '.join(wanted)}, found {name_list(row)}",
        where=where,
        fix=f"Say which column is which in the recipe's `columns`, e.g. columns: {_nearest(row, shapes)}.",
    )


def _nearest(row: dict[str, Any], shapes: list[tuple[str, ...]]) -> str:
    """The likeliest misnamed column as an entry of `columns`."""
    pairs = [
        (difflib.SequenceMatcher(None, need, column).ratio(), need, column)
        for need in dict.fromkeys(need for needs in shapes for need in needs if need not in row)
        for column in itertools.islice(row, 100)
        if column not in NAMES and column.isprintable() and len(column) < 60
    ]
    likeness, need, column = max(pairs, default=(0.0, "", ""))
    return f"{{{need}: {column}}}" if likeness > 0.6 else "{prompt: question}"


def require(found: str, kind: Kind, where: str, source: SourceBlock) -> None:
    """Refuse a format that a stage cannot learn from."""
    is_paired = found in _PAIRS or (found == "labelled" and source.pair_labels)
    if kind == "pairs" and not is_paired:
        need, fix = "a better and a worse answer (chosen, rejected)", _PAIR_FIXES[found] if found in _PAIR_FIXES else ""
    elif kind == "answers" and found not in {"labelled", "scored", *_PAIRS}:
        need = "single answers with a label or a score (prompt, completion, label or score), or pairs"
        fix = "Make every answer a row of its own: prompt, completion, score." if found == "lists" else _WHICH_SCORE
    elif kind == "lists" and found not in {"lists", *_PAIRS}:
        need, fix = "several scored answers to a prompt (prompt, answers, scores or ranks), or pairs", ""
    elif kind == "tokens" and found == "lists":
        need, fix = "one answer to learn from (prompt, completion)", "Keep the answer to imitate as the completion."
    elif kind == "tokens" and found == "prompts":
        need, fix = "answers to learn from", "Say which column holds them: columns: {completion: ...}."
    elif kind == "prompts" and found == "text" and not source.prompt_words:
        need, fix = "prompts", "Set prompt_words: N to make the first N words of a text its prompt."
    else:
        return
    raise DataError(f"expected {need}, found rows of the format {found}", where=where, fix=fix or None)


# --- conversion ----------------------------------------------------------------------------------------------------


def convert(row: dict[str, Any], where: str, found: str, source: SourceBlock) -> Record:
    """One mapped row as a record. A row that breaks its format raises; one that only cannot be used says why."""
    consumed = {*_CONSUMED, "answers"} if found == "lists" else _CONSUMED
    fields = {name: value for name, value in row.items() if name not in consumed}
    if found in _PAIRS:
        record = _pair(row, where, found)
    elif found == "lists":
        record = _list(row, where, source)
    elif found == "text" and not source.prompt_words:
        return Record("text", where, fields, text=check_text(_need(row, "text", where), where, "text"))
    else:
        record = _single(row, where, found, source)
        if found == "labelled":
            record = replace(record, label=_label(_need(row, "label", where), where))
        elif found == "scored":
            record = replace(record, reward=number(_need(row, "score", where), where, "score"))
        if found in ("labelled", "scored"):
            record = replace(record, density=density(row.get("density"), where))
    return _with_system(replace(record, fields=fields), row, source)


def _need(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(
            f"{name}: expected this column, found {name_list(row)}",
            where=where,
            fix=did_you_mean(name, row) or None,
        )
    return row[name]


def _single(row: dict[str, Any], where: str, found: str, source: SourceBlock) -> Record:
    """Formats with one answer, or none."""
    if found in ("labelled", "scored"):
        found = "messages" if "messages" in row else "sharegpt" if "conversations" in row else "prompt_completion"
        if "text" in row and found == "prompt_completion" and "completion" not in row:
            found = "text"
    if found in ("messages", "sharegpt"):
        column = "messages" if found == "messages" else "conversations"
        return _conversation(parse_messages(_need(row, column, where), where, column), where)
    if found == "text":
        return _cut_text(check_text(_need(row, "text", where), where, "text"), source.prompt_words or 0, where)
    if found == "alpaca":
        return _alpaca(row, where)
    prompt = _messages(_need(row, "prompt", where), "user", where, "prompt")
    if found == "prompts":
        return Record("prompt", where, prompt=prompt)
    answer = _messages(_need(row, "completion", where), "assistant", where, "completion")
    return _conversation([*prompt, *answer], where)


def _messages(value: Any, role: str, where: str, column: str) -> list[Message]:
    """A column that holds the text of one message, or messages."""
    if isinstance(value, (list, tuple, dict)):
        return parse_messages(value, where, column)
    return [message(role, check_text(value, where, column))]


def _conversation(messages: list[Message], where: str) -> Record:
    if messages[-1]["role"] != "assistant":
        return Record("prompt", where, prompt=messages)
    return Record("completion", where, prompt=messages[:-1], answer=messages[-1:])


def _cut_text(text: str, words: int, where: str) -> Record:
    """The first `words` words as the prompt, white space left where it is."""
    head = re.match(rf"(?:\s*\S+){{0,{words}}}", text).group()  # type: ignore[union-attr]
    prompt = [message("user", head)] if head else []
    return Record("completion", where, prompt=prompt, answer=[message("assistant", text[len(head) :])])


def _alpaca(row: dict[str, Any], where: str) -> Record:
    """instruction and input, a blank line between them, are the prompt; `history` holds earlier turns as pairs."""
    parts = [check_text(_need(row, "instruction", where), where, "instruction")]
    if row.get("input"):
        parts.append(check_text(row["input"], where, "input"))
    history = row.get("history") or []
    if not isinstance(history, (list, tuple)):
        raise DataError(f"history: expected a list of [question, answer], found {describe(history)}", where=where)
    prompt = []
    for i, turn in enumerate(history):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise DataError(f"history[{i}]: expected [question, answer], found {describe(turn)}", where=where)
        roles = zip(("user", "assistant"), turn, strict=True)
        prompt += [message(role, check_text(said, where, f"history[{i}]")) for role, said in roles]
    prompt.append(message("user", "\n\n".join(part for part in parts if part)))
    answer = check_text(_need(row, "output", where), where, "output")
    return Record("completion", where, prompt=prompt, answer=[message("assistant", answer)])


def _pair(row: dict[str, Any], where: str, found: str) -> Record:
    margin = 0.0 if row.get("margin") is None else number(row["margin"], where, "margin")
    sides: list[list[Message]] = []
    for column in ("chosen", "rejected"):
        value = _need(row, column, where)
        dialogue = found == "dialogue_pairs"
        sides.append(parse_dialogue(value, where, column) if dialogue else _messages(value, "assistant", where, column))
    given: list[Message] = []
    if found == "sharegpt_pairs":
        given = parse_messages(_need(row, "conversations", where), where, "conversations")
    elif found == "pairs" and ("prompt" in row or isinstance(row["chosen"], str)):
        given = _messages(_need(row, "prompt", where), "user", where, "prompt")
    # An answer that is a whole conversation repeats the prompt, which is then found as the common prefix.
    whole = [*given, *sides[0]] if sides[0][0]["role"] == "assistant" else sides[0]
    other = [*given, *sides[1]] if sides[1][0]["role"] == "assistant" else sides[1]
    shared = common_prefix(whole, other)
    record = Record(
        "pair",
        where,
        prompt=whole[:shared],
        chosen=whole[shared:],
        rejected=other[shared:],
        margin=margin,
        scores=both_sides(row, "score", where),
        win_rates=win_rates(row, where),
    )
    if record.chosen[-1]["role"] != "assistant" or record.rejected[-1]["role"] != "assistant":
        return replace(record, problem=NO_ANSWER)
    if record.chosen[0]["role"] != "assistant" or record.rejected[0]["role"] != "assistant":
        return replace(record, problem=OTHER_PROMPT)
    return record


def _list(row: dict[str, Any], where: str, source: SourceBlock) -> Record:
    """Answers to one prompt; one that is a whole conversation repeats the prompt."""
    prompt = _messages(_need(row, "prompt", where), "user", where, "prompt")
    given = _need(row, "answers", where)
    if not isinstance(given, (list, tuple)):
        raise DataError(f"answers: expected a list of answers, found {describe(given)}", where=where)
    if len(given) < 2:
        raise DataError(
            f"answers: expected at least 2 answers to compare, found {len(given)}",
            where=where,
            fix="Give every row several answers to its prompt, or leave the row out.",
        )
    is_ranked = "ranks" in {*source.columns, *source.templates} or ("ranks" in row and "scores" not in row)
    column = "ranks" if is_ranked else "scores"
    scores = list_scores(_need(row, column, where), where, column, len(given))
    answers = [_messages(value, "assistant", where, f"answers[{i}]") for i, value in enumerate(given)]
    answers = [answer[len(prompt) :] if answer[: len(prompt)] == prompt else answer for answer in answers]
    problem = ""
    if any(not answer or answer[-1]["role"] != "assistant" for answer in answers):
        problem = NO_ANSWER
    elif any(answer[0]["role"] != "assistant" for answer in answers):
        problem = OTHER_PROMPTS
    return Record("list", where, prompt=prompt, answers=answers, scores=scores, problem=problem)


def _label(value: Any, where: str) -> bool:
    text = str(int(value)) if isinstance(value, (bool, float)) and value in (0, 1) else str(value).strip().lower()
    if text not in _TRUTH:
        raise DataError(f"label: expected true, false, 1 or 0, found {describe(value)}", where=where)
    return _TRUTH[text]


def _with_system(record: Record, row: dict[str, Any], source: SourceBlock) -> Record:
    """The row's own system message, else its `system` column, else the recipe's."""
    everything = [*record.prompt, *record.answer, *record.chosen, *itertools.chain(*record.answers)]
    own = row.get("system")
    system = check_text(own, record.where, "system") if own else source.system
    if not system or any(m["role"] == "system" for m in everything):
        return record
    return replace(record, prompt=[message("system", system), *record.prompt])


def reward_fields(record: Record) -> dict[str, Any]:
    """What rules and function rewards see of a row: its columns, the prompt as text and as messages, the completion."""
    known = {"prompt": as_text(record.prompt), "messages": record.prompt}
    if record.answer:
        known["completion"] = record.answer[-1]["content"]
    return {**record.fields, **known}
