"""For every row an answer that was given to another prompt: what KTO measures its reference point on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf.data.examples import AnswerExample
from rlhf.data.order import generator
from rlhf.errors import DataError


def partners(examples: Sequence[AnswerExample], seed: int, max_length: int) -> list[int]:
    """For every row the number of the row whose answer is put after its prompt.    [Ethayarajh 2024, arXiv:2402.01306]

    It is the next row, in an order drawn once by seed and read as a circle, that has another prompt and whose answer
    fits: prompt and answer together have at most max_length tokens. A function of its arguments, not of the step, so
    that what the reference says of such rows can be computed once. Where all prompts differ and all answers fit, every
    answer is used exactly once, as by the rotation within a batch that the paper describes.
    """
    numbers: dict[bytes, int] = {}
    prompts = np.array([numbers.setdefault(e.prompt_ids.tobytes(), len(numbers)) for e in examples])
    if len(numbers) < 2:
        raise DataError(
            "expected answers to different prompts, found the same prompt in every row",
            where="data",
            fix="This loss needs an answer to another prompt beside every prompt: add rows, or choose another loss.",
        )
    room = max_length - np.array([len(e.prompt_ids) for e in examples])
    lengths = np.array([len(e.answer_ids) for e in examples])
    order = generator(seed, "mismatched").permutation(len(examples))
    found = np.empty(len(examples), np.int64)
    found[order] = np.roll(order, -1)
    for place in np.flatnonzero((prompts[order] == prompts[found[order]]) | (lengths[found[order]] > room[order])):
        row = order[place]
        following = np.roll(order, -1 - int(place))
        fits = (prompts[following] != prompts[row]) & (lengths[following] <= room[row])
        if not fits.any():
            raise DataError(
                f"expected an answer to another prompt that fits after every prompt, found none for row "
                f"{examples[row].row}, whose prompt leaves {room[row]} tokens",
                where="data.max_length",
                fix="Raise it, or set data.max_prompt_length to leave out such prompts.",
            )
        found[row] = following[int(fits.argmax())]
    partner: list[int] = found.tolist()
    return partner
