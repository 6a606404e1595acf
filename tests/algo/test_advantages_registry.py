"""What every advantage estimator has in common, whichever entry of the registry it is."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from rlhf.algo.advantages import ADVANTAGES
from rlhf.algo.registry import Entry
from rlhf.recipe.fields import shape_of, tags
from rlhf.recipe.policy_options import Estimator, GroupAdvantage

BLOCKS = tags(shape_of(GroupAdvantage))


def defaults(entry: Entry) -> dict[str, object]:
    return BLOCKS[entry.name]().model_dump(include=set(inspect.signature(entry.function).parameters))


def by_name(entry: Entry) -> str:
    return entry.name


N, G, R = 4, 3, 6
ROWS = torch.arange(N * G).reshape(N, G)
Rollout = dict[str, Tensor]


def rollout(seed: int) -> Rollout:
    """What estimators can ask for, of N prompts with G answers of 1 to R tokens, with a score on each last token."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, R + 1, (N * G, 1))
    columns = torch.arange(R)
    mask, is_last = columns < lengths, columns == lengths - 1
    scores = torch.randn(N * G, dtype=torch.float64)
    penalties = torch.where(mask, -0.1 * torch.rand(N * G, R, dtype=torch.float64), 0.0)
    steps = torch.randn(N * G, R, dtype=torch.float64)
    ends = is_last | (mask & (torch.rand(N * G, R) < 0.3))
    return {
        "mask": mask,
        "scores": scores,
        "greedy_scores": torch.randn(N, dtype=torch.float64).repeat_interleave(G),
        "penalties": penalties,
        "rewards": penalties + torch.where(is_last, scores.unsqueeze(-1), 0.0),
        "values": torch.randn(N * G, R, dtype=torch.float64),
        "group_returns": scores + penalties.sum(-1),
        "step_scores": torch.where(ends, steps, torch.nan),
        "baseline": torch.tensor(0.25, dtype=torch.float64),
    }


def rows_of(given: Rollout, rows: Tensor) -> Rollout:
    return {name: value[rows.flatten()] if value.dim() else value for name, value in given.items()}


def unscored(given: Rollout, rows: Tensor) -> Rollout:
    """The same rollout with answers that no reward could judge; all else about them is arbitrary."""
    given = {name: value.clone() for name, value in given.items()}
    for name in ("scores", "group_returns", "step_scores"):
        given[name][rows] = torch.nan
    given["rewards"][rows] = given["rewards"][rows].masked_fill(given["rewards"][rows] != 0, torch.nan)
    given["penalties"][rows], given["values"][rows] = 1e6, -1e6
    return given


def advantages_of(entry: Entry, given: Rollout) -> Tensor:
    """The advantages of a rollout, those per answer on each of its tokens: (B, R)."""
    mask, num_rows = given["mask"], len(given["mask"])
    groups = {"group_returns": (-1, G), "step_scores": (-1, G, R)}
    inputs = [given[name].reshape(groups.get(name, given[name].shape)) for name in entry.inputs]
    found = entry.function(*inputs, **defaults(entry))
    found = found[0] if isinstance(found, tuple) else found
    assert found.shape in {(num_rows // G, G), (num_rows, R), (num_rows // G, G, R)}
    assert found.isfinite().all() and found.dtype == torch.float64
    return torch.where(mask, found.reshape(num_rows, -1), 0.0)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("entry", ADVANTAGES, ids=by_name)
def test_estimators_know_the_types_they_are_given(entry: Entry) -> None:
    given = {name: value if value.dtype == torch.bool else value.float() for name, value in rollout(0).items()}
    groups = {"group_returns": (-1, G), "step_scores": (-1, G, R)}
    inputs = [given[name].reshape(groups.get(name, given[name].shape)) for name in entry.inputs]
    found = entry.function(*inputs, **defaults(entry))
    parts = found if isinstance(found, tuple) else (found,)
    assert all(part.dtype == torch.float32 and part.isfinite().all() for part in parts)
    wide = advantages_of(entry, rollout(0))
    narrow = torch.where(given["mask"], parts[0].reshape(N * G, -1), 0.0)
    torch.testing.assert_close(narrow.double(), wide, atol=1e-4, rtol=0)
    half = [value if value.dtype == torch.bool else value.bfloat16() for value in inputs]
    found = entry.function(*half, **defaults(entry))
    assert all(part.dtype == torch.float32 for part in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize("entry", ADVANTAGES, ids=by_name)
def test_estimators_do_not_see_padding(entry: Entry) -> None:
    given = rollout(1)
    wanted = advantages_of(entry, given)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        dirty = {
            name: torch.where(given["mask"], value, garbage) if name in ("rewards", "values", "penalties") else value
            for name, value in given.items()
        }
        assert torch.equal(advantages_of(entry, dirty), wanted)


@pytest.mark.parametrize("entry", ADVANTAGES, ids=by_name)
def test_estimators_do_not_depend_on_the_order_of_prompts_or_of_answers(entry: Entry) -> None:
    given = rollout(2)
    wanted = advantages_of(entry, given)
    for order in (ROWS[[2, 0, 3, 1]], ROWS[:, [1, 2, 0]]):
        close(advantages_of(entry, rows_of(given, order)), wanted[order.flatten()])


@pytest.mark.parametrize("entry", ADVANTAGES, ids=by_name)
def test_an_unscored_answer_has_advantage_0_and_influences_nothing(entry: Entry) -> None:
    given = rollout(3)
    lost = torch.tensor([1, 5])
    found = advantages_of(entry, unscored(given, lost))
    assert (found[lost] == 0).all()
    # whatever the answer was
    others = torch.ones(N * G, dtype=torch.bool).index_fill(0, lost, False)
    other = unscored({**given, "mask": given["mask"].index_fill(0, lost, True)}, lost)
    close(advantages_of(entry, other)[others], found[others])
    # a prompt without a score might as well not be there
    rest = torch.cat([ROWS[:1], ROWS[2:]])
    found = advantages_of(entry, unscored(given, ROWS[1]))
    assert (found[ROWS[1]] == 0).all()
    close(found[rest.flatten()], advantages_of(entry, rows_of(given, rest)))
    assert (advantages_of(entry, unscored(given, ROWS.flatten())) == 0).all()


@pytest.mark.parametrize("entry", ADVANTAGES, ids=by_name)
def test_a_comparison_needs_two_scored_answers(entry: Entry) -> None:
    given = rollout(4)
    alone = advantages_of(entry, unscored(given, ROWS[:, 1:].flatten()))
    block = BLOCKS[entry.name]
    assert issubclass(block, Estimator)
    assert block.needs_group is bool((alone == 0).all())


@pytest.mark.parametrize("entry", ADVANTAGES, ids=by_name)
def test_the_better_answer_has_the_larger_advantage(entry: Entry) -> None:
    given = rollout(5)
    mask = torch.ones(N * G, R, dtype=torch.bool)
    at_the_end = torch.where(torch.arange(R) == R - 1, given["scores"].unsqueeze(-1), 0.0)
    nothing = torch.zeros(N * G, R, dtype=torch.float64)
    given |= {"mask": mask, "rewards": at_the_end, "values": nothing, "penalties": nothing}
    given |= {"group_returns": given["scores"], "step_scores": torch.where(at_the_end == 0, torch.nan, at_the_end)}
    found = advantages_of(entry, given).reshape(N, G, R)
    by_score = given["scores"].reshape(N, G).argsort(-1)
    ordered = found.gather(1, by_score.unsqueeze(-1).expand(N, G, R))
    assert (ordered.diff(dim=1) > 0).all()
