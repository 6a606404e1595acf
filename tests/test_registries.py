"""Registered functions and the recipe's options are two sides of one thing; a new entry is tested before its author is.

Both sides are walked through, so a function without options, options without a function, a default in a signature, or
a loss that is not finite fails here without anybody writing a test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from rlhf.algo.advantages import ADVANTAGES
from rlhf.algo.aggregation import AGGREGATIONS, DENOMINATORS
from rlhf.algo.controllers import KL_CONTROLLERS, ppo_penalty_beta
from rlhf.algo.kl import KL_ESTIMATORS
from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.algo.merging import MERGES
from rlhf.algo.policy import POLICY_LOSSES
from rlhf.algo.registry import Entry, Registry
from rlhf.algo.reward_model import REWARD_LOSSES
from rlhf.algo.rewards import process_scores
from rlhf.algo.schedules import SCHEDULES
from rlhf.algo.value import VALUE_LOSSES
from rlhf.recipe import loss_options, merge_options, options, pair_options, policy_options, reward_options
from rlhf.recipe.fields import shape_of
from rlhf.recipe.loss_options import LossBlock
from rlhf.recipe.merge_options import MergeChoice, MergeMethod
from rlhf.recipe.options import PreferenceLoss, RewardLoss, RewardLossBlock
from rlhf.recipe.policy_options import (
    Estimator,
    GroupAdvantage,
    KlBlock,
    KlController,
    PolicyLoss,
    PpoAdvantage,
    PpoPenaltyLoss,
    PpoValueLoss,
    ScoresBlock,
)
from rlhf.recipe.reward_options import FunctionReward, Reward
from rlhf.recipe.schema import Block, OptimBlock
from rlhf.recipe.stages import GRPOKlBlock, GRPORecipe, OnlineRecipe, PPORecipe
from rlhf.rewards.rules import RULES

# registries whose entries are chosen by a block of options each, and the places in a recipe that choose
CHOICES: list[tuple[Registry, tuple[Any, ...]]] = [
    (PREFERENCE_LOSSES, (PreferenceLoss,)),
    (REWARD_LOSSES, (RewardLoss,)),
    (ADVANTAGES, (PpoAdvantage, GroupAdvantage)),
    (POLICY_LOSSES, (PolicyLoss,)),
    (VALUE_LOSSES, (PpoValueLoss,)),
    (KL_CONTROLLERS, (KlController,)),
    (MERGES, (MergeChoice,)),
    (RULES, (Reward,)),
]
NOT_A_RULE = {"model", "process", "http"}  # rewards of modules of their own: no function of rows and answers
# registries whose entries are chosen by one field and share its block's other options
BY_FIELD: list[tuple[Registry, type[Block], str, set[str]]] = [
    (KL_ESTIMATORS, KlBlock, "estimator", set()),
    (KL_ESTIMATORS, GRPOKlBlock, "estimator", set()),
    (SCHEDULES, OptimBlock, "schedule", {"warmup", "min_lr_ratio"}),
]
BY_CHOICE = [
    pytest.param(registry, entry, id=f"{registry.kind} {entry.name}") for registry, _ in CHOICES for entry in registry
]
ENTRIES = [entry for registry, _ in CHOICES for entry in registry]
COUPLINGS = {entry.traits.couple: entry.name for entry in ENTRIES if entry.traits.couple is not None}
ENTRIES += [entry for registry in (KL_ESTIMATORS, SCHEDULES, AGGREGATIONS) for entry in registry]


def by_name(entry: Entry) -> str:
    return entry.name


def tag_of(block: type[Block]) -> str:
    """The field that chooses a block."""
    return "name" if "name" in block.model_fields else "kind"


def blocks_of(registry: Registry) -> dict[str, type[Block]]:
    """The option blocks that choose from a registry, by what is written in the recipe."""
    (choices,) = [choices for each, choices in CHOICES if each is registry]
    found: dict[str, type[Block]] = {}
    for block in [block for choice in choices for block in shape_of(choice).blocks]:
        (name,) = get_args(block.model_fields[tag_of(block)].annotation)
        assert found.get(name, block) is block, f"two blocks choose {name}"
        assert block.model_fields[tag_of(block)].default == name
        found[name] = block
    return found


def options_of(*functions: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for function in functions
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def functions_of(entry: Entry) -> list[Callable[..., Any]]:
    """The function of an entry and the coupling that feeds it; their options stand in one block."""
    return [entry.function] if entry.traits.couple is None else [entry.function, entry.traits.couple]


def arguments(block: type[Block]) -> set[str]:
    """The fields of a block that are meant for its function: not its name, its weight, or what the block sets apart."""
    return set(block.model_fields) - {"name", "kind", "weight", *block.not_arguments}


def defaults(registry: Registry, entry: Entry) -> dict[str, Any]:
    """The options of an entry as a recipe that says nothing about them has them."""
    block = blocks_of(registry)[entry.name]
    given = {"function": __file__ + ":rate"} if block is FunctionReward else {}
    return block(**given).model_dump(include=set(options_of(entry.function)))


def rate(rows: list[dict[str, Any]], answers: list[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


# --- both sides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("registry", [registry for registry, _ in CHOICES], ids=lambda r: r.kind)
def test_every_entry_has_a_block_and_every_block_an_entry(registry: Registry) -> None:
    expected = set(blocks_of(registry)) - (NOT_A_RULE if registry is RULES else set())
    assert sorted(registry.names()) == sorted(expected)


def test_every_block_with_a_name_can_be_chosen() -> None:
    declared = {
        block
        for module in (merge_options, pair_options, loss_options, options, policy_options, reward_options)
        for block in vars(module).values()
        if inspect.isclass(block) and issubclass(block, Block) and {"name", "kind"} & set(block.model_fields)
    }
    assert declared == {block for registry, _ in CHOICES for block in blocks_of(registry).values()}


@pytest.mark.parametrize(("registry", "entry"), BY_CHOICE)
def test_a_blocks_fields_are_the_functions_options(registry: Registry, entry: Entry) -> None:
    assert arguments(blocks_of(registry)[entry.name]) == set(options_of(*functions_of(entry)))


@pytest.mark.parametrize(("registry", "block", "field", "shared"), BY_FIELD)
def test_a_fields_choices_are_the_registered_names(
    registry: Registry, block: type[Block], field: str, shared: set[str]
) -> None:
    assert list(get_args(block.model_fields[field].annotation)) == registry.names()
    assert shared <= set(block.model_fields)
    assert all(set(options_of(entry.function)) == shared for entry in registry)


@pytest.mark.parametrize("recipe", [OnlineRecipe, PPORecipe, GRPORecipe])
def test_aggregations_are_the_recipes_and_have_a_denominator(recipe: type[Block]) -> None:
    assert list(get_args(recipe.model_fields["aggregation"].annotation)) == AGGREGATIONS.names() == list(DENOMINATORS)
    assert set(DENOMINATORS.values()) == {"tokens", "sequences"}
    assert all(set(options_of(entry.function)) == {"length"} for entry in AGGREGATIONS)


def test_score_processing_takes_the_scores_block_in_its_order() -> None:
    elsewhere = ("normalise", "drop_unfinished")  # need the scores of earlier rollouts, or the mask
    assert list(options_of(process_scores)) == [name for name in ScoresBlock.model_fields if name not in elsewhere]


@pytest.mark.parametrize(
    "function", [*(entry.function for entry in ENTRIES), *COUPLINGS, process_scores], ids=lambda f: f.__name__
)
def test_no_default_stands_in_a_signature(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)


@pytest.mark.parametrize("entry", ENTRIES, ids=by_name)
def test_every_entry_has_a_paper_and_a_summary(entry: Entry) -> None:
    assert len(entry.paper) > 5 and entry.summary.endswith((".", "]"))
    assert set(entry.inputs) | set(options_of(entry.function)) == set(inspect.signature(entry.function).parameters)


@pytest.mark.parametrize("entry", ADVANTAGES, ids=by_name)
def test_what_an_estimator_asks_of_the_recipe_is_what_its_inputs_need(entry: Entry) -> None:
    block = blocks_of(ADVANTAGES)[entry.name]
    assert issubclass(block, Estimator)
    assert block.needs_critic is ("values" in entry.inputs)
    assert block.needs_greedy is ("greedy_scores" in entry.inputs)
    assert block.needs_steps is ("step_scores" in entry.inputs)
    assert block.per_token is bool({"rewards", "step_scores"} & set(entry.inputs))


@pytest.mark.parametrize("entry", MERGES, ids=by_name)
def test_what_a_merge_asks_of_the_recipe_is_what_its_inputs_need(entry: Entry) -> None:
    block = blocks_of(MERGES)[entry.name]
    assert issubclass(block, MergeMethod)
    assert ("seed" in block.model_fields) is ("draws" in entry.inputs)
    assert set(entry.inputs) - {"draws"} == {"base", "models", "weights"}


# --- properties -----------------------------------------------------------------------------------------------------
FROM_DATA = {"scores", "win_rates", "rewards"}
FROM_FORWARD = {"chosen_tokens", "rejected_tokens", "sequence_kl", "contrast", "values", "density"}


@pytest.mark.parametrize("entry", PREFERENCE_LOSSES, ids=by_name)
def test_what_a_preference_loss_asks_of_the_recipe_is_what_its_inputs_need(entry: Entry) -> None:
    block = blocks_of(PREFERENCE_LOSSES)[entry.name]
    assert issubclass(block, LossBlock)
    rows, *others = entry.inputs
    assert rows == block.rows and block.reference is entry.traits.reference
    assert [name for name in others if name in FROM_DATA] == list(block.needs)
    assert block.whole is ("sequence_kl" in others)
    assert ("k" in block.not_arguments) is ("contrast" in others) is ("k" in block.model_fields)
    assert block.unit_scores is False or block.rows == "lists"
    coupled = set(others) - FROM_DATA - FROM_FORWARD
    assert bool(coupled) is (entry.traits.couple is not None)
    if entry.traits.scale is not None:
        assert entry.traits.scale in block.model_fields
    assert entry.traits.invariant <= entry.traits.reference  # what has no reference knows no common constant


@pytest.mark.parametrize("entry", REWARD_LOSSES, ids=by_name)
def test_what_a_reward_loss_asks_of_the_data_is_what_its_inputs_need(entry: Entry) -> None:
    block = blocks_of(REWARD_LOSSES)[entry.name]
    assert issubclass(block, RewardLossBlock)
    wanted = {"pairs": ("chosen", "rejected", "margin"), "lists": ("scores", "labels", "present")}
    assert entry.inputs == wanted[block.rows]


# --- properties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", REWARD_LOSSES, ids=by_name)
def test_reward_losses_are_finite_per_row_and_prefer_the_chosen(entry: Entry) -> None:
    torch.manual_seed(0)
    chosen = torch.randn(8, dtype=torch.float64).requires_grad_()
    rejected = chosen.detach().clone().requires_grad_()
    given = {"chosen": chosen, "rejected": rejected, "margin": torch.zeros(8)}
    given |= {"scores": torch.stack([rejected, chosen], -1), "labels": torch.tensor([[0, 1]]).expand(8, 2)}
    given |= {"present": torch.ones(8, 2, dtype=torch.bool)}
    losses = entry.function(*(given[name] for name in entry.inputs), **defaults(REWARD_LOSSES, entry))
    up, down = torch.autograd.grad(losses.sum(), [chosen, rejected])
    assert losses.shape == (8,) and losses.isfinite().all()
    assert (up < 0).all() and (down > 0).all()


@pytest.mark.parametrize("entry", VALUE_LOSSES, ids=by_name)
def test_value_losses_are_finite_per_token_and_move_towards_the_return(entry: Entry) -> None:
    torch.manual_seed(0)
    old, returns = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    values = old.clone().requires_grad_()
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [0]])
    losses, clipped = entry.function(values, old, returns, mask, **defaults(VALUE_LOSSES, entry))
    (grad,) = torch.autograd.grad(losses.sum(), values)
    assert losses.shape == clipped.shape == (4, 6) and losses.isfinite().all() and clipped.dtype == torch.bool
    assert (losses[~mask] == 0).all() and not clipped[~mask].any() and (grad[~mask] == 0).all()
    assert torch.equal(grad[mask].sign(), (old - returns)[mask].sign())


@pytest.mark.parametrize("entry", KL_ESTIMATORS, ids=by_name)
def test_kl_estimators_are_finite_and_0_at_the_reference(entry: Entry) -> None:
    torch.manual_seed(0)
    logprobs = -10 * torch.rand(3, 5)
    assert entry.function(logprobs, logprobs).abs().max() == 0
    found = entry.function(logprobs, -10 * torch.rand(3, 5))
    assert found.shape == (3, 5) and found.isfinite().all()


@pytest.mark.parametrize(
    ("control", "chosen"),
    [
        *((entry.function, defaults(KL_CONTROLLERS, entry)) for entry in KL_CONTROLLERS),
        (ppo_penalty_beta, {"target": PpoPenaltyLoss().target}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_kl_controllers_hold_at_the_target_and_never_turn_the_wrong_way(
    control: Callable[..., float], chosen: dict[str, Any]
) -> None:
    target = chosen.get("target", 1.0)
    assert control(0.25, target, 512, **chosen) == 0.25
    found = [control(0.25, share * target, 512, **chosen) for share in (0, 0.1, 0.5, 0.9, 1, 1.1, 2, 10, 1e6)]
    assert found == sorted(found) and 0.1 < found[0] <= 0.25 <= found[-1] < 1
    # the coefficient is the unit: what it was multiplied with does not depend on it
    assert control(2.5, 3 * target, 512, **chosen) == pytest.approx(10 * control(0.25, 3 * target, 512, **chosen))
    assert control(0.0, 3 * target, 512, **chosen) == 0


@pytest.mark.parametrize("entry", RULES, ids=by_name)
def test_rules_score_every_answer_with_their_default_options(entry: Entry) -> None:
    rows = [{"row": i, "prompt": "the plot", "answer": f"#### {i}"} for i in range(4)]
    scores = entry.function(rows, ["#### 0", "", "no\ufffd", "#### 3"], **defaults(RULES, entry))
    assert len(scores) == 4 and all(isinstance(score, float) for score in scores)


@pytest.mark.parametrize("entry", SCHEDULES, ids=by_name)
def test_schedules_are_factors_of_the_step(entry: Entry) -> None:
    chosen = {name: OptimBlock.model_fields[name].default for name in options_of(entry.function)}
    factors = [entry.function(step, 50, **chosen) for step in range(51)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1
