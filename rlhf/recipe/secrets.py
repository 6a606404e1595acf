"""Keys and passwords have no place in a recipe: it is copied into the run directory, and read by whoever reads that.

What looks like one is refused before anything is written, and never repeated in the message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from rlhf.recipe.document import Document
from rlhf.recipe.problems import Problem, Spot

_SHAPES = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{20,}                                       # Hugging Face
    | \bsk-[A-Za-z0-9_-]{20,}                                     # OpenAI and its kin
    | \bgh[pousr]_[A-Za-z0-9]{30,} | \bgithub_pat_\w{30,}
    | \bglpat-[\w-]{20,}
    | \bxox[abeoprs]-[\w-]{10,}
    | \bAKIA[0-9A-Z]{16}\b | \bAIza[\w-]{35}
    | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+                       # a JSON web token
    | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----
    | ://[^/@\s:'"]+:[^/@\s'"]+@                                  # user:password@ in an address
    | [?&](?:api[_-]?key|access[_-]?token|auth[_-]?token|token|key|secret|password|sig|signature)=[^&\s'"]+
    """,
    re.VERBOSE | re.IGNORECASE,
)
_KEYS = re.compile(
    r"(?:.*[_.-])?(?:api[_-]?key|access[_-]?key|private[_-]?key|auth[_-]?token|token|secret|secret[_-]?key|password"
    r"|passwd|passphrase|credentials?|authorization)",
    re.IGNORECASE,
)
_NOTHING = re.compile(r"|~|null|true|false|-?\d{1,6}(\.\d+)?")  # a misspelt `micro_tokens: 512` is no secret
_FIX = "take it out: keys come from the environment (api_key_env names the variable, HF_TOKEN is read by itself)"


def secrets(document: Document) -> list[Problem]:
    """A problem for every place of a recipe, comments and `--set` included, that looks like a key or password."""
    values = list(_in_values(document))
    told = {problem.spot.line for problem in values if problem.spot is not None and problem.spot.override is None}
    return [*values, *(problem for problem in _in_text(document) if problem.spot and problem.spot.line not in told)]


def _in_text(document: Document) -> Iterator[Problem]:
    for number, line in enumerate(document.text.splitlines(), start=1):
        if match := _SHAPES.search(line):
            yield Problem(
                "", "expected no secret, found what looks like one", _FIX, spot=Spot(number, match.start() + 1)
            )


def _in_values(document: Document) -> Iterator[Problem]:
    for key, mark in document.marks.items():
        text, spot = mark.text or "", mark.value
        named = _KEYS.fullmatch(key.rpartition(".")[2]) and not _NOTHING.fullmatch(text.lower())
        if named or _SHAPES.search(text):
            if spot.override is not None:  # the text of the option is the secret: only its key is shown
                spot = Spot(spot.line, spot.column, f"{key}=...")
            yield Problem(
                "" if _SHAPES.search(key) else key, "expected no secret, found what looks like one", _FIX, spot=spot
            )
