"""Writes the generated pages: docs/recipes.md from the recipe schema, docs/losses.md from the registries.

    python -m scripts.make_docs

A test compares the committed pages with what this script makes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.algo.advantages import ADVANTAGES
from rlhf.algo.aggregation import AGGREGATIONS
from rlhf.algo.controllers import KL_CONTROLLERS
from rlhf.algo.kl import KL_ESTIMATORS
from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.algo.merging import MERGES
from rlhf.algo.policy import POLICY_LOSSES
from rlhf.algo.registry import Entry, Registry
from rlhf.algo.reward_model import REWARD_LOSSES
from rlhf.algo.schedules import SCHEDULES
from rlhf.algo.value import VALUE_LOSSES
from rlhf.recipe.fields import Option, options, shape_of
from rlhf.recipe.loss_options import LossBlock
from rlhf.recipe.merge_options import MergeChoice
from rlhf.recipe.options import PreferenceLoss, RewardLoss
from rlhf.recipe.policy_options import GroupAdvantage, KlController, PolicyLoss, PpoAdvantage, PpoValueLoss
from rlhf.recipe.reward_options import Reward
from rlhf.recipe.schema import Block, OptimBlock
from rlhf.recipe.stages import RECIPES
from rlhf.rewards.rules import RULES

ROOT = Path(__file__).parents[1]
GENERATED = "<!-- Made by `python -m scripts.make_docs`: change the code it is read from, then run that again. -->"


def pages() -> dict[str, str]:
    """The text of every generated page, by its path from the project's root."""
    return {"docs/recipes.md": recipes_page(), "docs/losses.md": losses_page()}


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def code(text: str) -> str:
    """A code span."""
    return f"`{text}`"


# --- recipes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One option: where it is written, what it takes, what it is for."""

    choice: str  # the choice under which it exists (`rewards[].kind: model`), or ""
    key: str
    words: str
    default: str
    description: str

    def cells(self) -> tuple[str, ...]:
        """The row of a table."""
        return code(self.key), self.words, self.default, self.description


def rows(key: str, option: Option, parent: type[Block], choice: str = "") -> Iterator[Row]:
    """An option and, where it is a block, all options in it."""
    yield Row(choice, key, *_facts(option), option.description)
    inner, key = option.shape, f"{key}."
    if inner.is_list and inner.item is not None:
        inner, key = inner.item, f"{key[:-1]}[]."
    for block in inner.blocks:
        if issubclass(parent, block):  # a source inside a block that is a source itself
            yield Row(choice, f"{key}*", "", "", f"the same keys: {', '.join(map(code, options(block)))}")
            continue
        label = f"{key}{inner.tag}: {options(block)[inner.tag].shape.allowed[0]}" if inner.tag else choice
        for name, each in options(block).items():
            yield from rows(f"{key}{name}", each, block, label)


def _facts(option: Option) -> tuple[str, str]:
    """(what a key takes, its default), the default of a block being what is written in it."""
    default = "required" if option.is_required else code(option.default_words())
    return option.shape.words, "" if option.shape.blocks and default == "`{}`" else default


def sections() -> dict[tuple[str, tuple[Row, ...]], list[str]]:
    """(top-level key, its options) -> the stages in which they are the same."""
    found: dict[tuple[str, tuple[Row, ...]], list[str]] = {}
    for stage, recipe in RECIPES.items():
        for name, option in options(recipe).items():
            found.setdefault((name, tuple(rows(name, option, recipe))), []).append(stage)
    return found


def anchor(title: str) -> str:
    """The link that a heading gets."""
    return "#" + "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def recipes_page() -> str:
    """Every option of every stage, blocks that stages share once."""
    found = sections()
    titles = {section: f"{section[0]} ({', '.join(stages)})" for section, stages in found.items()}
    index = [
        (
            f"`rlhf {stage}`",
            (recipe.__doc__ or "").partition("\n")[0],
            ", ".join(f"[{name}]({anchor(titles[name, each])})" for name, each in found if stage in found[name, each]),
        )
        for stage, recipe in RECIPES.items()
    ]
    parts = [
        GENERATED,
        "# Recipe options",
        "A recipe is a YAML file for one stage. It lists what differs from the defaults below; `--dry-run` prints it"
        " with every default written out. A key that is not listed here is an error. `--set KEY=VALUE` changes any key"
        " on the command line, list items by their number (`rewards.0.weight=2`). `rlhf explain KEY` prints the entries"
        " of this page, and `rlhf schema STAGE` a JSON Schema for editors.",
        table(("command", "", "top-level keys"), index),
    ]
    for section in found:
        parts += [f"## {titles[section]}", *_tables(section[1])]
    return "\n\n".join(parts) + "\n"


def _tables(found: tuple[Row, ...]) -> Iterator[str]:
    """One table per choice, in order."""
    for choice in dict.fromkeys(row.choice for row in found):
        if choice:
            yield f"With `{choice}`:"
        header = ("key", "takes", "default", "meaning")
        yield table(header, [row.cells() for row in found if row.choice == choice])


# --- losses -----------------------------------------------------------------------------------------------------------


def blocks_of(*choices: Any) -> dict[str, type[Block]]:
    """The blocks that a recipe can choose from, by the name or kind that chooses each."""
    blocks = [block for choice in choices for block in shape_of(choice).blocks]
    tags = {block: options(block)["name" if "name" in options(block) else "kind"] for block in blocks}
    return {str(tag.shape.allowed[0]): block for block, tag in tags.items()}


