"""How long rows may be, and what happens to longer ones. Pure arithmetic on lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rlhf.data.formats import Kind
from rlhf.errors import RecipeError
from rlhf.recipe.schema import DataBlock

LONG = "longer than max_length"
LONG_PROMPT = "prompt longer than max_prompt_length"
LONG_ANSWER = "answer alone longer than max_length"
NO_ROOM = "no room for an answer after the prompt"
PROMPT_CUT = "prompt cut on the left"
ANSWER_CUT = "answer cut on the right"
ANSWERS_OUT = "answers of a list left out as too long"
FEW_ANSWERS = "fewer than two answers of a list fit"


@dataclass(frozen=True)
class Limits:
    """The limits of a stage, in tokens."""

    total: int  # prompt and answer; of prompts to sample from: the prompt
    prompt: int | None
    on_long: Literal["drop", "truncate_prompt", "truncate_answer", "error"]
    begin: int | None = None  # the begin token's id, which a cut prompt keeps


@dataclass(frozen=True)
class Cut:
    """What is done to a row: dropped for a reason, or shortened; nothing where both are empty."""

    reason: str = ""
    prompt: int = 0  # tokens taken off the prompt, on its left
    answer: int | None = None  # tokens that stay of every answer
    without: tuple[int, ...] = ()  # answers of a list that are left out, by number


def limits_of(data: DataBlock, kind: Kind, max_new_tokens: int, begin: int | None) -> Limits:
    """The limits that a recipe sets."""
    total = data.max_length
    if kind == "prompts":
        total -= max_new_tokens
        if total < 1:
            raise RecipeError(
                f"expected more than sampling.max_new_tokens ({max_new_tokens}), found {data.max_length}",
                where="data.max_length",
                fix="Prompt and answer together have max_length tokens.",
            )
    return Limits(total, data.max_prompt_length, data.on_long, begin)


def cut(prompt: int, answers: Sequence[int], limits: Limits) -> Cut:
    """What to do with a prompt and its answers (none, one, or both sides of a pair), given their lengths.

    Both sides of a pair are treated alike: the pair is dropped if either side is too long, and the prompt is cut by
    what the longer side needs.
    """
    longest = max(answers, default=0)
    widest = limits.total if limits.prompt is None else min(limits.prompt, limits.total)
    is_long_prompt = limits.prompt is not None and prompt > limits.prompt
    if not is_long_prompt and prompt + longest <= limits.total:
        return Cut()
    if limits.on_long == "truncate_prompt":
        room = min(widest, limits.total - longest)
        return Cut(LONG_ANSWER) if room < min(1, prompt) else Cut(prompt=max(0, prompt - room))
    if limits.on_long == "truncate_answer" and answers and not is_long_prompt:
        return Cut(answer=limits.total - prompt) if prompt < limits.total else Cut(NO_ROOM)
    return Cut(LONG_PROMPT if is_long_prompt else LONG)


def cut_list(prompt: int, answers: Sequence[int], limits: Limits) -> Cut:
    """The same for a list of answers: those that cannot be made to fit are left out, as long as two stay."""
    if limits.on_long == "error":
        return cut(prompt, answers, limits)
    reasons = [cut(prompt, [length], limits).reason for length in answers]
    without = tuple(i for i, reason in enumerate(reasons) if reason)
    fitting = [length for length, reason in zip(answers, reasons, strict=True) if not reason]
    if len(fitting) < 2:
        return Cut(FEW_ANSWERS if fitting else reasons[0], without=without)
    return replace(cut(prompt, fitting, limits), without=without)
