"""What judges say, as numbers: verdicts read off replies, both orders of a comparison as one, counts by reason.

A verdict is the share that goes to the answer shown first (1, 0, or 1/2 for a tie), a score from 0 to 5, or, where
there is none, the reason as a word.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.rewards.patterns import searching

UNPARSABLE, MISSING, TOO_LONG = "unparsable", "missing", "too_long"
DECIDED, TIES, DISAGREED = "decided", "ties", "disagreed"
BEST_SCORE = 5

Verdict = float | str
Row = dict[str, Any]  # of answers.jsonl
_SHARES = {"1": 1.0, "2": 0.0, "tie": 0.5}


def fill(template: str, texts: Mapping[str, str]) -> str:
    """A template with texts in the places of {their names}. Braces in the texts stay what they are."""
    return re.sub("|".join(re.escape(f"{{{name}}}") for name in texts), lambda match: texts[match[0][1:-1]], template)


# --- one reply --------------------------------------------------------------------------------------------------------


def preference(reply: str, pattern: str) -> Verdict:
    """The share of the answer shown first, by the pattern's last match."""
    found = _last(reply, pattern)
    return _SHARES[found[1].lower()] if found is not None and found[1].lower() in _SHARES else UNPARSABLE


def points(reply: str, pattern: str) -> Verdict:
    """A score from 0 to 5, by the pattern's last match."""
    found = _last(reply, pattern)
    try:
        score = math.nan if found is None else float(found[1])
    except ValueError:
        return UNPARSABLE
    return score if 0 <= score <= BEST_SCORE else UNPARSABLE


def share(logprobs: Any, pattern: str) -> Verdict:
    """p(1) / (p(1) + p(2)) of the token in which the pattern's last match begins to say which.  [arXiv:2309.00267 2.1]

    logprobs: [{"token", "top_logprobs": [{"token", "logprob"}]}], the tokens of the whole reply.
    """
    try:
        tokens = [str(each["token"]) for each in logprobs]
        found = _last("".join(tokens), pattern)
        if found is None or found.start(1) < 0:
            return UNPARSABLE
        at, place = 0, found.start(1)
        while place >= len(tokens[at]):
            place -= len(tokens[at])
            at += 1
        before, chances = tokens[at][:place], {"1": 0.0, "2": 0.0}
        for each in logprobs[at]["top_logprobs"]:
            said = str(each["token"])[len(before) :].strip()
            if str(each["token"]).startswith(before) and said in chances:
                chances[said] += math.exp(min(0.0, float(each["logprob"])))
    except (TypeError, KeyError, ValueError):
        return UNPARSABLE
    total = sum(chances.values())
    return chances["1"] / total if total > 0 and all(chances.values()) else UNPARSABLE


def _last(reply: str, pattern: str) -> re.Match[str] | None:
    found = None
    with searching(pattern, "judge.verdict"):
        for found in re.finditer(pattern, reply):  # noqa: B007  the last one counts: quoted answers come before
            pass
    return found if found is not None and found[1] is not None else None


# --- comparisons ------------------------------------------------------------------------------------------------------


def both_orders(shown_first: Verdict, shown_second: Verdict, *, soft: bool) -> tuple[float | None, str]:
    """(share of an answer against another, why), from what was said when it was shown first and when second.

    Verdicts count where both orders agree; a tie in one of them, or a disagreement, is a tie. Soft ones are averaged,
    1/2 (a + 1 - b). What is missing in one order leaves the comparison out: None.
    """
    if isinstance(shown_first, str) or isinstance(shown_second, str):
        return None, MISSING if MISSING in (shown_first, shown_second) else UNPARSABLE
    if soft:
        mean = (shown_first + 1 - shown_second) / 2
        return mean, TIES if mean == 0.5 else DECIDED
    if 0.5 in (shown_first, shown_second):
        return 0.5, TIES
    return (shown_first, DECIDED) if shown_first == 1 - shown_second else (0.5, DISAGREED)


def comparison(other: int, shown_first: Verdict, shown_second: Verdict, *, soft: bool) -> Row:
    """What an answer's row says of its comparison with a later one to the same prompt, by number."""
    share, outcome = both_orders(shown_first, shown_second, soft=soft)
    return {"with": other, "verdicts": [shown_first, shown_second], "share": share, "outcome": outcome}


