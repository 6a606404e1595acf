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
_NOTHING = ("", "~", "null", "true", "false")
_FIX = "take it out: keys come from the environment (api_key_env names the variable, HF_TOKEN is read by itself)"


def secrets(document: Document) -> list[Problem]:
    """A problem for every place of a recipe, comments and `--set` included, that looks like a key or password."""
    return [*_in_text(document), *_in_values(document)]


def _in_text(document: Document) -> Iterator[Problem]:
    for number, line in enumerate(document.text.splitlines(), start=1):
        if match := _SHAPES.search(line):
            yield Problem(
                "", "expected no secret, found what looks like one", _FIX, spot=Spot(number, match.start() + 1)
            )


def _in_values(document: Document) -> Iterator[Problem]:
    for key, mark in document.marks.items():
        text, spot = mark.text or "", mark.value
        named = _KEYS.fullmatch(key.rpartition(".")[2]) and text.lower() not in _NOTHING
        if named or _SHAPES.search(text):
            if spot.override is not None:  # the text of the option is the secret: only its key is shown
                spot = Spot(spot.line, spot.column, f"{key}=...")
            yield Problem(key if named else "", "expected no secret, found what looks like one", _FIX, spot=spot)
