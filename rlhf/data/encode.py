"""Text -> token ids, region by region, so that what comes from data never becomes a control token.

A region is tokenised apart from its neighbours, as a rollout does it: the prompt is given as ids, and the answer's
tokens come after them whatever the text would have merged to. Inside a region the tokenizer sees the text as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from rlhf.errors import DataError

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Region:
    """Text that is tokenised in one go: pieces of (text, whether it comes from the data rather than the template)."""

    pieces: tuple[tuple[str, bool], ...]
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """The regions of one row, in order."""

    regions: tuple[Region, ...]
    where: str  # the row's place, for messages


class Encoder:
    """A tokenizer that keeps control tokens for the template.

    control: the tokens that only the template may write.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        only = sorted(control)
        self._control_ids = np.array([tokenizer.convert_tokens_to_ids(token) for token in only], np.int32)
        self._control = _starts(only)
        added = {token.content for token in tokenizer.added_tokens_decoder.values()}
        self._added = tuple(sorted(added.union(only), key=len, reverse=True))
        # SentencePiece-style tokenizers put a space before the first word of a text. A region is no new text: such
        # tokenizers get a line break to start from, whose tokens are taken off again.
        newline, joined, alone = self._tokenize(["\n", "\na", "a"])
        self._start = "" if joined[len(newline) :] == alone else "\n"
        self._known: dict[str, list[int]] = {}

    def encode(self, rows: Sequence[Conversation]) -> list[tuple[Ids, Mask]]:
        """Token ids and trained-token mask of every row. Equal texts are tokenised once."""
        cut = [[self._runs(region) for region in row.regions] for row in rows]
        anchored = [list(self._anchors(runs)) for runs in cut]
        known = self._batch({key for regions in anchored for keys in regions for key in keys})
        return [self._join(row, keys, known) for row, keys in zip(rows, anchored, strict=True)]

    def _runs(self, region: Region) -> list[str]:
        """A region's text, cut inside everything in the data that spells a control token."""
        text = "".join(piece for piece, _ in region.pieces)
        found = [(match.start(), match.end(match.lastindex or 0)) for match in self._control.finditer(text)]
        if not found:
            return [text] if text else []
        cuts = [start + 1 for start, end in found if not _inside_template(region, start, end)]
        return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True) if a < b]

    def _anchors(self, regions: list[list[str]]) -> Iterable[list[tuple[str, str]]]:
        """(what the run follows, run) for every run of every region.

        A run after an added token is tokenised behind it, since such tokens may take white space with them.
        """
        before = ""
        for runs in regions:
            keys = []
            for run in runs:
                end = next((token for token in self._added if token and before.endswith(token)), None)
                keys.append((end or (self._start if before else ""), run))
                before = run
            yield keys

    def _batch(self, keys: set[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
        """Token ids of every run, without those of what it follows."""
        order = sorted(keys)
        anchors = {anchor for anchor, _ in order if anchor} - self._known.keys()
        self._known.update(zip(sorted(anchors), self._tokenize(sorted(anchors)), strict=True))
        result = {}
        alone = []
        for (anchor, run), ids in zip(order, self._tokenize([a + run for a, run in order]), strict=True):
            prefix = self._known[anchor] if anchor else []
            if ids[: len(prefix)] == prefix:
                result[anchor, run] = ids[len(prefix) :]
            else:  # the run's first characters merged with the line break before it
                alone.append((anchor, run))
        result.update(zip(alone, self._tokenize([run for _, run in alone]), strict=True))
        return result

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        made = self._tokenizer(
            texts,
            add_special_tokens=False,  # the template has written them
            split_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ids: list[list[int]] = made["input_ids"]
        return ids

    def _join(
        self, row: Conversation, keys: list[list[tuple[str, str]]], known: dict[tuple[str, str], list[int]]
    ) -> tuple[Ids, Mask]:
        lengths = [sum(len(known[key]) for key in region) for region in keys]
        ids = np.fromiter((i for region in keys for key in region for i in known[key]), np.int32, sum(lengths))
        mask = np.repeat(np.array([region.trained for region in row.regions], np.bool_), lengths)
        self._check(row, ids)
        return ids, mask

    def _check(self, row: Conversation, ids: Ids) -> None:
        """Every control token stands where the template wrote one."""
        written = sum(
            len(self._control.findall(piece))
            for region in row.regions
            for piece, is_data in region.pieces
            if piece and not is_data
        )
        found = int(np.isin(ids, self._control_ids).sum())
        if found > written:
            raise DataError(
                f"expected text, found what this tokenizer reads as a control token ({found} instead of {written})",
                where=row.where,
                fix="Remove control tokens such as end-of-text marks from the row's text.",
            )


def _inside_template(region: Region, start: int, end: int) -> bool:
    """Whether text[start:end] of a region was written by the template alone."""
    at = 0
    for piece, is_data in region.pieces:
        if is_data and start < at + len(piece) and at < end:
            return False
        at += len(piece)
    return True


def _starts(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern that consumes the first character of every token in a text; its group ends where the token ends.

    Grouped by first character, which lets `re` skip ahead to such characters: some tokenizers have hundreds of tokens.
    """
    rests: dict[str, list[str]] = {}
    for token in sorted(tokens, key=lambda token: (-len(token), token)):  # longer ones first: one may begin another
        if token:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
    return re.compile("|".join(f"{re.escape(first)}(?=({'|'.join(rest)}))" for first, rest in rests.items()) or r"(?!)")
