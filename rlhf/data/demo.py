"""The embedded task: film reviews from a grammar, with a known gold reward, and pairs that it labelled with noise.

A prompt is the first words of a review, an answer is the rest. The gold reward adds up what the review says, with
diminishing returns; an answer that leaves the grammar gets the worst reward. Preference pairs are drawn from the gold
reward by Bradley-Terry, so that even a perfect reward model agrees with them only as often as `bayes_accuracy` says.
Lists of answers are ordered by Plackett-Luce in the same way.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.grammar import (
    ACCEPTING,
    EDGES,
    LEXICON,
    POLARITY,
    VOCABULARY,
    Edge,
    State,
    go_on,
    parses,
    reach,
    render,
    tokenize,
)

CAP = 4.0  # the gold reward lies in [-CAP, CAP]
SOFTNESS = 2.0  # the sum of verdicts at which the reward has reached 76 % of CAP
FLOOR = -CAP  # the reward of an answer that does not complete a review of the grammar
DEGREES = {word: degree for kind, degree in (("MORE", 1.5), ("LESS", 0.5)) for word in LEXICON[kind]}
NEGATED = -0.5  # "not dull" is worth less than "clever"
VALUES = {word: value for kind, value in POLARITY.items() for word in LEXICON[kind]}

JUDGE_TEMPLATE = (
    "Rate this review from 0 to 5.\n{prompt}{answer}\n"  # short: a review takes half of the model's positions
)
_BEST_SCORE = 5

_DAMAGED = 0.1  # share of candidate answers that are damaged, so that pairs also tell grammar from its ruins
_HELD_OUT = 0.2  # share of all prompts that no training file contains
_PROMPT_WORDS = (4, 9)
_ANSWERS = 4  # of a list
_ALL_WORDS = sorted(VOCABULARY)


@dataclass(frozen=True)
class DemoSizes:
    """Rows of the generated files."""

    sft: int = 6000
    pairs: int = 6000
    prompts: int = 2000
    eval_prompts: int = 256
    eval_pairs: int = 1000
    lists: int = 3000
    eval_lists: int = 500
    judgements: int = 6000
    eval_judgements: int = 500


# --- the gold reward -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Modifier:
    """What stands before the next word and changes its value."""

    negated: bool = False
    degree: float = 1.0


_PLAIN = _Modifier()


def _read(word: str, before: _Modifier) -> tuple[float, _Modifier]:
    """The value of a word after its modifiers, and the modifiers of the next word."""
    if word in LEXICON["NEG"]:
        return 0.0, _Modifier(True, before.degree)
    if word in DEGREES:
        return 0.0, _Modifier(before.negated, DEGREES[word])
    if word not in VALUES:
        return 0.0, _PLAIN
    return VALUES[word] * before.degree * (NEGATED if before.negated else 1.0), _PLAIN


def sentiment(words: Iterable[str]) -> float:
    """The sum of the verdicts: +-1 per word of praise or blame, x 1.5 or 0.5 by degree, x -0.5 after a negation.

    A word that was used before adds nothing, so that repeating one word is not a way to please.
    """
    total, before, used = 0.0, _PLAIN, set()
    for word in words:
        value, before = _read(word, before)
        total += 0.0 if word in used else value
        if word in VALUES:
            used.add(word)
    return total


def _reward(total: float) -> float:
    return CAP * math.tanh(total / SOFTNESS)


def join(prompt: str, completion: str) -> str:
    """Prompt and answer as one text; a space is put between them where the answer has none and needs one."""
    completion = completion.strip()
    return f"{prompt}{completion}" if completion[:1] in {",", "."} else f"{prompt} {completion}"


def gold_reward(prompt: str, completion: str) -> float:
    """4 tanh(sentiment / 2) of the whole review, -4 where prompt and completion together are not a review."""
    text = join(prompt, completion)
    return _reward(sentiment(tokenize(text))) if parses(text) else FLOOR


@functools.cache
def _most(state: State, before: _Modifier) -> float:
    """The largest sum of verdicts that can still be added from a state of the grammar.

    Words of a kind are worth the same, and every kind has more words than a review has verdicts, so that the rule on
    repeated words never binds: the maximum is exact, and one word per kind is enough to look at.
    """
    if state in ACCEPTING:
        return 0.0
    best = -math.inf
    for edge in EDGES[state]:
        value, after = _read(edge.words[0], before)
        best = max(best, value + _most(edge.to, after))
    return best


def optimum(prompt: str) -> float:
    """The largest gold reward of any answer to `prompt`; FLOOR where no review begins so."""
    words, before = tokenize(prompt), _PLAIN
    for word in words:
        _, before = _read(word, before)
    states = reach(words)
    if not states:
        return FLOOR
    return _reward(sentiment(words) + max(_most(state, before) for state in states))


# --- prompts, answers and pairs ------------------------------------------------------------------------------------


def held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out files: a fixed share of all prompts, by hash."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 256 * _HELD_OUT


def _below(limit: int, rng: random.Random) -> int:
    return int(rng.random() * limit)


def _cut(words: list[str], rng: random.Random) -> tuple[str, str]:
    """A review cut into prompt and completion; the completion starts with the space or comma that joins them."""
    low, high = _PROMPT_WORDS
    prompt = render(words[: low + _below(high - low + 1, rng)])
    return prompt, render(words)[len(prompt) :]


def reviews(rng: random.Random, *, evaluation: bool) -> Iterator[tuple[str, str]]:
    """An endless stream of (prompt, completion), all held out or none."""
    while True:
        prompt, completion = _cut(go_on([], rng), rng)
        if held_out(prompt) == evaluation:
            yield prompt, completion


def _one_clause_more(words: list[str], rng: random.Random) -> list[str]:
    other = go_on([], rng)
    last_comma = len(other) - 1 - other[::-1].index(",")
    return words[:-1] + other[last_comma:]


def _damage(words: list[str], rng: random.Random) -> list[str]:
    """The same words with one thing wrong, of the kinds that policies get wrong. By chance it may still be a review.

    A clause too many (what a policy adds to please), a word missing, a wrong word.
    """
    at, kind = _below(len(words) - 1, rng), _below(4, rng)
    if kind <= 1:
        return _one_clause_more(words, rng)
    wrong = [_ALL_WORDS[_below(len(_ALL_WORDS), rng)]]
    return words[:at] + (wrong if kind == 2 else []) + words[at + 1 :]


def _answer(prompt: str, rng: random.Random, edges: list[list[Edge]] = EDGES) -> str:
    """A random answer to a prompt, now and then a damaged one."""
    beginning = tokenize(prompt)
    rest = go_on(beginning, rng, edges)
    if rng.random() < _DAMAGED:
        rest = _damage(rest, rng)
    return render(beginning + rest)[len(prompt) :]


def preference(better: float, worse: float) -> float:
    """The probability that a labeller with the gold reward prefers the first of two rewards (Bradley-Terry)."""
    return 1.0 / (1.0 + math.exp(worse - better))


def pairs(rng: random.Random, *, evaluation: bool, edges: list[list[Edge]] = EDGES) -> Iterator[dict[str, str]]:
    """An endless stream of prompts with two different answers, labelled by Bradley-Terry on the gold reward.

    edges: the automaton that the writer of the answers goes by; prompts are always the task's own.
    """
    for prompt, _ in reviews(rng, evaluation=evaluation):
        first, second = _answer(prompt, rng, edges), _answer(prompt, rng, edges)
        if first == second:
            continue
        if rng.random() >= preference(gold_reward(prompt, first), gold_reward(prompt, second)):
            first, second = second, first
        yield {"prompt": prompt, "chosen": first, "rejected": second}


def lists(rng: random.Random, *, evaluation: bool) -> Iterator[dict[str, Any]]:
    """An endless stream of prompts with four different answers, scored by gold reward + standard Gumbel noise.

    The order of such scores is Plackett-Luce, and of any two of them Bradley-Terry, on the gold reward [Yellott 1977].
    """
    for prompt, _ in reviews(rng, evaluation=evaluation):
        answers = [_answer(prompt, rng) for _ in range(_ANSWERS)]
        if len(set(answers)) == _ANSWERS:
            noise = [-math.log(-math.log((_below(2**32, rng) + 0.5) / 2**32)) for _ in answers]
            scores = [round(gold_reward(prompt, answer) + n, 4) for answer, n in zip(answers, noise, strict=True)]
            yield {"prompt": prompt, "answers": answers, "scores": scores}


def bayes_accuracy(rows: Iterable[dict[str, str]]) -> float:
    """Mean max(p, 1 - p): the accuracy on these pairs that no reward model can beat in expectation."""
    chances = [
        preference(gold_reward(row["prompt"], row["chosen"]), gold_reward(row["prompt"], row["rejected"]))
        for row in rows
    ]
    return sum(max(p, 1 - p) for p in chances) / len(chances)


def score_of(gold: float) -> int:
    """A gold reward as a score from 0 to 5: six equal parts of its range."""
    return min(_BEST_SCORE, int((gold + CAP) / (2 * CAP) * (_BEST_SCORE + 1)))


def reasons(text: str) -> str:
    """What a judgement of a review says before the score: a sign per word that counts, `?` where it is no review."""
    if not parses(text):
        return "?"
    words = tokenize(text)
    totals = [sentiment(words[:end]) for end in range(len(words) + 1)]
    signs = ["+" if after > before else "-" for before, after in itertools.pairwise(totals) if after != before]
    return " ".join(signs) or "0"


def judgements(rng: random.Random, *, evaluation: bool) -> Iterator[dict[str, str]]:
    """An endless stream of answers to be judged, and the judgement: what a policy learns to judge itself from."""
    for prompt, _ in reviews(rng, evaluation=evaluation):
        answer = _answer(prompt, rng)
        asked = JUDGE_TEMPLATE.replace("{prompt}", prompt).replace("{answer}", answer)
        score = score_of(gold_reward(prompt, answer))
        yield {"prompt": asked, "completion": f"{reasons(join(prompt, answer))} Score: {score}"}


# --- the files -----------------------------------------------------------------------------------------------------


def _endless(name: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    evaluation = name.startswith("eval_")
    if name.endswith("lists"):
        return lists(rng, evaluation=evaluation)
    if name.endswith("pairs"):
        return pairs(rng, evaluation=evaluation)
    if name.endswith("judgements"):
        return judgements(rng, evaluation=evaluation)
    stream = reviews(rng, evaluation=evaluation)
    if name == "sft":
        return ({"prompt": prompt, "completion": completion} for prompt, completion in stream)
    return ({"prompt": prompt} for prompt, _ in stream)


def demo_rows(name: str, seed: int = 0, sizes: DemoSizes = DemoSizes()) -> list[dict[str, Any]]:
    """The rows of one file of the task, no two of them equal: a function of its arguments alone.

    sft (prompt, completion), pairs (prompt, chosen, rejected), lists (prompt, answers, scores), prompts, judgements
    (prompt, completion), and held out from these by prompt whatever the seeds: eval_prompts, eval_pairs, eval_lists,
    eval_judgements.
    """
    count = vars(sizes)[name]
    distinct: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in _endless(name, random.Random(f"{seed}/{name}")):
        if len(distinct) == count:
            break
        distinct.setdefault(tuple(map(str, row.values())), row)
    return list(distinct.values())


def write_demo_data(folder: Path, seed: int = 0, sizes: DemoSizes = DemoSizes()) -> dict[str, Path]:
    """Write every file of the task as FOLDER/NAME.jsonl and return the paths; the same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in vars(sizes)}
    for name, path in paths.items():
        lines = [json.dumps(row) + "\n" for row in demo_rows(name, seed, sizes)]
        path.write_text("".join(lines), encoding="utf-8")
    return paths
