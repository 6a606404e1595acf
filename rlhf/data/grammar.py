"""A small regular grammar of film reviews, compiled to a weighted automaton over words.

    we watched this western at the festival in march, and the script was really sharp, but i disliked the ending.

The automaton answers everything the demo asks of the language: does a text belong to it, how does a given beginning go
on (sampling), and what is the best that can still be reached from a beginning (the optimum of the gold reward).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LEXICON: dict[str, tuple[str, ...]] = {
    "GOOD": _words(
        "brilliant charming clever delightful elegant funny gripping inventive lively moving polished sharp stunning "
        "superb tender warm"
    ),
    "BAD": _words(
        "awful bland boring clumsy confused dreary dull feeble forced hollow painful predictable shallow sloppy stale "
        "weak"
    ),
    "PLAIN": _words("busy dark familiar long modern quiet simple strange"),
    "LOVED": _words("admired adored enjoyed liked loved praised"),
    "HATED": _words("despised disliked hated loathed mocked regretted"),
    "NOTICED": _words("followed noticed remembered studied"),
    "MORE": _words("deeply really remarkably truly very"),
    "LESS": _words("fairly mildly rather somewhat"),
    "MUCH": _words("deeply really truly"),
    "LITTLE": _words("mildly rather"),
    "NEG": _words("never not"),
    "SAME": _words("and"),
    "CONTRAST": _words("but though yet"),
    "WAS": _words("felt looked seemed sounded was"),
    "ASPECT": _words(
        "acting action camera cast costumes dialogue direction editing ending finale hero humour lighting music "
        "opening pace photography plot romance scenery score script sound story villain voices"
    ),
    "FILM": _words(
        "adventure biography cartoon comedy documentary drama fantasy musical mystery romance sequel thriller tragedy "
        "western"
    ),
    "WHO": _words(
        "aunt boss brother colleague cousin daughter father friend grandmother neighbour nephew roommate sister son "
        "teacher uncle"
    ),
    "SAW": _words("borrowed caught rented saw streamed watched"),
    "SPOT": _words(
        "airport bar cabin campus castle cinema club festival gallery hall hostel hotel library museum office school "
        "station theatre village"
    ),
    "DAY": _words("monday tuesday wednesday thursday friday saturday sunday"),
    "MONTH": _words("january february march april may june july august september october november december"),
    "SEASON": _words("autumn month night spring summer week weekend winter year"),
    "TRAIT": _words("blind curious famous homeless lonely nervous proud retired rich shy stubborn wounded young"),
    "JOB": _words(
        "baker banker boxer chef dancer detective doctor driver farmer fisherman gardener journalist judge lawyer "
        "mechanic nurse painter pianist pilot poet sailor soldier spy thief widow"
    ),
    "TOWN": _words("capital colony desert forest harbour jungle monastery mountain port prison suburb valley"),
}

# A rule is its weighted alternatives. Upper case names a rule or a class of LEXICON, lower case stands for itself, and
# a trailing ? means that half of the time the item is left out.
Rules = Mapping[str, tuple[tuple[float, str], ...]]
RULES: Rules = {
    "REVIEW": (
        (3, "SETTING , LINK VERDICT ."),
        (4, "SETTING , LINK VERDICT , LINK VERDICT ."),
        (2, "VERDICT , LINK VIEWING , LINK VERDICT ."),
        (1, "VERDICT , LINK VERDICT ."),
        (1, "VERDICT , LINK VERDICT , LINK VERDICT ."),
    ),
    "SETTING": (
        (3, "VIEWING"),
        (2, "this FILM follows a PERSON PERIL"),
        (1, "in this FILM a PERSON meets a PERSON"),
    ),
    "VIEWING": (
        (2, "we SAW this FILM PLACE"),
        (2, "my WHO SAW this FILM PLACE"),
        (1, "i SAW this FILM with my WHO WHEN"),
    ),
    "PLACE": ((2, "at the SPOT WHEN"), (1, "near the SPOT with my WHO")),
    "WHEN": ((1, "on DAY"), (1, "in MONTH"), (1, "last SEASON")),
    "PERSON": ((1, "TRAIT JOB"),),
    "PERIL": ((1, "in a TOWN"), (1, "through a TOWN"), (1, "and a JOB")),
    "VERDICT": (
        (3, "the ASPECT WAS DEGREE? QUALITY"),
        (1, "the ASPECT WAS NEG DEGREE? QUALITY"),
        (2, "the ASPECT WAS DEGREE? QUALITY SAME QUALITY"),
        (2, "i MANNER? FEELING the ASPECT"),
        (1, "the ASPECT SAME the ASPECT were DEGREE? QUALITY"),
    ),
    "DEGREE": ((2, "MORE"), (1, "LESS")),
    "MANNER": ((2, "MUCH"), (1, "LITTLE")),
    "QUALITY": ((1, "GOOD"), (1, "BAD"), (1, "PLAIN")),
    "FEELING": ((1, "LOVED"), (1, "HATED"), (1, "NOTICED")),
    "LINK": ((3, "SAME"), (2, "CONTRAST")),
}

POLARITY: dict[str, int] = {"GOOD": 1, "LOVED": 1, "BAD": -1, "HATED": -1, "PLAIN": 0, "NOTICED": 0}
_IN_MOOD, _NEUTRAL, _AGAINST = 0.80, 0.12, 0.08  # how often a verdict says what the writer's mood says

State = int
START: State = 0


@dataclass(frozen=True)
class Edge:
    """One step of the automaton: any word of `kind` leads on to `to`. The weights of a state's edges sum to 1."""

    kind: str
    words: tuple[str, ...]
    weight: float
    to: State


