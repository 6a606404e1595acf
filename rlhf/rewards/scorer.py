"""All rewards of a list as one: each part is asked, then they are added up with their weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.batch import Rollout
from rlhf.errors import NotFiniteError
from rlhf.rewards.base import Column, Row, weighted_sum
from rlhf.rewards.steps import summed

logger = logging.getLogger("rlhf.rewards")

Part = Callable[[Rollout], Column]
StepPart = Callable[[Rollout], Tensor]  # (B, R), NaN where no step ends
# (attention (B, T), how many of the columns are prompt, B prompts by any name) -> the rows of every pass through a
# model; False marks a mere stand-in, which keeps ranks in step.
Cut = Callable[[Tensor, int, Sequence[Any]], Iterable[tuple[list[int], bool]]]
Encode = Callable[[Rollout], "Sequence[Sequence[int] | None]"]  # None: an answer that cannot be rendered


@dataclass(frozen=True)
class Scores:
    """What a list of rewards says of a rollout. NaN: unscored."""

    total: Tensor  # (B,) weighted sum
    parts: dict[str, Tensor]  # (B,) each reward, before its weight
    steps: Tensor | None  # (B, R) the total, spread over the tokens that earned it; NaN elsewhere


@dataclass(frozen=True)
class Scorer:
    """Scores of a rollout: the weighted sum, each part, and, where a reward scores steps, the sum token by token."""

    parts: dict[str, Part]
    weights: dict[str, float]
    step_parts: dict[str, StepPart] = field(default_factory=dict)  # have a weight, too
    # Asks one part. Where several ranks score, all of them must hear of a part that failed on one, before the next.
    ask: Callable[[Callable[[], Any]], Any] = lambda work: work()

    def names(self) -> list[str]:
        """The parts, in the order in which `Scores` has them."""
        return [*self.parts, *self.step_parts]

    def __call__(self, rollout: Rollout) -> Scores:
        with torch.no_grad():
            found = {name: self.ask(partial(part, rollout)) for name, part in self.parts.items()}
        steps = {name: self.ask(partial(part, rollout)) for name, part in self.step_parts.items()}
        everything = {**found, **{name: summed(each) for name, each in steps.items()}}
        total = weighted_sum(everything, self.weights)
        spread = self._spread(rollout, total, found, steps) if steps else None
        return Scores(_tensor(total), {name: _tensor(column) for name, column in everything.items()}, spread)

    def _spread(self, rollout: Rollout, total: Column, found: dict[str, Column], steps: dict[str, Tensor]) -> Tensor:
        """(B, R) weighted step scores where steps end, all else on the last token: each row sums to the total."""
        shape = rollout.response_mask.shape
        spread, ends = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.bool)
        for name, each in steps.items():
            spread += self.weights[name] * each.nan_to_num()
            ends |= ~each.isnan()
        last = rollout.response_mask.sum(-1) - 1
        for i, score in enumerate(total):
            if score is None:
                ends[i] = False
            else:
                whole = [self.weights[name] * column[i] for name, column in found.items()]  # type: ignore[operator]
                spread[i, last[i]] += sum(whole)
        return torch.where(ends, spread, torch.nan).float()


def rule_part(rule: Callable[[list[Row], list[str]], Column]) -> Part:
    """A reward that looks at the answers' text."""
    return lambda rollout: rule(rollout.rows, rollout.texts)


def model_part(score: Callable[[Tensor, Tensor], Tensor], cut: Cut, device: torch.device) -> Part:
    """A reward model that reads prompt and answer as the tokens that were sampled: nothing is decoded and re-encoded.

    score: (ids (b, T), attention (b, T)) -> (b,). The policy and the reward model must share tokenizer and template.
    """

    def part(rollout: Rollout) -> Column:
        prompt_columns = rollout.ids.shape[1] - rollout.response_mask.shape[1]
        prompts = [row["row"] for row in rollout.rows]
        return _in_passes(
            score, rollout.ids, rollout.attention, cut(rollout.attention, prompt_columns, prompts), device, prompts
        )

    return part


def rendered_part(
    score: Callable[[Tensor, Tensor], Tensor],
    encode: Encode,
    *,
    pad_id: int,
    room: int | None,
    cut: Cut,
    device: torch.device,
) -> Part:
    """A reward model with a tokenizer or template of its own: it reads each prompt and answer as it would write them.

    encode: the token ids of every row of a rollout. Rows of more than `room` tokens are unscored, never cut, as are
    those that `encode` cannot write.
    """

    def part(rollout: Rollout) -> Column:
        rows = encode(rollout)
        fits = [ids is not None and (room is None or len(ids) <= room) for ids in rows]
        if not all(fits):
            unwritten = sum(ids is None for ids in rows)
            logger.warning(
                "reward model: %d of %d answers unscored: %d longer than its %s positions, %d that its chat template"
                " cannot write",
                *(fits.count(False), len(rows), fits.count(False) - unwritten, room, unwritten),
            )
        called = [ids if fit else [pad_id] for ids, fit in zip(rows, fits, strict=True)]  # stand-ins: see above
        ids, attention = _padded(called, pad_id)
        prompts = [row["row"] for row in rollout.rows]
        scores = _in_passes(score, ids, attention, cut(attention, 0, range(len(called))), device, prompts)
        return [value if fit else None for value, fit in zip(scores, fits, strict=True)]

    return part


def _in_passes(
    score: Callable[[Tensor, Tensor], Tensor],
    ids: Tensor,
    attention: Tensor,
    passes: Iterable[tuple[list[int], bool]],
    device: torch.device,
    records: Sequence[int],
) -> list[float]:
    """Scores of all rows (B, T). records: numbers of the prompts' records."""
    scores = [0.0] * len(ids)
    with torch.no_grad():
        for rows, is_real in passes:
            columns = attention[rows].any(0).nonzero()  # of padding on either side the model need not know
            part = slice(int(columns[0]), int(columns[-1]) + 1)
            found = score(ids[rows, part].to(device), attention[rows, part].to(device))
            for row, value in zip(rows, found.tolist() if is_real else (), strict=is_real):
                scores[row] = value
    return _finite(scores, records)


def _finite(scores: list[float], records: Sequence[int]) -> list[float]:
    """A model's scores. What is not a number is the model's fault: it must not pass for an unscored answer.

    Told after the last pass, since ranks meet in each.
    """
    bad = [row for row, score in enumerate(scores) if not math.isfinite(score)]
    if bad:
        raise NotFiniteError(
            f"expected finite scores, found {len(bad)} of {len(scores)} that are not",
            found={"scores of the reward model": str(scores[bad[0]])},
            rows=[records[row] for row in bad],
            where="reward model",
            fix="Score in fp32 (dtype of the reward), or look at the reward model's training.",
        )
    return scores


def standardised(part: Part, mean: float, std: float) -> Part:
    """A part less a mean, over a deviation."""
    return lambda rollout: [None if score is None else (score - mean) / std for score in part(rollout)]


def _padded(rows: Sequence[Any], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids (b, T) and their attention; padding is known from lengths."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.int64)
    attention = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return ids, attention


def _tensor(column: Column) -> Tensor:
    return torch.tensor([float("nan") if score is None else score for score in column], dtype=torch.float32)
