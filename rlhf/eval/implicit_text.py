"""The comparison of implicit and explicit rewards on the console: a table, and answers coloured by their credit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

# Heading -> width of its column, for 80 columns in all.
COLUMNS = {"score": 18, "accuracy [95 %]": 22, "drop": 5, "margin": 17, "NLL": 5, "ECE": 5}


def print_record(record: dict[str, Any]) -> None:
    """A table and the differences for each dataset, and the rows whose tokens were asked for."""
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else max(console.width, 120)
    title = f"Implicit reward of {record['policy']}: {record['beta']:g} log({record['policy']} / {record['reference']})"
    if record["reward"] is not None:
        title += f"; reward model: {record['reward']}"
    console.print(Text(title, style="bold"), soft_wrap=True)
    for dataset in record["datasets"]:
        console.print(Text(f"\n{dataset['data']}: {dataset['pairs']} pairs", style="bold"), soft_wrap=True)
        console.print(score_table(dataset))
        for line in notes(dataset):
            console.print(line, markup=False, soft_wrap=True)
        for row in dataset["rows"]:
            console.print(CreditedRow(row))


def score_table(dataset: dict[str, Any]) -> Table:
    """One row per score, under the headings of `COLUMNS`."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading, width in COLUMNS.items():
        table.add_column(heading, justify="left" if heading == "score" else "right", no_wrap=True, min_width=width)
    for name, score in dataset["scores"].items():
        accuracy, margin = score["accuracy"], score["margin"]
        table.add_row(
            name,
            f"{accuracy['mean']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]",
            "" if score["drop"] is None else f"{100 * score['drop']:+.1f}",
            f"{margin['mean']:.3g} ± {margin['se']:.2g}",
            "" if score["nll"] is None else f"{score['nll']:.3f}",
            "" if score["ece"] is None else f"{score['ece']:.3f}",
        )
    return table


def notes(dataset: dict[str, Any]) -> Iterator[str]:
    """Which score is right more often, and what was left out, in words."""
    for each in dataset["differences"]:
        points = f"{100 * each['mean']:+.1f} points [{100 * each['low']:+.1f}, {100 * each['high']:+.1f}]"
        only = f"right alone {each['only_first']} : {each['only_second']}, McNemar p {each['p']:.2g}"
        yield f"{each['first']} against {each['second']}: {points}, {only}"
    if dataset["left_out"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dataset["left_out"].items())
        yield f"left out of {dataset['read']} rows: {reasons}"


class CreditedRow:
    """A pair whose tokens are green or red by what the policy credits them with."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"row {self.row['row']}: {self.row['prompt']}", style="dim")
        credits = [abs(credit) for side in ("chosen", "rejected") for _, credit in self.row[side]["tokens"]]
        for side in ("chosen", "rejected"):
            text = Text(f"{side} {self.row[side]['reward']:+.2f}: ", style="bold")
            for word, credit in self.row[side]["tokens"]:
                text.append_text(credited(word, credit, max(credits), coloured=console.color_system is not None))
            yield text


def credited(word: str, credit: float, most: float, *, coloured: bool) -> Text:
    """A token on green or red, the deeper the larger its credit is beside `most`; without colours followed by it."""
    if not coloured:
        return Text(f"{word}({credit:+.2f})", style="not bold")
    pale = round(255 * (1 - min(1.0, abs(credit) / most))) if most > 0 else 255
    red, green = (pale, 255) if credit >= 0 else (255, pale)
    return Text(word, style=f"not bold #000000 on #{red:02x}{green:02x}{pale:02x}")
