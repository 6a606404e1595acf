"""Rewards that need no model: comparisons with a reference answer, patterns, lengths, and a user's own function.

Answers come from a model and may be anything: megabytes of text, "10**10**10", digits of other scripts. Nothing here
evaluates them, and every pattern of ours is matched against a bounded piece of text at a bounded number of places.
"""

from __future__ import annotations

import hashlib
import math
import re
from functools import cache
from typing import Any

from rlhf.data.demo import gold_reward
from rlhf.errors import DataError, RecipeError
from rlhf.rewards.base import RULES, Column, Row
from rlhf.rewards.patterns import searching
from rlhf.rewards.user_code import call, checked_scores

# A number as people and models write it: -1,234.5, $18, 3/4, 0.5 %, 1e6, **72**, "18." at the end of a sentence. ASCII
# digits only. It ends at white space or at closing punctuation, else it is part of something else: 10**10, 3pm, 1,23.
_NUMBER = re.compile(
    r"""
    \*{0,3}\s?                                                    # bold
    [$€£]?\s?  (?P<sign>[-+\u2212]?)  \s?[$€£]?\s?
    (?P<digits>
        (?: [0-9]{1,3}(?:,[0-9]{3}){1,12} | [0-9]{1,40} ) (?:\.[0-9]{0,40})?
        | \.[0-9]{1,40}
    )
    (?:[eE](?P<exponent>[-+]?[0-9]{1,3}))?
    (?:/(?P<below>[0-9]{1,40}))?                                  # 3/4
    \s?[%$€£]?                                                    # units: 50 % is 50, half a percent is 0.5
    (?= [.,;:!?)*]{0,4} (?:\s|$) )
    """,
    re.VERBOSE,
)
_NUMBER_WINDOW = 200  # characters after the marker; longer than any number that _NUMBER accepts
_FORMAT_WINDOW = 8192  # characters at the end of an answer that a pattern may start in


@RULES.register("exact", paper="arXiv:1606.05250 sec. 6.1")
def exact(rows: list[Row], answers: list[str], *, answer: str) -> Column:
    """1 if the answer equals column `answer` of its row, else 0; white space and letter case do not count."""
    references = [_normal(str(_field(row, answer, i))) for i, row in enumerate(rows)]
    return [float(_normal(text) == reference) for text, reference in zip(answers, references, strict=True)]


@RULES.register("numeric", paper="arXiv:2110.14168 (final answer after ####)")
def numeric(rows: list[Row], answers: list[str], *, answer: str, marker: str, tolerance: float) -> Column:
    """1 if the number after the answer's last `marker` equals that of column `answer`, else 0.

    An answer without marker or number is wrong, by this rule. A reference may do without the marker (a bare `72`), but
    one without a number is an error in the data. tolerance: largest relative difference that counts as equal.
    """
    targets = [_reference_number(row, answer, marker, i) for i, row in enumerate(rows)]
    scores: Column = []
    for text, target in zip(answers, targets, strict=True):
        _, found_marker, tail = text.rpartition(marker) if marker else ("", "start", text)
        value = parse_number(tail) if found_marker else None
        scores.append(float(value is not None and math.isclose(value, target, rel_tol=tolerance)))
    return scores


@RULES.register("format", paper="arXiv:2501.12948 sec. 2.2.2 (format rewards)")
def format_found(rows: list[Row], answers: list[str], *, pattern: str) -> Column:
    """1 if the regular expression is found in the answer, else 0.

    A match must start in the last 8,192 characters, which bounds the time of a pattern that is quadratic in the text;
    `^` and `\\A` still mean the beginning of the whole answer. A pattern that is exponential (nested repetition such as
    `(a+)+$`) ends the run when an answer takes it more than 5 seconds.
    """
    compiled = _compiled(pattern)
    scores: Column = []
    for text in answers:
        with searching(pattern, "rewards: format: pattern"):
            scores.append(float(compiled.search(text, max(0, len(text) - _FORMAT_WINDOW)) is not None))
    return scores


