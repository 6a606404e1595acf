"""What is made of scored answers: pairs, the best answer to each prompt, lists, and the curve of best-of-n.

Everything is a function of the rows of answers.jsonl and of the recipe, so it is the same on any number of ranks.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.selection import bon_expected, bon_kl, rejection_sample, win_rates
from rlhf.recipe.stages import LabelBlock
from rlhf.rewards import verdicts
from rlhf.train.seeding import derive

Row = dict[str, Any]
Scored = tuple[int, float]  # index of an answer among those to its prompt, and its score


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, in the order in which they were drawn."""

    number: int  # which prompt of the stage
    rows: Sequence[Row]
    scores: list[float | None]  # None: takes no part
    dropped: int  # answers that take no part because they were cut off

    @property
    def texts(self) -> list[str]:
        """The answers."""
        return [row["answer"] for row in self.rows]

    def scored(self) -> list[Scored]:
        """The answers that take part."""
        return [(i, score) for i, score in enumerate(self.scores) if score is not None]

    def distinct(self) -> list[Scored]:
        """The first of equal texts among them."""
        first: dict[str, Scored] = {}
        for i, score in self.scored():
            first.setdefault(self.texts[i], (i, score))
        return list(first.values())


def groups_of(answers: Sequence[Row], label: LabelBlock, first: int) -> Iterator[Group]:
    """Rows of answers.jsonl by prompt. first: the number of the first prompt."""
    for number, start in enumerate(range(0, len(answers), label.answers), first):
        rows = answers[start : start + label.answers]
        # An answer that was cut off would be learned as one that ends there.
        dropped = [label.unfinished == "drop" and not row["finished"] for row in rows]
        scores = [None if drop else row["score"] for row, drop in zip(rows, dropped, strict=True)]
        yield Group(number, rows, scores, sum(dropped))


# --- pairs -----------------------------------------------------------------------------------------------------------


def compare(group: Group, label: LabelBlock) -> tuple[list[tuple[int, int]], Counter[str]]:
    """(chosen, rejected) by index among the answers to one prompt, and why others make no pair.

    best_worst looks at one pair, the highest score with the lowest (the first of equal ones); all looks at every two;
    rso at the first round of a tournament among the answers that rejection sampling accepts. Equal scores, scores no
    more than min_margin apart, and equal texts make no pair.
    """
    scored, left_out = group.scored(), Counter[str]()
    if label.pairs == "rso":
        distinct = group.distinct()
        left_out["equal_texts"] = len(scored) - len(distinct)
        scored = distinct
    if len(scored) < 2:
        return [], left_out + Counter(too_few_scored=1)
    if label.pairs == "best_worst":
        looked_at = [(max(scored, key=lambda item: item[1]), min(scored, key=lambda item: item[1]))]
    else:
        both = itertools.combinations(scored, 2) if label.pairs == "all" else first_round(scored, label, group.number)
        looked_at = [(a, b) if a[1] > b[1] else (b, a) for a, b in both]
    pairs: list[tuple[int, int]] = []
    for (better, high), (worse, low) in looked_at:
        if high == low:
            left_out["ties"] += 1
        elif high - low <= label.min_margin:
            left_out["close"] += 1
        elif group.texts[better] == group.texts[worse]:
            left_out["equal_texts"] += 1
        else:
            pairs.append((better, worse))
    return pairs, +left_out


def first_round(scored: Sequence[Scored], label: LabelBlock, number: int) -> list[tuple[Scored, Scored]]:
    """Who meets whom: the accepted answers in a random order, two by two. Of an odd number the last meets nobody.

    [arXiv:2309.06657 sec. 3.2, "first-round-rank"]
    """
    chance = torch.Generator().manual_seed(derive(label.seed, "rso", number))
    scores = torch.tensor([score for _, score in scored], dtype=torch.float64)
    accepted = rejection_sample(scores, accept=label.rso.accept, beta=label.rso.beta, generator=chance)
    order = [scored[accepted[i]] for i in torch.randperm(len(accepted), generator=chance).tolist()]
    return list(zip(order[::2], order[1::2], strict=False))


