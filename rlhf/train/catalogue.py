"""The registered losses of `rlhf dpo` and `rlhf rm` side by side: what `rlhf losses` and the docs show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
