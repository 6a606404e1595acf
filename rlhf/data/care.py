"""What preference data is like, before anything is learned from it: `rlhf data`.

The rows are those that training sees, through the same reading, limits and held-out rows; an observer (`Observer.see`)
remembers what they say. Numbers are of the training rows unless they are said to be of others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf.data.examples import Loaded, PairExample
from rlhf.data.filters import find_margin
from rlhf.data.formats import Kind, Record
from rlhf.data.keys import RowKey, row_key, sides
from rlhf.data.messages import as_text
from rlhf.data.near import Sketches
from rlhf.data.noise import LabelNoise, Share, label_noise, share

_EXAMPLES = 3
Identity = tuple[bytes, tuple[bytes, ...]]


@dataclass(frozen=True)
class Lengths:
    """In tokens."""

    median: float
    p95: float
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Lengths:
        median, p95 = np.percentile(lengths, (50, 95)).tolist()
        return cls(median, p95, max(lengths))


@dataclass(frozen=True)
class LengthBias:
    """Tokens of the chosen answer less tokens of the rejected one, over the pairs."""

    mean: float
    median: float
    longer_chosen: Share  # of the pairs whose answers are not equally long
    equally_long: int
    correlation: float  # of the difference with which answer is chosen, every pair taken in both orders
    with_margin: float | None  # correlation of the difference with the score margin, where all rows have one
    with_reward: float | None  # the same with a reward model's difference of scores
    examples: tuple[str, ...]  # the pairs whose chosen answer is longer by most


@dataclass(frozen=True)
class Finding:
    """Rows with something to look at."""

    name: str
    count: int
    total: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class NoiseFinding:
    """What a reward model says of the labels of some rows."""

    rows: str  # training or held out
    noise: LabelNoise
    examples: tuple[str, ...]  # where it disagrees most


@dataclass(frozen=True)
class Care:
    """Everything that `rlhf data` tells of rows."""

    kind: Kind
    train: int
    held_out: int
    lengths: dict[str, Lengths]
    bias: LengthBias | None
    findings: list[Finding]
    noise: list[NoiseFinding]


@dataclass
class Texts:
    """Texts by identity: the sketch of each, made once."""

    sketches: Sketches = field(default_factory=Sketches)
    numbers: dict[Hashable, int] = field(default_factory=dict)

    def add(self, identity: Hashable, text: str) -> None:
        if identity not in self.numbers:
            self.numbers[identity] = self.sketches.add(text)

    def near(self, identities: Iterable[Hashable], others: Iterable[Hashable] = ()) -> dict[Hashable, Hashable]:
        """identity -> one that is nearly the same: of `others`, else an earlier one of `identities`."""
        mine, theirs = (dict.fromkeys(self.numbers[each] for each in group) for group in (identities, others))
        names = {number: identity for identity, number in self.numbers.items()}
        return {names[a]: names[b] for a, b in self.sketches.near(list(mine), list(theirs)).items()}


class Observer:
    """Is told of every record while data is loaded; see `load_examples`."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.places: dict[int, str] = {}
        self.keys: dict[int, RowKey] = {}
        self.margins: dict[int, float] = {}
        self.prompts, self.rows = Texts(), Texts()
        self.fates: dict[str, list[str]] = defaultdict(list)  # reason or change -> the first few places
        self.same_words: list[str] = []

    def see(self, record: Record, row: int, fate: tuple[str, tuple[str, ...]]) -> None:
        """Remember a record; the texts of those that are dropped are not."""
        problem, changes = fate
        for reason in (problem, *changes):
            if reason and len(self.fates[reason]) < _EXAMPLES:
                self.fates[reason].append(record.where)
        key = row_key(record, self.kind)
        if self.kind == "pairs" and len(key.sides) == 2 and len(set(key.sides)) == 1:
            self.same_words.append(record.where)
        if problem:
            return
        self.places[row], self.keys[row] = record.where, key
        margin = find_margin(record) if self.kind == "pairs" else None
        if margin is not None:
            self.margins[row] = margin
        prompt = as_text(record.prompt)
        if key.prompt:
            self.prompts.add(key.prompt, prompt)
        if key.sides:
            self.rows.add(key.answers, "\n".join([prompt, *map(as_text, sides(record))]))


Scores = Mapping[int, tuple[float, float]]


