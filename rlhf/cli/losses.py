"""`rlhf losses`: the registered losses side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.algo.registry import Entry, Registry
from rlhf.algo.reward_model import REWARD_LOSSES
from rlhf.recipe.fields import shape_of
from rlhf.recipe.loss_options import LossBlock
from rlhf.recipe.options import PreferenceLoss, RewardLoss
from rlhf.recipe.schema import Block


@dataclass(frozen=True)
class LossFacts:
    """What the table says of one loss."""

    name: str
    stage: str
    paper: str
    rows: str  # pairs, answers or lists
    reference: str  # none, its summed log-probs, or the whole model beside the policy
    needs: list[str]  # of the data, beside the answers
    whole_batch: bool
    options: dict[str, Any]  # with their defaults
    intent: str


def loss_facts() -> Iterator[LossFacts]:
    """Every loss of both stages, in the order of registration."""
    yield from (_facts(block, entry) for block, entry in chosen(PREFERENCE_LOSSES, PreferenceLoss))
    for block, entry in chosen(REWARD_LOSSES, RewardLoss):
        yield LossFacts(entry.name, "rm", entry.paper, block.rows, "none", [], False, defaults(block), intent(block))


def chosen(registry: Registry, choice: Any) -> Iterator[tuple[type[Any], Entry]]:
    """The option block and the registered function of every name that a recipe may choose."""
    blocks = {block.model_fields["name"].default: block for block in shape_of(choice).blocks}
    yield from ((blocks[entry.name], entry) for entry in registry)


def _facts(block: type[LossBlock], entry: Entry) -> LossFacts:
    return LossFacts(
        name=entry.name,
        stage="dpo",
        paper=entry.paper,
        rows=block.rows,
        reference="none" if not block.reference else "whole" if block.whole else "log-probs",
        needs=list(block.needs),
        whole_batch=entry.traits.couple is not None,
        options=defaults(block),
        intent=intent(block),
    )


def defaults(block: type[Block]) -> dict[str, Any]:
    """The options of a loss with their defaults."""
    return {key: info.default for key, info in block.model_fields.items() if key not in ("name", "weight")}


def intent(block: type[Block]) -> str:
    """What a loss is for, in a line, without its paper."""
    return (block.__doc__ or "").strip().splitlines()[0].partition(" (")[0].rstrip(".")


def show_losses(*, as_json: bool) -> None:
    """Print the table."""
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
