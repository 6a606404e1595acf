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
from rlhf.algo.kl import KL_ESTIMATORS
from rlhf.algo.policy import POLICY_LOSSES
from rlhf.algo.preference import PREFERENCE_LOSSES
from rlhf.algo.registry import Entry, Registry
from rlhf.algo.reward_model import REWARD_LOSSES
from rlhf.algo.rewards import process_scores
from rlhf.algo.schedules import SCHEDULES
from rlhf.algo.value import VALUE_LOSSES
from rlhf.batch import PairLogprobs
from rlhf.recipe import options as recipe_options
from rlhf.recipe.options import FunctionReward, KlBlock, ScoresBlock
from rlhf.recipe.schema import Block, OptimBlock
from rlhf.recipe.stages import GRPOKlBlock
from rlhf.rewards.rules import RULES

# registries whose entries are chosen by a block of options, by the field that names the choice
BY_NAME = [PREFERENCE_LOSSES, REWARD_LOSSES, ADVANTAGES, POLICY_LOSSES, VALUE_LOSSES]
BY_KIND = [RULES]
# registries whose entries are chosen by one field and share its block's other options
BY_FIELD: list[tuple[Registry, type[Block], str, set[str]]] = [
    (KL_ESTIMATORS, KlBlock, "estimator", set()),
    (KL_ESTIMATORS, GRPOKlBlock, "estimator", set()),
    (SCHEDULES, OptimBlock, "schedule", {"warmup", "min_lr_ratio"}),
]
ENTRIES = [entry for registry in [*BY_NAME, *BY_KIND, KL_ESTIMATORS, SCHEDULES] for entry in registry]
NOT_A_RULE = {"model"}  # a reward of its own module: a model, not a function


def blocks(field: str) -> dict[str, type[Block]]:
    """The option blocks of the recipe by the value of the field that chooses them."""
    found: dict[str, type[Block]] = {}
    for block in vars(recipe_options).values():
        if inspect.isclass(block) and issubclass(block, Block) and field in block.model_fields:
            (name,) = get_args(block.model_fields[field].annotation)
            assert name not in found, f"two blocks choose {name}"
            assert block.model_fields[field].default == name
            found[name] = block
    return found


def options_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def defaults(entry: Entry) -> dict[str, Any]:
    """The options of an entry as a recipe that says nothing about them has them."""
    block = {**blocks("name"), **blocks("kind")}[entry.name]
    given = {"function": __file__ + ":rate"} if block is FunctionReward else {}
    return block(**given).model_dump(include=set(options_of(entry.function)))