def take_care(loaded: Loaded, seen: Observer, scores: Scores | None = None) -> Care:
    """The report on loaded rows. scores: row -> a reward model's scores of the chosen and the rejected answer."""
    train = [example.row for example in loaded.train]
    held_out = [example.row for example in loaded.eval]
    findings = [*_repeated(seen, train), *_overlap(seen, train, held_out), *_fates(loaded, seen)]
    bias = None
    noise: list[NoiseFinding] = []
    if seen.kind == "pairs":
        bias = _length_bias(loaded.train, seen, scores)
        findings = [*_contradictions(loaded, seen, train), *findings]
        noise = [*_noise(seen, "training", train, scores), *_noise(seen, "held out", held_out, scores)]
    return Care(seen.kind, len(train), len(held_out), _lengths(loaded, seen.kind), bias, findings, noise)


def _lengths(loaded: Loaded, kind: Kind) -> dict[str, Lengths]:
    if kind == "pairs":
        parts = {
            "prompt": [len(e.prompt_ids) for e in loaded.train],
            "chosen answer": [len(e.chosen_ids) for e in loaded.train],
            "rejected answer": [len(e.rejected_ids) for e in loaded.train],
        }
    else:
        parts = {"prompt" if kind == "prompts" else "row": [e.lengths()[0] for e in loaded.train]}
    return {name: Lengths.of(lengths) for name, lengths in parts.items()}


# --- length ----------------------------------------------------------------------------------------------------------


def _length_bias(pairs: Sequence[PairExample], seen: Observer, scores: Scores | None) -> LengthBias:
    differences = np.array([len(e.chosen_ids) - len(e.rejected_ids) for e in pairs], np.float64)
    rows = [e.row for e in pairs]
    longest = np.argsort(-differences, kind="stable")[:_EXAMPLES]
    rms = float(np.sqrt((differences**2).mean()))
    rewards = {row: chosen - rejected for row, (chosen, rejected) in (scores or {}).items()}
    return LengthBias(
        float(differences.mean()),
        float(np.median(differences)),
        share(int((differences > 0).sum()), int((differences != 0).sum())),
        int((differences == 0).sum()),
        # Both orders of a pair have means 0: the correlation of d and the label +-1 is E[d] / sqrt(E[d^2]).
        float(differences.mean()) / rms if rms else 0.0,
        _correlation(differences, rows, seen.margins),
        _correlation(differences, rows, rewards),
        tuple(f"{seen.places[rows[i]]} ({differences[i]:+.0f})" for i in longest if differences[i] > 0),
    )


def _correlation(differences: np.ndarray, rows: Sequence[int], values: Mapping[int, float]) -> float | None:
    """Pearson's, over the rows that have a value; None where too few have one or nothing varies."""
    known = [i for i, row in enumerate(rows) if row in values]
    x, y = differences[known], np.array([values[rows[i]] for i in known])
    return float(np.corrcoef(x, y)[0, 1]) if len(known) > 2 and x.std() and y.std() else None


# --- repetition ------------------------------------------------------------------------------------------------------


def _repeated(seen: Observer, train: Sequence[int]) -> list[Finding]:
    """Rows and prompts that came before, to the letter (up to white space) or nearly."""
    found = []
    if seen.kind != "prompts":
        found.append(_copies("rows equal to an earlier row", seen, {row: seen.keys[row] for row in train}, len(train)))
        identities: dict[int, Hashable] = {row: seen.keys[row].answers for row in train}
        found.append(_alike("rows nearly the same as an earlier row", seen, seen.rows, identities))
    prompts: dict[int, Hashable] = {row: seen.keys[row].prompt for row in train if seen.keys[row].prompt}
    if prompts:
        found.append(_copies("rows to an earlier row's prompt", seen, prompts, len(train)))
        found.append(_alike("rows to nearly the same prompt as an earlier row's", seen, seen.prompts, prompts))
    return found


def _copies(name: str, seen: Observer, keys: Mapping[int, Hashable], total: int) -> Finding:
    """Examples are the first rows of what comes most often."""
    counts = Counter(keys.values())
    first: dict[Hashable, int] = {}
    for row, key in keys.items():
        first.setdefault(key, row)
    often = [(key, count) for key, count in counts.most_common(_EXAMPLES) if count > 1]
    examples = tuple(f"{seen.places[first[key]]} ({count} times)" for key, count in often)
    return Finding(name, len(keys) - len(counts), total, examples)


