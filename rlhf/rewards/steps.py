"""Rewards for the steps of an answer: where steps end, in the text and in the tokens, and what the user says of each.

A step ends behind the separator, which belongs to it, and at the answer's end; the steps joined are the answer. Its
score stands on the token whose text completes it, the last step's on the answer's last token: the end token, if any.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.batch import Rollout
from rlhf.errors import RecipeError
from rlhf.rewards.base import Column
from rlhf.rewards.user_code import call, checked_scores, shown

Decode = Callable[[list[int]], str]
StepColumn = list[list[float] | None]  # one answer's step scores, None: unscored


def split_steps(answer: str, separator: str) -> list[str]:
    """The steps of an answer, at least one: "a\\nb" -> ["a\\n", "b"], "a\\n" -> ["a\\n"], "" -> [""]."""
    pieces = answer.split(separator)
    last = [pieces[-1]] if pieces[-1] or len(pieces) == 1 else []
    return [piece + separator for piece in pieces[:-1]] + last


def step_tokens(ids: list[int], steps: list[str], decode: Decode) -> list[int]:
    """For each step, the index of the token that completes it; the last step's is the last token's.

    ids: the answer's tokens, and decode(ids) the steps joined. A prefix of the tokens holds a step once its text begins
    with all text up to there; half a character does not count. Exact where more tokens only ever add text, as with
    byte-level tokenizers.
    """
    text, ends, at = "".join(steps), [], 0
    for step in steps[:-1]:
        at += len(step)
        ends.append(bisect_left(range(len(ids)), True, key=lambda i, n=at: decode(ids[: i + 1]).startswith(text[:n])))
    return [min(end, len(ids) - 1) for end in ends] + [len(ids) - 1]


def user_steps(rows: list[dict[str, Any]], steps: list[list[str]], function: str, timeout: float) -> StepColumn:
    """What the user's `file.py:name` says: called as name(rows, steps), returns a list of floats per answer, one per
    step, or None for an answer that it leaves unscored.
    """
    result = call(function, timeout, [dict(row) for row in rows], [list(each) for each in steps])
    fix = f"it must return {len(steps)} lists, each with a number per step; None leaves an answer unscored"
    if not isinstance(result, list | tuple):
        raise RecipeError(f"expected a list of step scores per answer, found {shown(result)}", where=function, fix=fix)
    if len(result) != len(steps):
        what = f"expected step scores of {len(steps)} answers, found {len(result)}: {shown(result)}"
        raise RecipeError(what, where=function, fix=fix)
    scores: StepColumn = []
    for i, (found, of) in enumerate(zip(result, steps, strict=True)):
        if found is None:
            scores.append(None)
            continue
        column = checked_scores(found, len(of), function, f"step scores of answer {i}")
        if None in column:
            what = f"expected a number for every step of answer {i}, found {shown(found)}"
            raise RecipeError(what, where=function, fix=fix)
        scores.append([score for score in column if score is not None])
    return scores


def process_part(function: str, separator: str, timeout: float, decode: Decode) -> Callable[[Rollout], Tensor]:
    """A reward of steps: rollout -> step scores (B, R), NaN where no step ends and all along an unscored answer.

    Steps that end in the same token are added up.
    """

    def part(rollout: Rollout) -> Tensor:
        steps = [split_steps(text, separator) for text in rollout.texts]
        found = user_steps(rollout.rows, steps, function, timeout)
        scores = torch.full(rollout.response_mask.shape, torch.nan, dtype=torch.float64)
        responses = rollout.ids[:, -scores.shape[1] :]
        for i, (texts, column) in enumerate(zip(steps, found, strict=True)):
            if column is None:
                continue
            places = step_tokens(responses[i, : int(rollout.response_mask[i].sum())].tolist(), texts, decode)
            for place, score in zip(places, column, strict=True):
                scores[i, place] = scores[i, place].nan_to_num() + score
        return scores

    return part


def summed(steps: Tensor) -> Column:
    """Each answer's sum over its steps; None where it has none."""
    return [None if row.isnan().all() else float(row.nansum()) for row in steps]