def shares(group: Sequence[Row]) -> dict[tuple[int, int], float]:
    """(i, j), answers to one prompt -> share of i against j, in both directions; not of comparisons left out."""
    found = {(i, said["with"]): said["share"] for i, row in enumerate(group) for said in row["comparisons"]}
    found = {pair: share for pair, share in found.items() if share is not None}
    return found | {(j, i): 1 - share for (i, j), share in found.items()}


def win_rate(number: int, found: Mapping[tuple[int, int], float]) -> float | None:
    """Mean share of an answer over its comparisons: comparisons won, ties half. None where it has none."""
    own = [share for (i, _), share in found.items() if i == number]
    return statistics.fmean(own) if own else None


def mean_score(votes: Iterable[Verdict]) -> float | None:
    """Mean of the votes that could be read; None where there is none."""
    read = [vote for vote in votes if not isinstance(vote, str)]
    return statistics.fmean(read) if read else None


def decided_pairs(
    group: Sequence[Row], scored: Sequence[int], min_margin: float
) -> tuple[list[tuple[int, int]], Counter[str]]:
    """(better, worse) of every decided comparison of the `scored` answers to a prompt, and why others are left out.

    Decided means: the shares of the two differ by more than min_margin. Answers that were not compared are equal texts.
    """
    if len(scored) < 2:
        return [], Counter(too_few_scored=1)
    said = {(i, each["with"]): each["share"] for i, row in enumerate(group) for each in row["comparisons"]}
    pairs: list[tuple[int, int]] = []
    left_out: Counter[str] = Counter()
    for i, j in itertools.combinations(scored, 2):
        if (i, j) not in said:
            left_out["equal_texts"] += 1
        elif (share := said[i, j]) is None:
            left_out["unjudged"] += 1
        elif share == 0.5:
            left_out["ties"] += 1
        elif abs(2 * share - 1) <= min_margin:
            left_out["close"] += 1
        else:
            pairs.append((i, j) if share > 0.5 else (j, i))
    return pairs, left_out


def judged_columns(group: Sequence[Row], better: int, worse: int) -> Row:
    """What a pair's row says beside its scores where the answers were compared: win rates, and the share of the better.

    The share is None where the two were not compared with each other, or to no end.
    """
    if "comparisons" not in group[0]:
        return {}
    found = shares(group)
    return {
        "win_rate_chosen": win_rate(better, found),
        "win_rate_rejected": win_rate(worse, found),
        "share_chosen": found[better, worse] if (better, worse) in found else None,
    }


# --- counting ---------------------------------------------------------------------------------------------------------


def takes_part(row: Row, unfinished: str) -> bool:
    """Whether an answer is judged: one that is compared with nothing anyway is not, nor one that no data may hold."""
    return "\0" not in row["answer"] and (row["finished"] or unfinished == "keep")


def counted(answers: Iterable[Row]) -> Counter[str]:
    """How many comparisons or votes came to what, of rows with `comparisons` or `votes`."""
    found: Counter[str] = Counter()
    for row in answers:
        if "comparisons" in row:
            found.update(said["outcome"] for said in row["comparisons"])
        elif "votes" in row:
            found.update(vote if isinstance(vote, str) else "votes" for vote in row["votes"])
    return found


def metrics(answers: Sequence[Row]) -> dict[str, float]:
    """The verdicts of a step by what they came to; nothing where no judge was asked."""
    found = counted(answers)
    if "comparisons" in answers[0]:
        every = [verdict for row in answers for each in row["comparisons"] for verdict in each["verdicts"]]
        read = [verdict for verdict in every if not isinstance(verdict, str)]
        first = {"judge/first": statistics.fmean(read)} if read else {}
        return {
            "judge/decided": float(found[DECIDED]),
            "judge/ties": float(found[TIES]),
            "judge/disagreed": float(found[DISAGREED]),
            "judge/unparsable": float(found[UNPARSABLE]),
            "judge/missing": float(found[MISSING]),
            **first,
        }
    if "votes" in answers[0]:
        return {
            "judge/votes": float(found["votes"]),
            "judge/unparsable": float(found[UNPARSABLE]),
            "judge/missing": float(found[MISSING]),
            "judge/too_long": float(found[TOO_LONG]),
        }
    return {}
