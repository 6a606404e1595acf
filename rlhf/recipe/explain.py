"""`rlhf explain KEY`, `rlhf schema STAGE` and the batch arithmetic of a recipe, all read off the schema."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from rlhf.errors import RecipeError
from rlhf.recipe.fields import Option, meaning, options, tags, walk
from rlhf.recipe.problems import choice, closest
from rlhf.recipe.schema import Block, LearnBlock, TrainBlock
from rlhf.recipe.stages import RECIPES, AnyRecipe, LabelRecipe, LearningRecipe, MergeRecipe, OnlineRecipe

Entry = tuple[str, str, Option]  # dotted key, the choice under which it exists or "", option


def explain(key: str, stage: str | None = None) -> str:
    """Type, range, default and meaning of a key, in every stage that has it; the end of a key is enough (`lr`).

    A block lists its keys. An unknown key or stage raises RecipeError with the nearest names.
    """
    if stage is not None and stage not in RECIPES:
        raise RecipeError(f"expected one of {', '.join(RECIPES)}, found {stage!r}", where="stage")
    stages = [stage] if stage is not None else list(RECIPES)
    entries = {name: list(walk(RECIPES[name])) for name in stages}
    wanted = ".".join("0" if part.isdigit() else part for part in key.split("."))
    exact = any(k == wanted for found in entries.values() for k, _, _ in found)
    said: dict[tuple[str, str], list[str]] = {}  # (heading, text) -> the stages that it is true of
    for name, found in entries.items():
        for heading, text in _matches(found, wanted, exact):
            said.setdefault((heading, text), []).append(name)
    if not said:
        raise _unknown(key, stages, [k for found in entries.values() for k, _, _ in found])
    return "\n\n".join(f"{heading}  (rlhf {', '.join(names)})\n{text}" for (heading, text), names in said.items())


def _matches(entries: list[Entry], wanted: str, exact: bool) -> Iterable[tuple[str, str]]:
    """(heading, text) of every key that is meant; a key that reads the same under several choices is told once."""
    meant: dict[tuple[str, str], list[str]] = {}
    for key, chosen, option in entries:
        if key == wanted or (not exact and key.endswith(f".{wanted}")):
            meant.setdefault((key, _describe(key, option)), []).extend([chosen] if chosen else [])
    for (key, text), choices in meant.items():
        yield key + (f" with {_under(choices)}" if choices else ""), text


def _under(choices: list[str]) -> str:
    """Choices in words, what they all begin with said once: loss.name=dpo or cdpo."""
    names = {chosen.partition("=")[0] for chosen in choices}
    values = choices if len(names) > 1 else [chosen.partition("=")[2] for chosen in choices]
    return ("" if len(names) > 1 else f"{names.pop()}=") + choice(dict.fromkeys(values))


def _describe(key: str, option: Option) -> str:
    inner = option.shape.item if option.shape.item is not None and option.shape.item.blocks else option.shape
    if not inner.blocks:
        return f"  {option.description}\n  {_facts(option)}"
    lines = [f"  {option.description}"]
    if not inner.tag:
        return "\n".join(lines + _keys(inner.blocks[0]))
    lines.append(f"  {key}{'.0' if option.shape.is_list else ''}.{inner.tag} is one of:")
    lines += _columns({tag: (block.__doc__ or "").partition("\n")[0] for tag, block in tags(inner).items()})
    for tag, block in tags(inner).items():
        lines += [f"  keys with {inner.tag}: {tag}", *_keys(block, but=inner.tag)]
    return "\n".join(lines)


def _keys(block: type[Block], but: str | None = None) -> list[str]:
    rows = {}
    for name, option in options(block).items():
        if name != but:
            rows[name] = option.description + ("" if option.shape.blocks else f"; {_facts(option)}")
    return _columns(rows)


def _columns(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows), default=0) + 2
    return [f"    {name:<{width}}{text}" for name, text in rows.items()]


def _facts(option: Option) -> str:
    return f"{option.shape.words}, " + ("required" if option.is_required else f"default {option.default_words()}")


def _unknown(key: str, stages: list[str], known: list[str]) -> RecipeError:
    last = {name.rpartition(".")[2]: name for name in reversed(known)}
    near = closest(key, known, cutoff=0.75) + [last[n] for n in closest(key.rpartition(".")[2], last, cutoff=0.7)]
    near = near or [k for stage in stages for k in meaning(RECIPES[stage], key)]
    fix = f"did you mean {choice(list(dict.fromkeys(near))[:3])}?" if near else "`rlhf explain train` lists a block"
    return RecipeError(f"expected a key of a recipe, found {key!r}", where="explain", fix=fix)


def json_schema(stage: str) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a stage's recipe, for editors: closed blocks, defaults and descriptions."""
    schema = RECIPES[stage].model_json_schema(by_alias=True)
    _open_choices(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": f"rlhf {stage} recipe"}


def _open_choices(node: Any) -> None:
    """A block may leave out its tag, and then fits several members: any of them is right."""
    if isinstance(node, dict):
        node.pop("discriminator", None)
        if "oneOf" in node:
            node["anyOf"] = node.pop("oneOf")
    for inner in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        _open_choices(inner)


def offline_steps(train: TrainBlock, num_rows: int) -> int:
    """Optimizer steps of an offline stage: `steps`, or as many as `epochs` need; the last one may begin a new epoch."""
    if train.steps is not None:
        return train.steps
    return max(1, math.ceil(round(num_rows * train.epochs / train.batch_size, 9)))


def describe_batch(recipe: AnyRecipe, world_size: int, num_rows: int | None = None) -> list[str]:
    """The batch arithmetic in a line or two: from rows or prompts to optimizer steps. num_rows: None while unknown."""
    if isinstance(recipe, OnlineRecipe):
        return _online_batch(recipe, world_size)
    if isinstance(recipe, LabelRecipe):
        return _label_batch(recipe, world_size)
    if isinstance(recipe, MergeRecipe):
        return [_merge_sum(recipe)]
    assert isinstance(recipe, LearningRecipe)
    train = recipe.train
    assert isinstance(train, TrainBlock)
    size = _micro_batches(train.batch_size, train, world_size)
    lines = [f"{_count(train.batch_size, 'row')} per optimizer step -> {size}"]
    if train.steps is not None:
        passes = "" if num_rows is None else f" = {_epochs(train, num_rows):.3g} epochs of {_count(num_rows, 'row')}"
        return [*lines, f"{_count(train.steps, 'step')} x {_count(train.batch_size, 'row')}{passes}"]
    if num_rows is None:
        return [*lines, f"{train.epochs:g} epochs over the data"]
    total = _count(offline_steps(train, num_rows), "optimizer step")
    return [*lines, f"{_count(num_rows, 'row')} x {train.epochs:g} epochs / {train.batch_size} -> {total}"]


def _online_batch(recipe: OnlineRecipe, world_size: int) -> list[str]:
    train = recipe.train
    rows = train.prompts * train.answers
    size = rows // train.minibatches
    steps = train.minibatches * train.inner_epochs
    micro = _micro_batches(size, train, world_size)
    passes = f" x {train.inner_epochs} inner epochs" if train.inner_epochs > 1 else ""
    return [
        f"{_count(train.prompts, 'prompt')} x {_count(train.answers, 'answer')} = {_count(rows, 'row')} per rollout"
        f" -> {_count(train.minibatches, 'minibatch')} of {size} -> {micro}",
        f"{_count(train.minibatches, 'minibatch')}{passes} = {_count(steps, 'optimizer step')} per rollout,"
        f" {_count(train.rollouts, 'rollout')} = {_count(steps * train.rollouts, 'step')}",
    ]


def _label_batch(recipe: LabelRecipe, world_size: int) -> list[str]:
    label = recipe.label
    batches = math.ceil(label.batch / label.prompts_together() / world_size)
    rows = label.prompts_together() * label.answers
    where = f"each of {world_size} devices" if world_size > 1 else "1 device"
    together = f"{_count(batches, 'batch')} of {rows} on {where}"
    total = label.batch * label.answers
    return [
        f"{_count(label.batch, 'prompt')} x {label.answers} answers = {_count(total, 'row')} per step -> {together}"
    ]


def _merge_sum(recipe: MergeRecipe) -> str:
    terms = " + ".join(f"{model.weight:g} x {model.from_ or model.path}" for model in recipe.models)
    return f"{recipe.method.name}: {terms}, each less {recipe.base.from_ or recipe.base.path}, which they are added to"


def _micro_batches(rows: int, train: LearnBlock, world_size: int) -> str:
    """How large micro-batches are; how many they are depends on the rows' lengths."""
    where = f"each of {world_size} devices" if world_size > 1 else "1 device"
    if train.micro_batch == "auto":
        return f"micro-batches of as many tokens as fit into memory, measured in the first step, on {where}"
    most = f"{_count(train.micro_tokens, 'token')}"
    if train.micro_batch is None:
        return f"micro-batches of up to {most} on {where}"
    per_device = math.ceil(rows / world_size)
    least = math.ceil(per_device / train.micro_batch)
    size = _count(min(train.micro_batch, per_device), "row")
    return f"at least {_count(least, 'micro-batch')} of up to {size} and {most} on {where}"


def _epochs(train: TrainBlock, num_rows: int) -> float:
    return train.batch_size * (train.steps or 0) / max(num_rows, 1)


def _count(number: int, noun: str) -> str:
    plural = "" if number == 1 else "es" if noun.endswith("h") else "s"
    return f"{number:,} {noun}{plural}"
