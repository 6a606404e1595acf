"""Rules of `rlhf dpo` recipes: which losses go together, and what each of them has no use for."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.recipe.loss_options import CringeLoss
from rlhf.recipe.options import PreferenceLoss
from rlhf.recipe.pair_options import PairwiseCringeLoss
from rlhf.recipe.problems import Problem
from rlhf.recipe.stages import PreferenceRecipe, PromptCriticBlock

Problems = Iterator[Problem]


def losses_share_rows(recipe: PreferenceRecipe) -> Problems:
    """A sum of losses is a sum over the same rows."""
    first = recipe.loss
    for i, block in enumerate(recipe.further_losses):
        if block.rows != first.rows:
            what = f"expected a loss on {first.rows}, as {first.name} is, found {block.name}, one on {block.rows}"
            fix = "rlhf losses lists what each one learns from"
            yield Problem(f"further_losses.{i}.name", what, fix, ("loss.name",))


def each_loss_once(recipe: PreferenceRecipe) -> Problems:
    """Twice the same loss is one with another weight."""
    seen = {recipe.loss.name: "loss.name"}
    for i, block in enumerate(recipe.further_losses):
        key = f"further_losses.{i}.name"
        if block.name in seen:
            what = f"expected a loss that is not there yet, found {block.name} again"
            yield Problem(key, what, "raise the weight of the first one", (seen[block.name],))
        seen[block.name] = key


def one_contrast(recipe: PreferenceRecipe) -> Problems:
    """CRINGE's token losses come from one forward pass with one number of contrasting tokens."""
    found = [(key, block.k) for key, block in _losses(recipe) if isinstance(block, CringeLoss | PairwiseCringeLoss)]
    for key, k in found[1:]:
        if k != found[0][1]:
            what = f"expected {found[0][1]}, as {found[0][0]}.k is, found {k}"
            fix = "both are computed in one pass: give them the same k"
            yield Problem(f"{key}.k", what, fix, (f"{found[0][0]}.k",))


def unused_reference(recipe: PreferenceRecipe) -> Problems:
    """A reference is loaded for losses that compare with it."""
    reference = recipe.reference
    if not any(block.reference for _, block in _losses(recipe)) and (reference.from_ or reference.path):
        what = f"expected none for {recipe.loss.name}, which compares with no reference, found one"
        fix = "remove it (--set 'reference={}'), or take another loss"
        yield Problem("reference", what, fix, ("loss.name",))


def unused_critic(recipe: PreferenceRecipe) -> Problems:
    """Only dro_v learns a value."""
    if not recipe.learns_value and recipe.critic != PromptCriticBlock():
        what = f"expected none for {recipe.loss.name}, which learns no value, found one"
        yield Problem("critic", what, "remove it, or take loss: {name: dro_v}", ("loss.name",))


def _losses(recipe: PreferenceRecipe) -> Iterator[tuple[str, PreferenceLoss]]:
    yield "loss", recipe.loss
    yield from ((f"further_losses.{i}", block) for i, block in enumerate(recipe.further_losses))


PREFERENCE_RULES = (losses_share_rows, each_loss_once, one_contrast, unused_reference, unused_critic)