@RULES.register("length", paper="arXiv:2503.04697 eq. 1 (distance to a target length)")
def length(rows: list[Row], answers: list[str], *, target: int, scale: int) -> Column:
    """max(0, 1 - |words - target| / scale), words being separated by white space."""
    return [max(0.0, 1 - abs(len(text.split()) - target) / scale) for text in answers]


@RULES.register("demo_gold", paper="arXiv:2210.10760 sec. 2.2 (a gold reward that labels)")
def demo_gold(rows: list[Row], answers: list[str], *, noise: float, seed: int) -> Column:
    """The gold reward of the demo's task, plus `noise` times a Gumbel variable.

    Of two answers that are compared by this score with noise 1, one is preferred with the probability sigmoid(gold -
    other gold), which is Bradley-Terry. The noise is a function of (seed, prompt, answer): a labeller who does not
    change his mind.
    """
    prompts = [str(_field(row, "prompt", i)) for i, row in enumerate(rows)]
    return [
        gold_reward(prompt, text) + noise * _gumbel(seed, prompt, text)
        for prompt, text in zip(prompts, answers, strict=True)
    ]


@RULES.register("function", paper="the user's own")
def user_function(rows: list[Row], answers: list[str], *, function: str, timeout: float) -> Column:
    """What the user's `file.py:name` says: called as name(rows, answers), returns a list of finite floats or None.

    Runs the file's code, once per process; whoever calls this has asked for permission. The function gets copies. A
    call of more than `timeout` seconds ends the run.
    """
    result = call(function, timeout, [dict(row) for row in rows], list(answers))
    return checked_scores(result, len(answers), function)


def parse_number(text: str) -> float | None:
    """The number at the start of `text`, white space aside; None if there is none, or none that is finite."""
    match = _NUMBER.match(text.lstrip()[:_NUMBER_WINDOW])
    if match is None:
        return None
    digits = match["digits"].replace(",", "")
    value = float(f"{digits}e{match['exponent'] or 0}")
    if match["below"]:
        below = float(match["below"])
        value = value / below if below else math.inf
    return (-value if match["sign"] in ("-", "\u2212") else value) if math.isfinite(value) else None


def _gumbel(seed: int, prompt: str, answer: str) -> float:
    """A draw from the standard Gumbel distribution, -log(-log(u)), that belongs to these arguments."""
    text = "\0".join([str(seed), prompt, answer]).encode(errors="surrogatepass")
    uniform = (int.from_bytes(hashlib.blake2b(text, digest_size=6).digest(), "big") + 0.5) / 2**48
    return -math.log(-math.log(uniform))


def _reference_number(row: Row, column: str, marker: str, index: int) -> float:
    """The number in a row's reference answer."""
    text = str(_field(row, column, index))
    value = parse_number(text.rpartition(marker)[2] if marker else text)
    if value is None:
        shown = text if len(text) <= 80 else "..." + text[-80:]
        raise DataError(
            f"expected a number in column {column!r}, found {shown!r}",
            where=_place(row, index),
            fix=f"a number may stand alone or after {marker!r}; name another column with `answer:`",
        )
    return value


def _field(row: Row, column: str, index: int) -> Any:
    """A row's reference answer, which must be there."""
    if row.get(column) is None:
        raise DataError(
            f"expected a reference answer in column {column!r}, found columns {', '.join(map(str, row))}",
            where=_place(row, index),
            fix="name the column with `answer:` in the reward's options",
        )
    return row[column]


def _place(row: Row, index: int) -> str:
    """How a message names a row: its number in the dataset, else its position in this call."""
    return f"row {row['row']}" if "row" in row else f"row {index} of the batch"


def _normal(text: str) -> str:
    """One space between words, no letter case."""
    return " ".join(text.split()).casefold()


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """A recipe's pattern, compiled once."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(
            f"expected a regular expression, found {pattern!r}: {error}", where="rewards: format: pattern"
        ) from None