def compile_rules(rules: Rules) -> tuple[list[list[Edge]], frozenset[State]]:
    """The automaton of `rules` and its accepting states. The grammar does not recurse, so every path is finite.

    States are numbered by the order of items: rules that differ in their weights alone have the same states.
    """
    edges: list[list[Edge]] = [[]]

    def extend(item: str, ends: dict[State, float]) -> dict[State, float]:
        """The states reached by `item` from `ends`; a state's value is the probability still owed to its next edge."""
        if item.endswith("?"):
            skipped = {state: weight / 2 for state, weight in ends.items()}
            return extend(item[:-1], skipped) | skipped
        if item in rules:
            reached: dict[State, float] = {}
            total = sum(weight for weight, _ in rules[item])
            for weight, alternative in rules[item]:
                current = {state: owed * weight / total for state, owed in ends.items()}
                for part in alternative.split():
                    current = extend(part, current)
                reached |= current
            return reached
        edges.append([])
        for state, owed in ends.items():
            edges[state].append(Edge(item, LEXICON[item] if item in LEXICON else (item,), owed, len(edges) - 1))
        return {len(edges) - 1: 1.0}

    return edges, frozenset(extend("REVIEW", {START: 1.0}))


EDGES, ACCEPTING = compile_rules(RULES)
VOCABULARY: frozenset[str] = frozenset(word for edges in EDGES for edge in edges for word in edge.words)


def render(words: Iterable[str]) -> str:
    """Words as text: single spaces, none before a comma or a full stop."""
    return re.sub(r" (?=[,.])", "", " ".join(words))


def tokenize(text: str) -> list[str]:
    """Words, commas and full stops of a text; the inverse of `render` on texts of the grammar."""
    return re.findall(r"[^\s,.]+|[,.]", text)


def reach(words: Iterable[str], edges: list[list[Edge]] = EDGES) -> dict[State, float]:
    """Where a beginning may stand in the automaton, with probabilities (unnormalised); empty if no review begins so."""
    states = {START: 1.0}
    for word in words:
        following: dict[State, float] = {}
        for state, probability in states.items():
            for edge in edges[state]:
                if word in edge.words:
                    share = probability * edge.weight / len(edge.words)
                    following[edge.to] = following[edge.to] + share if edge.to in following else share
        states = following
    return states


def parses(text: str) -> bool:
    """Whether a text is exactly one complete review of the grammar, spacing included."""
    words = tokenize(text)
    return render(words) == text and any(state in ACCEPTING for state in reach(words))


def _pick(weights: list[float], rng: random.Random) -> int:
    """An index with probability proportional to its weight, the same on every Python version."""
    left = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        left -= weight
        if left < 0:
            return index
    return len(weights) - 1


def _mood_weight(edge: Edge, mood: int) -> float:
    if edge.kind not in POLARITY:
        return edge.weight
    agreement = POLARITY[edge.kind] * mood
    return edge.weight * (_IN_MOOD if agreement > 0 else _AGAINST if agreement < 0 else _NEUTRAL)


def go_on(beginning: list[str], rng: random.Random, edges: list[list[Edge]] = EDGES) -> list[str]:
    """A random continuation of `beginning` up to the full stop.

    The writer has a good or a bad mood, drawn anew here: it decides most verdicts, `but` turns it over, and a negation
    turns over the one word that it applies to. Continuations of one beginning therefore differ much in sentiment.
    edges: the automaton that the writer goes by.
    """
    states = reach(beginning, edges)
    state = list(states)[_pick(list(states.values()), rng)]
    mood, sign, words = 1 if rng.random() < 0.5 else -1, 1, []
    while state not in ACCEPTING:
        edge = edges[state][_pick([_mood_weight(edge, mood * sign) for edge in edges[state]], rng)]
        words.append(edge.words[int(rng.random() * len(edge.words))])
        sign = -1 if edge.kind == "NEG" else 1 if edge.kind in POLARITY else sign
        mood = -mood if edge.kind == "CONTRAST" else mood
        state = edge.to
    return words