def options_in(*choices: Any) -> Callable[[Entry], str]:
    """Lists the options of an entry's block among these; blocks in it have tables of their own."""

    def list_options(entry: Entry) -> str:
        found = options(blocks_of(*choices)[entry.name])
        own = {name: option for name, option in found.items() if not option.shape.blocks}
        return _option_list({name: option for name, option in own.items() if name not in ("name", "kind", "weight")})

    return list_options


def no_options(entry: Entry) -> str:
    """An entry is all there is to choose."""
    return ""


def schedule_options(entry: Entry) -> str:
    """The options that all schedules share; they stand beside `schedule` in the recipe."""
    return _option_list({name: options(OptimBlock)[name] for name in ("warmup", "min_lr_ratio")})


def _option_list(found: dict[str, Option]) -> str:
    return ", ".join(
        f"{code(name)} (required)" if option.is_required else code(f"{name}: {option.default_words()}")
        for name, option in found.items()
    )


# title, registry, where a recipe chooses from it, the options of an entry
REGISTRIES: tuple[tuple[str, Registry, str, Callable[[Entry], str]], ...] = (
    ("Reward-model losses", REWARD_LOSSES, "`loss.name` of `rlhf rm`", options_in(RewardLoss)),
    ("Policy losses", POLICY_LOSSES, "`policy_loss.name` of `rlhf ppo` and `rlhf grpo`", options_in(PolicyLoss)),
    ("Aggregations", AGGREGATIONS, "`aggregation` of `rlhf ppo` and `rlhf grpo`", no_options),
    ("Value losses", VALUE_LOSSES, "`value_loss.name` of `rlhf ppo`", options_in(PpoValueLoss)),
    (
        "Advantage estimators",
        ADVANTAGES,
        "`advantage.name` of `rlhf ppo` (`gae` where nothing is said) and `rlhf grpo` (`grpo`)",
        options_in(PpoAdvantage, GroupAdvantage),
    ),
    (
        "KL estimators",
        KL_ESTIMATORS,
        "`kl.estimator` of `rlhf ppo` and `rlhf grpo`; `kl.placement` says where the KL goes",
        no_options,
    ),
    (
        "KL controllers",
        KL_CONTROLLERS,
        "`kl.controller.name`",
        options_in(KlController),
    ),
    (
        "Rule rewards",
        RULES,
        "`rewards[].kind` of `rlhf ppo` and `rlhf grpo`, each with a `weight`; `kind: model` is a trained reward model",
        options_in(Reward),
    ),
    ("Merges", MERGES, "`method.name` of `rlhf merge`; [merging.md](merging.md)", options_in(MergeChoice)),
    ("Schedules", SCHEDULES, "`train.schedule` and `critic.schedule`", schedule_options),
)


def losses_page() -> str:
    """Every named choice with its paper."""
    parts = [
        GENERATED,
        "# Losses, estimators, rewards and schedules",
        "Each is a function of a few lines under `rlhf/algo` or `rlhf/rewards`, registered under its paper's name and"
        " chosen by a recipe key. Options are given with their defaults; [recipes.md](recipes.md) has their ranges."
        " SFT has one loss, the negative log-likelihood of the trained tokens averaged over the tokens of the batch.",
    ]
    parts += preference_losses()
    for title, registry, where, list_options in REGISTRIES:
        listed = [(code(e.name), e.summary, list_options(e), e.paper) for e in registry]
        parts += [f"## {title}", f"Chosen by {where}.", *_preamble(registry)]
        parts.append(table(("name", "what it is", "options", "paper"), listed))
    return "\n\n".join(parts) + "\n"


def preference_losses() -> Iterator[str]:
    """The section of the preference losses: what each is for, and what it asks of the data and of the recipe."""
    yield "## Preference losses"
    yield (
        "Chosen by `loss.name` of `rlhf dpo`. `rows` says what a row of the data is: a pair of answers, a single answer"
        " that is good or bad, or a list of scored answers. `reference` says whether the loss compares with a frozen"
        " policy; `whole` means with its whole distribution, so that stored log-probabilities will not do. `data` are"
        " the numbers that a row must have beside its answers; `scores in [0, 1]` says that those of a list must lie"
        " there."
    )
    blocks = blocks_of(PreferenceLoss)
    found = [(entry, block) for entry in PREFERENCE_LOSSES if issubclass(block := blocks[entry.name], LossBlock)]
    found.sort(key=lambda each: ("pairs", "answers", "lists").index(each[1].rows))
    for module in dict.fromkeys(entry.function.__module__ for entry, _ in found):
        yield from _paragraphs(module)
    header = ("name", "what it is for", "formula", "rows", "reference", "data", "options", "paper")
    yield table(header, [_loss_cells(entry, block) for entry, block in found])


def _loss_cells(entry: Entry, block: type[LossBlock]) -> tuple[str, ...]:
    reference = "whole" if block.whole else "yes" if block.reference else "no"
    data = ["scores in [0, 1]"] if block.unit_scores else [code(name) for name in block.needs]
    intent = (block.__doc__ or "").partition("\n")[0]
    chosen = options_in(PreferenceLoss)(entry)
    return code(entry.name), intent, entry.summary, block.rows, reference, ", ".join(data), chosen, entry.paper


def _preamble(registry: Registry) -> list[str]:
    """What the file of a registry says about all of its entries, as paragraphs."""
    return _paragraphs(next(iter(registry)).function.__module__)


def _paragraphs(module: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in (sys.modules[module].__doc__ or "").split("\n\n")]


def main() -> None:
    """Write the pages."""
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