def pair_rows(answers: Sequence[Row], label: LabelBlock, first: int = 0) -> tuple[list[Row], Counter[str]]:
    """Rows of answers.jsonl as rows of pairs.jsonl, in the format `pairs`; and what makes no pair, by reason.

    first: the number of the first prompt. The margin is not called `margin`, which the reward model's loss would take
    for its own scale.
    """
    rows: list[Row] = []
    left_out: Counter[str] = Counter()
    for group in groups_of(answers, label, first):
        if label.pairs == "all" and "comparisons" in group.rows[0]:
            takes_part = [i for i, row in enumerate(group.rows) if verdicts.takes_part(row, label.unfinished)]
            pairs, reasons = verdicts.decided_pairs(group.rows, takes_part, label.min_margin)
        else:
            pairs, reasons = compare(group, label)
        left_out += reasons + Counter(unfinished=group.dropped)
        rates = win_rates(as_tensor(group.scores)).tolist()
        for better, worse in pairs:
            high, low = group.scores[better], group.scores[worse]
            assert high is not None and low is not None
            rows.append(
                {
                    "prompt": group.rows[0]["prompt"],
                    "chosen": group.texts[better],
                    "rejected": group.texts[worse],
                    "score_margin": high - low,
                    "score_chosen": high,
                    "score_rejected": low,
                    "win_rate_chosen": rates[better],
                    "win_rate_rejected": rates[worse],
                    **verdicts.judged_columns(group.rows, better, worse),
                    "row": group.rows[0]["row"],
                }
            )
    return rows, left_out


def as_tensor(scores: Sequence[float | None]) -> Tensor:
    """Scores as float64, NaN where there is none."""
    return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float64)


# --- the best, and all ------------------------------------------------------------------------------------------------


def best_rows(answers: Sequence[Row], label: LabelBlock) -> list[Row]:
    """Rows of best.jsonl, in the format `prompt_completion`: the best answer to each prompt (the first of equal ones).

    A prompt none of whose answers takes part has no row.
    """
    rows = []
    for group in groups_of(answers, label, 0):
        if scored := group.scored():
            best, score = max(scored, key=lambda item: item[1])
            first = group.rows[0]
            rows.append(
                {"prompt": first["prompt"], "completion": group.texts[best], "score": score, "row": first["row"]}
            )
    return rows


def list_rows(answers: Sequence[Row], label: LabelBlock) -> list[Row]:
    """Rows of lists.jsonl: the different answers to each prompt that take part, where there are two or more."""
    rows = []
    for group in groups_of(answers, label, 0):
        distinct = group.distinct()
        if len(distinct) > 1:
            texts, scores = [group.texts[i] for i, _ in distinct], [score for _, score in distinct]
            first = group.rows[0]
            rows.append({"prompt": first["prompt"], "answers": texts, "scores": scores, "row": first["row"]})
    return rows


# --- best of n -----------------------------------------------------------------------------------------------------


def best_of_n(answers: Sequence[Row], label: LabelBlock) -> dict[str, Any]:
    """The expected score of the best of n answers against the bound on its KL to the policy, for the manifest.

    n = 1, 2, 4, ... and `label.answers`. Over the prompts all of whose answers have a score, so that every n is about
    the same prompts; answers that were cut off are among them.
    """
    groups = [
        as_tensor([row["score"] for row in answers[start : start + label.answers]])
        for start in range(0, len(answers), label.answers)
    ]
    whole = [scores for scores in groups if not scores.isnan().any()]
    sizes = [n for n in (2**i for i in range(label.answers.bit_length())) if n < label.answers] + [label.answers]
    curve = []
    for n in sizes if whole else []:
        expected, bound = bon_expected(torch.stack(whole), n=n).mean(), bon_kl(torch.tensor(n, dtype=torch.float64))
        curve.append({"n": n, "score": float(expected), "kl_bound": float(bound)})
    return {"prompts": len(whole), "curve": curve}