def rate(rows: list[dict[str, Any]], answers: list[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


@pytest.mark.parametrize(("field", "registries"), [("name", BY_NAME), ("kind", BY_KIND)])
def test_every_entry_has_a_block_and_every_block_an_entry(field: str, registries: list[Registry]) -> None:
    registered = [name for registry in registries for name in registry.names()]
    assert sorted(registered) == sorted(set(blocks(field)) - NOT_A_RULE)


@pytest.mark.parametrize("entry", [e for r in [*BY_NAME, *BY_KIND] for e in r], ids=lambda e: e.name)
def test_a_blocks_fields_are_the_functions_options(entry: Entry) -> None:
    block = {**blocks("name"), **blocks("kind")}[entry.name]
    assert set(block.model_fields) - {"name", "kind", "weight"} == set(options_of(entry.function))


@pytest.mark.parametrize(("registry", "block", "field", "shared"), BY_FIELD)
def test_a_fields_choices_are_the_registered_names(
    registry: Registry, block: type[Block], field: str, shared: set[str]
) -> None:
    assert list(get_args(block.model_fields[field].annotation)) == registry.names()
    assert shared <= set(block.model_fields)
    assert all(set(options_of(entry.function)) == shared for entry in registry)


def test_score_processing_takes_the_scores_block() -> None:
    assert set(options_of(process_scores)) == set(ScoresBlock.model_fields)


@pytest.mark.parametrize("function", [*(entry.function for entry in ENTRIES), process_scores], ids=lambda f: f.__name__)
def test_no_default_stands_in_a_signature(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters.values()
    assert all(parameter.default is inspect.Parameter.empty for parameter in parameters)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e.name)
def test_every_entry_has_a_paper_and_a_summary(entry: Entry) -> None:
    assert len(entry.paper) > 5 and entry.summary.endswith((".", "]"))


@pytest.mark.parametrize("entry", PREFERENCE_LOSSES, ids=lambda e: e.name)
def test_preference_losses_are_finite_per_pair_and_prefer_the_chosen(entry: Entry) -> None:
    torch.manual_seed(0)
    sums = [(-20 * torch.rand(8, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    lengths = torch.full((8,), 10)
    # the reference is the policy: wherever a loss has its minimum, it is on the chosen side of here
    losses = entry.function(PairLogprobs(*sums, *(s.detach() for s in sums), lengths, lengths), **defaults(entry))
    chosen, rejected = torch.autograd.grad(losses.sum(), sums)
    assert losses.shape == (8,) and losses.isfinite().all()
    assert (chosen < 0).all() and (rejected > 0).all()


@pytest.mark.parametrize("entry", REWARD_LOSSES, ids=lambda e: e.name)
def test_reward_losses_are_finite_per_pair_and_prefer_the_chosen(entry: Entry) -> None:
    torch.manual_seed(0)
    chosen = torch.randn(8, dtype=torch.float64).requires_grad_()
    rejected = chosen.detach().clone().requires_grad_()
    losses = entry.function(chosen, rejected, torch.zeros(8), **defaults(entry))
    up, down = torch.autograd.grad(losses.sum(), [chosen, rejected])
    assert losses.shape == (8,) and losses.isfinite().all()
    assert (up < 0).all() and (down > 0).all()


@pytest.mark.parametrize("entry", POLICY_LOSSES, ids=lambda e: e.name)
def test_policy_losses_are_finite_per_token_and_follow_the_advantage(entry: Entry) -> None:
    torch.manual_seed(0)
    old, advantages = -torch.rand(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    logprobs = old.clone().requires_grad_()
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [0]])
    losses, clipped = entry.function(logprobs, old, advantages, mask, **defaults(entry))
    (grad,) = torch.autograd.grad(losses.sum(), logprobs)
    assert losses.shape == clipped.shape == (4, 6) and losses.isfinite().all() and clipped.dtype == torch.bool
    assert (losses[~mask] == 0).all() and not clipped[~mask].any() and (grad[~mask] == 0).all()
    assert torch.equal(grad[mask].sign(), -advantages[mask].sign())


@pytest.mark.parametrize("entry", VALUE_LOSSES, ids=lambda e: e.name)
def test_value_losses_are_finite_per_token_and_move_towards_the_return(entry: Entry) -> None:
    torch.manual_seed(0)
    old, returns = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    values = old.clone().requires_grad_()
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [0]])
    losses, clipped = entry.function(values, old, returns, mask, **defaults(entry))
    (grad,) = torch.autograd.grad(losses.sum(), values)
    assert losses.shape == clipped.shape == (4, 6) and losses.isfinite().all() and clipped.dtype == torch.bool
    assert (losses[~mask] == 0).all() and not clipped[~mask].any() and (grad[~mask] == 0).all()
    assert torch.equal(grad[mask].sign(), (old - returns)[mask].sign())


@pytest.mark.parametrize("entry", ADVANTAGES, ids=lambda e: e.name)
def test_advantages_are_finite_and_shaped_like_what_they_judge(entry: Entry) -> None:
    torch.manual_seed(0)
    judged, values = torch.randn(4, 6), torch.randn(4, 6)
    is_per_token = "mask" in inspect.signature(entry.function).parameters
    inputs = (judged, values, torch.rand(4, 6) < 0.7) if is_per_token else (judged,)
    result = entry.function(*inputs, **defaults(entry))
    for found in result if is_per_token else (result,):
        assert found.shape == (4, 6) and found.isfinite().all() and found.dtype == torch.float32


@pytest.mark.parametrize("entry", KL_ESTIMATORS, ids=lambda e: e.name)
def test_kl_estimators_are_finite_and_0_at_the_reference(entry: Entry) -> None:
    torch.manual_seed(0)
    logprobs = -10 * torch.rand(3, 5)
    assert entry.function(logprobs, logprobs).abs().max() == 0
    found = entry.function(logprobs, -10 * torch.rand(3, 5))
    assert found.shape == (3, 5) and found.isfinite().all()


@pytest.mark.parametrize("entry", RULES, ids=lambda e: e.name)
def test_rules_score_every_answer_with_their_default_options(entry: Entry) -> None:
    rows = [{"row": i, "prompt": "the plot", "answer": f"#### {i}"} for i in range(4)]
    scores = entry.function(rows, ["#### 0", "", "no\ufffd", "#### 3"], **defaults(entry))
    assert len(scores) == 4 and all(isinstance(score, float) for score in scores)


@pytest.mark.parametrize("entry", SCHEDULES, ids=lambda e: e.name)
def test_schedules_are_factors_of_the_step(entry: Entry) -> None:
    options = {name: OptimBlock.model_fields[name].default for name in options_of(entry.function)}
    factors = [entry.function(step, 50, **options) for step in range(51)]
    assert all(0 < factor <= 1 for factor in factors) and max(factors) == 1
