"""`rlhf losses`: the registered losses side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table


def show_losses(*, as_json: bool) -> None:
    """Print the table."""
    from rlhf.train.catalogue import loss_facts

    found = list(loss_facts())
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=2))
        return
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else 160
    for stage in ("dpo", "rm"):
        table = Table(title=f"rlhf {stage}: loss: {{name: ...}}", title_justify="left", box=None, pad_edge=False)
        for header in ("name", "rows", "reference", "needs", "default options", "what it is for", "paper"):
            table.add_column(header, overflow="fold")
        for each in found:
            if each.stage == stage:
                options = ", ".join(f"{key} {shown(value)}" for key, value in each.options.items()) or "-"
                needs = ", ".join([*each.needs, *(["the whole batch"] if each.whole_batch else [])]) or "-"
                table.add_row(each.name, each.rows, each.reference, needs, options, each.intent, each.paper)
        console.print(table)
        console.print()


def shown(value: Any) -> str:
    """A default as one would write it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
