"""What became of the rows: read, kept, dropped and changed, each with its reason; and the tokens they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class SourceReport:
    """The counts of one source."""

    key: str  # its place in the recipe
    path: str
    format: str
    fingerprint: str
    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def line(self) -> str:
        """One line for the log."""
        parts = [f"{self.read} rows read", f"{self.kept} kept"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.most_common()]
        parts += [f"{count} changed ({reason})" for reason, count in self.changed.most_common()]
        return f"{self.key}: {self.path}: {self.format}, {', '.join(parts)}"


@dataclass(frozen=True)
class TokenCounts:
    """How long the training rows are."""

    rows: int
    tokens: int
    trained: int  # tokens that count in the loss; 0 where prompts are all there is
    longest: int

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, int]]) -> TokenCounts:
        """lengths: (tokens, trained tokens) of every row."""
        pairs = list(lengths)
        return cls(
            len(pairs),
            sum(tokens for tokens, _ in pairs),
            sum(trained for _, trained in pairs),
            max((tokens for tokens, _ in pairs), default=0),
        )

    def line(self) -> str:
        """One line for the log."""
        mean = self.tokens / max(1, self.rows)
        trained = f", {100 * self.trained / max(1, self.tokens):.0f} % of them trained" if self.trained else ""
        return f"{self.tokens:,} tokens in {self.rows} rows (mean {mean:.0f}, longest {self.longest}){trained}"


@dataclass(frozen=True)
class DataReport:
    """What a stage's data came to."""

    sources: list[SourceReport]
    train: TokenCounts
    eval: TokenCounts

    def lines(self) -> list[str]:
        """For the log."""
        held_out = [f"held out: {self.eval.line()}"] if self.eval.rows else []
        return [*(source.line() for source in self.sources), f"training: {self.train.line()}", *held_out]

    def as_dict(self) -> dict[str, Any]:
        """For provenance.json."""
        sources = [{**vars(s), "dropped": dict(s.dropped), "changed": dict(s.changed)} for s in self.sources]
        return {"sources": sources, "train": vars(self.train), "eval": vars(self.eval)}
