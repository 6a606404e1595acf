"""Pairs of the embedded task that are unlike those that were learned from, to see how far a reward model carries.

Two things can be new. Prompts: their openings are about music instead of films, in words that no file of the task has.
Answers: another writer denies most of what he says, and seldom says two things at once. Labels are the gold reward's,
which reads a prompt as it was before its words were exchanged.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.data.demo import gold_reward, pairs
from rlhf.data.grammar import EDGES, LEXICON, RULES, Rules, compile_rules, render, tokenize

# How often the other writer chooses each kind of verdict, in the order of RULES["VERDICT"]; the second is a denial.
HABITS = (1.0, 12.0, 1.0, 1.0, 1.0)
OTHER_RULES: Rules = {
    **RULES,
    "VERDICT": tuple((often, text) for often, (_, text) in zip(HABITS, RULES["VERDICT"], strict=True)),
}
OTHER_EDGES, _ = compile_rules(OTHER_RULES)
MUSIC = {
    "ASPECT": "bass chorus drums flute guitar harmony lyrics melody rhythm singer tempo trumpet violin",
    "FILM": "album anthem ballad concert hymn opera podcast serenade symphony waltz",
    "SAW": "downloaded heard hummed played replayed taped",
    "SPOT": "arena basement church garage meadow pub stadium tavern",
    "WHO": "coach dentist grandfather landlady niece pupil stepmother trainer",
    "JOB": "astronaut blacksmith butcher clerk ghost magician plumber tailor waiter",
    "TRAIT": "brave drunken jealous nameless sleepless tattooed",
}
# A word of the film world -> the one that takes its place in a prompt.
EXCHANGED = {
    old: words[number % len(words)]
    for kind, line in MUSIC.items()
    for words in [line.split()]
    for number, old in enumerate(LEXICON[kind])
}


@dataclass(frozen=True)
class Shift:
    """What is new about a file of pairs, and whether its labels are free of noise."""

    prompts: bool = False
    answers: bool = False
    true: bool = False


SHIFTS = {
    "shift_prompts": Shift(prompts=True),
    "shift_answers": Shift(answers=True),
    "shift_both": Shift(prompts=True, answers=True),
    "true_pairs": Shift(true=True),
    "true_shift_prompts": Shift(prompts=True, true=True),
    "true_shift_answers": Shift(answers=True, true=True),
    "true_shift_both": Shift(prompts=True, answers=True, true=True),
}
ROWS = 1000


def about_music(prompt: str) -> str:
    """The same prompt with every word that has a counterpart in `EXCHANGED` exchanged."""
    return render(EXCHANGED[word] if word in EXCHANGED else word for word in tokenize(prompt))


def shifted(shift: Shift, rng: random.Random) -> Iterator[dict[str, str]]:
    """An endless stream of pairs with held-out prompts, labelled like `demo.pairs`, or by the higher gold reward.

    Without noise, answers that the gold reward holds equal make no pair.
    """
    for row in pairs(rng, evaluation=True, edges=OTHER_EDGES if shift.answers else EDGES):
        prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
        if shift.true:
            better, worse = gold_reward(prompt, chosen), gold_reward(prompt, rejected)
            if better == worse:
                continue
            chosen, rejected = (chosen, rejected) if better > worse else (rejected, chosen)
        shown = about_music(prompt) if shift.prompts else prompt
        if shift.prompts and shown == prompt:
            continue
        yield {"prompt": shown, "chosen": chosen, "rejected": rejected}


@functools.cache
def shift_rows(name: str, seed: int = 0, count: int = ROWS) -> list[dict[str, str]]:
    """The rows of one file, no two of them equal: a function of its arguments alone.

    A `true_` file has the pairs of the file without that word, as far as it has them, and the labels without noise.
    """
    distinct: dict[tuple[str, ...], dict[str, str]] = {}
    drawn = {"true_pairs": "eval_pairs"}.get(name, name.removeprefix("true_"))
    for row in shifted(SHIFTS[name], random.Random(f"{seed}/{drawn}")):
        if len(distinct) == count:
            break
        distinct.setdefault(tuple(row.values()), row)
    return list(distinct.values())
