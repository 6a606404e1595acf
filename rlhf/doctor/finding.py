"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. failed: a run would fail or be wrong; warning: only in some cases, which `fix` names."""

    check: str
    state: Literal["ok", "warning", "failed"]
    found: str
    fix: str | None = None

    @classmethod
    def of(cls, check: str, found: str, *, failed: str | None = None, warning: str | None = None) -> Finding:
        """Failed or a warning where a remedy is given, else ok."""
        state: Literal["ok", "warning", "failed"] = "failed" if failed else "warning" if warning else "ok"
        return cls(check, state, found, failed or warning)


def mebibytes(size: float) -> str:
    """A number of bytes to read."""
    return f"{size / 2**20:,.0f} MiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"
