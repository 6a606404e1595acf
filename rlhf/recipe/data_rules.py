"""Rules about a recipe's data; `check.py` runs them among the others."""

from __future__ import annotations

import string
from collections.abc import Iterator

from rlhf.recipe.problems import Problem
from rlhf.recipe.schema import FilterBlock, SourceBlock
from rlhf.recipe.stages import (
    AnyRecipe,
    PreferenceRecipe,
    Recipe,
    RewardRecipe,
    ScoringRecipe,
    SFTRecipe,
    data_blocks,
)

Problems = Iterator[Problem]
INLINE = [key for key in SourceBlock.model_fields if key not in ("from_", "path")]


def inline_options(recipe: Recipe) -> Problems:
    """With several sources, what describes a source stands in it."""
    for data in data_blocks(recipe):
        for key in INLINE if data.sources else ():
            if getattr(data, key) != SourceBlock.model_fields[key].default:
                sources = f"{data.key}.sources"
                what = f"expected it inside each of {sources}, found it beside them"
                yield Problem(f"{data.key}.{key}", what, f"move {key} into the sources that need it", (sources,))


def source_paths(recipe: Recipe) -> Problems:
    """Every source says where it is."""
    for key, source in sources(recipe):
        if not (source.from_ or source.path):
            fix = "write path: a file, a folder or a hub id, or from: a label stage"
            yield Problem(f"{key}.path", "expected text, found nothing", fix)
        if source.from_ and source.path:
            also = (f"{key}.from", f"{key}.path")
            yield Problem(key, "expected one of from and path, found both", "remove one of them", also)
        if source.output != SourceBlock.model_fields["output"].default and not source.from_:
            what = f"expected from: a label stage beside it, found {source.output} of none"
            yield Problem(f"{key}.output", what, "a file has its rows only: remove it", (f"{key}.path",))


def parts(recipe: Recipe) -> Problems:
    """The second of two parts exists, the third does not."""
    for key, source in sources(recipe):
        number, _, count = (source.part or "1/1").partition("/")
        if int(number) > int(count):
            yield Problem(f"{key}.part", f"expected at most {count}/{count}, found {source.part}", "parts count from 1")


def templates(recipe: Recipe) -> Problems:
    """The braces of a template can be filled."""
    for key, source in sources(recipe):
        for name, text in source.templates.items():
            try:
                fields = [column for _, column, _, _ in string.Formatter().parse(text) if column is not None]
            except ValueError as error:
                fields, reason = [], f"an error ({error})"
            else:
                reason = "{} without a column" if "" in fields else ""
            if reason:
                fix = "write {column}, and {{ or }} for a brace itself"
                yield Problem(f"{key}.templates.{name}", f"expected text with {{columns}}, found {reason}", fix)


def sources(recipe: AnyRecipe) -> Iterator[tuple[str, SourceBlock]]:
    """Every source of a recipe with its key, held-out ones too."""
    for data in data_blocks(recipe):
        if not data.sources:
            yield data.key, data
        for i, source in enumerate(data.sources):
            yield f"{data.key}.sources.{i}", source
        if data.eval is not None:
            yield f"{data.key}.eval", data.eval


def prompt_length(recipe: Recipe) -> Problems:
    """A prompt limit below the row limit, so that an answer has room."""
    data = recipe.data
    if data.max_prompt_length is not None and data.max_prompt_length >= data.max_length:
        what = f"expected less than data.max_length = {data.max_length}, found {data.max_prompt_length}"
        yield Problem("data.max_prompt_length", what, "leave room for the answer", ("data.max_length",))


def room_for_prompts(recipe: ScoringRecipe) -> Problems:
    """What sampling takes of the row limit leaves room for the prompt."""
    room = recipe.data.max_length - recipe.sampling.max_new_tokens
    if room <= 0:
        what = f"expected less than data.max_length = {recipe.data.max_length}, found {recipe.sampling.max_new_tokens}"
        fix = "prompts may have max_length - max_new_tokens tokens: lower this, or raise data.max_length"
        yield Problem("sampling.max_new_tokens", what, fix, ("data.max_length",))


def filters(recipe: Recipe) -> Problems:
    """What is about pairs stands where pairs are read, and a filter can keep something."""
    for data in data_blocks(recipe):
        key, chosen = f"{data.key}.filter", data.filter
        given = [name for name in chosen.of_pairs if getattr(chosen, name) != FilterBlock.model_fields[name].default]
        of_pairs = [f"{key}.{name}" for name in given] + ([f"{data.key}.reweight"] if data.reweight else [])
        for each in of_pairs if data is not recipe.data or not reads_pairs(recipe) else ():
            yield Problem(each, "expected nothing where no pairs are learned from, found it set", "remove the key")
        if chosen.min_margin is not None and chosen.max_margin is not None and chosen.min_margin > chosen.max_margin:
            what = f"expected at least min_margin = {chosen.min_margin:g}, found {chosen.max_margin:g}"
            yield Problem(f"{key}.max_margin", what, "no row has such a margin", (f"{key}.min_margin",))
        if chosen.drop_eval_overlap != "none" and data.eval is None and not data.eval_rows:
            what = f"expected none without held-out rows, found {chosen.drop_eval_overlap}"
            fix = f"name a held-out file in {data.key}.eval, or set {data.key}.eval_rows"
            also = (f"{data.key}.eval", f"{data.key}.eval_rows")
            yield Problem(f"{key}.drop_eval_overlap", what, fix, also)


def reads_pairs(recipe: Recipe) -> bool:
    """Whether a stage learns from pairs of answers."""
    return isinstance(recipe, (RewardRecipe, PreferenceRecipe)) and recipe.loss.rows == "pairs"


def eval_data(recipe: SFTRecipe | RewardRecipe | PreferenceRecipe) -> Problems:
    """Evaluating while training needs held-out rows."""
    if recipe.eval.every and recipe.data.eval is None and not recipe.data.eval_rows:
        what = f"expected 0 without held-out rows, found {recipe.eval.every}"
        fix = "set data.eval_rows, or name a held-out file in data.eval"
        yield Problem("eval.every", what, fix, ("data.eval_rows", "data.eval"))
