"""What the command hands to the process that measures one case."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Spec:
    """One case under one number of threads. It travels as a JSON file."""

    case: str  # its name; `prepare` makes the models
    threads: int
    rounds: int
    raw: bool
    work: str
    out: str  # where the result goes
    dtype: str = "fp32"
    hh: str | None = None
    gsm8k: str | None = None
    trl: str | None = None  # folder that TRL was installed into, where it is not in the environment

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Spec:
        """What `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))
