"""A recipe's regular expressions on what models write: the two together decide how long a search takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.bounds import OutOfTimeError, time_limit
from rlhf.errors import RecipeError

SECONDS = 5.0  # for one answer; a good pattern takes thousandths


@contextmanager
def searching(pattern: str, where: str) -> Iterator[None]:
    """Inside, an answer is searched. A pattern that does not come to an end is the recipe's to mend."""
    try:
        with time_limit(SECONDS):
            yield
    except OutOfTimeError:
        raise RecipeError(
            f"expected a pattern that is searched in {SECONDS:g} s, found {pattern!r}, which takes longer",
            where=where,
            fix="Avoid repetition inside repetition, such as (a+)+: its time doubles with every character.",
        ) from None
