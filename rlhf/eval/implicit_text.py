"""The comparison of implicit and explicit rewards on the console: a table, and answers coloured by their credit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

HEADINGS = ("data", "pairs", "score", "accuracy [95 %]", "drop", "margin", "NLL", "ECE")


def print_record(record: dict[str, Any]) -> None:
    """Table, differences, and the rows whose tokens were asked for."""
    console = Console(highlight=False)
    console.width = console.width if console.is_terminal else max(console.width, 120)
    title = f"Implicit reward of {record['policy']}: {record['beta']:g} log({record['policy']} / {record['reference']})"
    if record["reward"] is not None:
        title += f"; reward model: {record['reward']}"
    console.print(title, markup=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("data", "score") else "right", no_wrap=True)
    for row in score_rows(record):
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for line in difference_lines(record):
        console.print(line, markup=False, soft_wrap=True)
    for dataset in record["datasets"]:
        for row in dataset["rows"]:
            console.print(CreditedRow(dataset["data"], row))


def score_rows(record: dict[str, Any]) -> list[list[str]]:
    """One row of cells per dataset and score, under `HEADINGS`."""
    rows = []
    for dataset in record["datasets"]:
        for number, (name, score) in enumerate(dataset["scores"].items()):
            accuracy, margin = score["accuracy"], score["margin"]
            rows.append(
                [
                    "" if number else dataset["data"],
                    "" if number else str(dataset["pairs"]),
                    name,
                    f"{accuracy['mean']:.1%} [{accuracy['low']:.1%}, {accuracy['high']:.1%}]",
                    "" if score["drop"] is None else f"{100 * score['drop']:+.1f}",
                    f"{margin['mean']:.3g} ± {margin['se']:.2g}",
                    "" if score["nll"] is None else f"{score['nll']:.3f}",
                    "" if score["ece"] is None else f"{score['ece']:.3f}",
                ]
            )
    return rows


def difference_lines(record: dict[str, Any]) -> Iterator[str]:
    """What was left out, and which score is right more often, in words."""
    for dataset in record["datasets"]:
        if dataset["left_out"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dataset["left_out"].items())
            yield f"{dataset['data']}: left out of {dataset['read']} rows: {reasons}"
        for each in dataset["differences"]:
            points = f"{100 * each['mean']:+.1f} points [{100 * each['low']:+.1f}, {100 * each['high']:+.1f}]"
            only = f"right alone {each['only_first']} : {each['only_second']}, McNemar p {each['p']:.2g}"
            yield f"{dataset['data']}: {each['first']} against {each['second']}: {points}, {only}"


class CreditedRow:
    """A pair whose tokens are green or red by what the policy credits them with."""

    def __init__(self, data: str, row: dict[str, Any]) -> None:
        self.data, self.row = data, row

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(f"\n{self.data}, row {self.row['row']}: {self.row['prompt']}", style="dim")
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
