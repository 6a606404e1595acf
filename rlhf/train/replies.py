"""What judges have replied, kept in the run directory so that nothing is asked twice."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf.engine import dist
from rlhf.rewards.chat_service import Reply
from rlhf.run import commit


def digest(value: Any) -> str:
    """A name for a plain value, by its content."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class ReplyCache:
    """Replies by the content of what was asked: one file per judge, a line per reply. Only rank 0 reads and writes.

    made_by: what makes the judge this one. counts: replies so far that were `asked` for, and that were `cached`.
    """

    def __init__(self, folder: Path, made_by: Sequence[Any]) -> None:
        self.path = folder / f"judge-{digest(list(made_by))[:16]}.jsonl"
        self.counts: Counter[str] = Counter(asked=0, cached=0)
        self._replies: dict[str, Reply] = {}
        if dist.is_main() and self.path.exists():
            rows, content = commit.read_jsonl(self.path), self.path.read_bytes()
            if not content.endswith(b"\n"):  # a line that a crash has cut short: the next one begins behind it
                commit.write_atomic(self.path, content[: content.rfind(b"\n") + 1])
            self._replies = {row["key"]: Reply(row["text"], row["logprobs"]) for row in rows}

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    def add(self, key: str, reply: Reply) -> None:
        """Keep a reply, at once: what has come is there after a crash."""
        self._replies[key] = reply
        self.path.parent.mkdir(parents=True, exist_ok=True)
        commit.append_jsonl(self.path, {"key": key, "text": reply.text, "logprobs": reply.logprobs})
