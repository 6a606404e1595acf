"""Updates that are left out because a number in them is not finite: written down, counted, and too many in a row.

What is left out leaves no trace in weights, optimizer, average or step counters; it is in `skipped.jsonl`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.engine import dist
from rlhf.engine.finite import GRADIENT, WEIGHT
from rlhf.errors import NumericsError
from rlhf.run.commit import append_jsonl

logger = logging.getLogger("rlhf.train")
ROLLOUT = "rollout"  # the group of a rollout that nothing is learned from


@dataclass
class Skips:
    """Counts what is left out, by the group of objectives whose update it was. The same on every rank.

    limit: so many in a row end the run. locate: (group, numbers of the data's records) -> file:line of those that are
    known.
    """

    limit: int
    file: Path
    locate: Callable[[str, set[int]], dict[int, str]]
    total: int = 0
    in_a_row: dict[str, int] = field(default_factory=dict)
    reason: NumericsError | None = None  # why the run ends after this step

    def passed(self, group: str) -> None:
        """An update of the group was made."""
        self.in_a_row.pop(group, None)

    def add(self, group: str, step: int, index: int | None, found: dict[str, str], rows: Iterable[int]) -> None:
        """One was left out; every rank must call it.

        index: of the minibatch, None for a whole rollout. found: what this rank saw that is not finite: name -> value.
        rows: numbers of the records that it was made of here.
        """
        self.total += 1
        self.in_a_row[group] = self.in_a_row[group] + 1 if group in self.in_a_row else 1
        seen = dist.gather_objects((found, sorted(set(rows))))
        tensors = [(rank, *each) for rank, (values, _) in enumerate(seen) for each in values.items()]
        # A loss that is not finite on one rank makes the gradients on all so, a weight all that is computed with it.
        causes = [each for each in tensors if not each[1].startswith(GRADIENT)]
        causes.sort(key=lambda each: not each[1].startswith(WEIGHT))
        tensors = causes or tensors or [(0, "gradient norm", "inf")]  # of gradients that are finite one by one
        place = f"step {step + 1}" + ("" if index is None else f", minibatch {index + 1}")
        what = f"{tensors[0][1]} is {tensors[0][2]} on rank {tensors[0][0]}"
        what += f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
        if dist.is_main():
            numbers = {row for _, rows in seen for row in rows}
            self._write(group, step, index, tensors, numbers)
            logger.warning("%s: the update of %s is left out: %s. Its rows are in %s", place, group, what, self.file)
        if self.in_a_row[group] >= self.limit:
            self.reason = NumericsError(
                f"expected finite numbers, found {self.in_a_row[group]} updates of {group} in a row that are not:"
                f" {what}",
                where=place,
                fix=f"They were left out, the weights are as before; their rows and tensors are in {self.file}."
                " Lower train.lr, look at these rows, or allow more with train.max_skipped.",
            )

    def _write(
        self, group: str, step: int, index: int | None, tensors: list[tuple[int, str, str]], numbers: set[int]
    ) -> None:
        known = self.locate(group, numbers)
        record = {
            "step": step + 1,
            "minibatch": None if index is None else index + 1,
            "of": group,
            "in_a_row": self.in_a_row[group],
            "found": [{"rank": rank, "tensor": name, "value": value} for rank, name, value in tensors],
            "rows": [{"row": n, "where": known[n] if n in known else None} for n in sorted(numbers)],
        }
        append_jsonl(self.file, record)

    def as_json(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take over what `as_json` gave."""
        self.total, self.in_a_row = int(saved["total"]), dict(saved["in_a_row"])