def _alike(name: str, seen: Observer, texts: Texts, identities: Mapping[int, Hashable]) -> Finding:
    """Rows whose text is nearly that of an earlier row, but not to the letter."""
    near = texts.near(identities.values())
    first: dict[Hashable, int] = {}
    for row, identity in identities.items():
        first.setdefault(identity, row)
    rows = [row for row, identity in identities.items() if identity in near]
    examples = [f"{seen.places[row]} like {seen.places[first[near[identities[row]]]]}" for row in rows[:_EXAMPLES]]
    return Finding(name, len(rows), len(identities), tuple(examples))


def _overlap(seen: Observer, train: Sequence[int], held_out: Sequence[int]) -> list[Finding]:
    """Training rows and prompts that are held out too."""
    if not held_out:
        return []
    found = []
    both = [*train, *held_out]
    kinds: list[tuple[str, Texts, dict[int, Hashable]]] = []
    if seen.kind != "prompts":
        kinds.append(("rows that are", seen.rows, {row: seen.keys[row].answers for row in both}))
    if prompts := {row: seen.keys[row].prompt for row in both if seen.keys[row].prompt}:
        kinds.append(("rows whose prompt is", seen.prompts, dict(prompts)))
    for words, texts, identities in kinds:
        first: dict[Hashable, int] = {identities[row]: row for row in reversed(held_out) if row in identities}
        mine = {row: identities[row] for row in train if row in identities}
        near = texts.near([each for each in mine.values() if each not in first], first) if first else {}
        like = {row: first[identity] for row, identity in mine.items() if identity in first}
        nearly = {row: first[near[identity]] for row, identity in mine.items() if identity in near}
        for name, rows in ((f"{words} held out too", like), (f"{words} nearly the same as one held out", nearly)):
            shown = list(rows.items())[:_EXAMPLES]
            examples = tuple(f"{seen.places[row]} like {seen.places[other]}" for row, other in shown)
            found.append(Finding(name, len(rows), len(train), examples))
    return found


# --- contradiction ---------------------------------------------------------------------------------------------------


def _contradictions(loaded: Loaded, seen: Observer, train: Sequence[int]) -> list[Finding]:
    """Pairs with one answer on both sides, and the same two answers ranked both ways."""
    read = sum(report.read for report in loaded.report.sources)
    groups: dict[Identity, list[int]] = defaultdict(list)
    for row in train:
        groups[seen.keys[row].answers].append(row)
    both_ways = [rows for rows in groups.values() if len({seen.keys[row].sides for row in rows}) > 1]
    examples = [" and ".join(seen.places[row] for row in rows[:2]) for rows in both_ways[:_EXAMPLES]]
    return [
        Finding(
            "chosen equals rejected up to white space", len(seen.same_words), read, tuple(seen.same_words[:_EXAMPLES])
        ),
        Finding("the same two answers ranked both ways", sum(map(len, both_ways)), len(train), tuple(examples)),
    ]


def _fates(loaded: Loaded, seen: Observer) -> list[Finding]:
    """What was dropped or cut, by reason, over all sources."""
    found = []
    read = sum(report.read for report in loaded.report.sources)
    for word in ("dropped", "changed"):
        counts: Counter[str] = Counter()
        for report in loaded.report.sources:
            counts.update(getattr(report, word))
        for reason, count in counts.most_common():
            examples = tuple(seen.fates[reason]) if reason in seen.fates else ()
            found.append(Finding(f"{word}: {reason}", count, read, examples))
    return found


# --- label noise -----------------------------------------------------------------------------------------------------


def _noise(seen: Observer, name: str, rows: Sequence[int], scores: Scores | None) -> list[NoiseFinding]:
    known = [] if scores is None else [row for row in rows if row in scores]
    if not known or scores is None:
        return []
    differences = {row: scores[row][0] - scores[row][1] for row in known}
    worst = sorted(known, key=lambda row: differences[row])[:_EXAMPLES]
    examples = tuple(f"{seen.places[row]} ({differences[row]:+.3g})" for row in worst if differences[row] < 0)
    return [NoiseFinding(name, label_noise(list(differences.values())), examples)]
