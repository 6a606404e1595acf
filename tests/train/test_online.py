"""Rollouts of a small model, looked back on, topped up and cut into minibatches; on one rank and on two."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.batch import Rollout, Tokens
from rlhf.data import order
from rlhf.data.examples import PromptExample
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import DataError, RecipeError
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.recipe.schema import OptimBlock, SamplingBlock, ZeroBlock
from rlhf.recipe.stages import GRPORecipe
from rlhf.rewards.scorer import Scorer
from rlhf.train.experience import Answers, is_flat, to_experience
from rlhf.train.online import OnlineCollector, greedy_sampling, join, widened
from rlhf.train.pool import Budget, Pool
from rlhf.train.reference import Reference
from rlhf.train.rollout import Sampler
from rlhf.train.seeding import derive
from rlhf.train.state import OnlineState
from rlhf.train.supervised import Dataset

NAN = float("nan")
PAD, STOP = 0, list(range(1, 40))  # of 60 tokens: answers end early, late and not at all
SIZES = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
NUM_PROMPTS = 10


def model(kind: type, seed: int, **options: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    return kind(LlamaConfig(**SIZES, **HEADS, initializer_range=0.3, pad_token_id=PAD, **options))


def prompts() -> list[PromptExample]:
    """Ten prompts of 2 to 7 tokens, told apart by their first."""
    return [
        PromptExample(np.array([50 + i, *range(41, 42 + i % 6)]), i, {"prompt": str(i)}) for i in range(NUM_PROMPTS)
    ]


def even_ones_are_flat(rollout: Rollout) -> list[float | None]:
    """Answers to even prompts all score 1, those to odd ones score by their place in the group."""
    return [float(i % 3) if row["row"] % 2 else 1.0 for i, row in enumerate(rollout.rows)]


def collector(
    score: Callable[[Rollout], list[float | None]] = even_ones_are_flat,
    *,
    critic: bool = False,
    pretraining: Dataset | None = None,
    **train: Any,
) -> OnlineCollector:
    recipe = GRPORecipe.model_validate(
        {
            "model": {"from": "sft"},
            "data": {"path": "x"},
            "sampling": {"max_new_tokens": 6, "temperature": 0.8},
            "train": {"prompts": 4, "answers": 3, "rollout_batch": 6, "seed": 5, **train},
        }
    )
    plain = {"bf16": False}
    optim = OptimBlock()
    actor = Engine(PolicyModule(model(LlamaForCausalLM, 1)), ZeroBlock(), optim=optim, **plain)
    reference = Engine(PolicyModule(model(LlamaForCausalLM, 2)), ZeroBlock(), **plain)
    values = model(LlamaForSequenceClassification, 3, num_labels=1) if critic else None
    return OnlineCollector(
        recipe,
        prompts(),
        Sampler(STOP, PAD, str),
        actor,
        Reference(reference),
        Scorer({"mine": score}, {"mine": 1.0}),
        None,
        None if values is None else Engine(ScorerModule(values), ZeroBlock(), optim=optim, **plain),
        pretraining,
        OnlineState.at_start(recipe),
        starts_at_reference=False,
        budget=Budget(25, 4),
    )


# --- groups ---------------------------------------------------------------------------------------------------------


def test_a_group_is_flat_where_its_scored_answers_are_all_alike():
    scores = [[1, 1, 1], [1, 1, 2], [NAN, 1, 1], [NAN, 1, 2], [NAN, NAN, 3], [NAN, NAN, NAN], [0, -0.0, 0]]
    assert is_flat(torch.tensor(scores)).tolist() == [True, False, True, False, True, True, True]
    assert is_flat(torch.tensor([[7.0], [NAN]])).tolist() == [True, True]


def answers(first: int, prompts: int, lengths: list[int], width: int) -> Answers:
    """Rows of full prompts with `lengths` tokens of answer in `width` columns; ids count up from `first`."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids = first + torch.arange(len(lengths) * (prompts + width)).view(len(lengths), -1)
    attention = torch.cat([torch.ones(len(lengths), prompts, dtype=torch.bool), mask], 1)
    steps = torch.where(mask, 0.5, NAN)
    zeros = torch.zeros(len(lengths))
    return Answers(ids * attention, attention, mask, -mask.float(), zeros.bool(), zeros + first, zeros[:, None], steps)


def test_widened_pads_prompts_at_the_left_and_answers_at_the_right():
    wide = widened(answers(10, 1, [2, 1], 2), 2, 4, pad_id=99)
    assert wide.ids.tolist() == [[99, 10, 11, 12, 99, 99], [99, 13, 14, 0, 99, 99]]
    assert wide.attention.int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert wide.response_mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
    assert wide.sample_logprobs.tolist() == [[-1, -1, 0, 0], [-1, 0, 0, 0]]
    assert wide.steps.isnan().int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]
    same = answers(10, 1, [2, 1], 2)
    assert torch.equal(widened(same, 1, 2, pad_id=99).ids, same.ids)


def test_join_keeps_every_row_and_meets_at_the_widest():
    joined = join(answers(10, 3, [1], 1), answers(50, 1, [2, 3], 3), pad_id=7)
    assert joined.ids.tolist() == [[10, 11, 12, 13, 7, 7], [7, 7, 50, 51, 52, 0], [7, 7, 54, 55, 56, 57]]
    assert joined.response_mask.sum(-1).tolist() == [1, 2, 3] and joined.scores.tolist() == [10, 50, 50]
    without = replace(answers(10, 1, [1], 1), steps=None)
    assert join(without, without, pad_id=7).steps is None


# --- refills --------------------------------------------------------------------------------------------------------


def drawn(step: int, rounds: int, max_refills: int) -> list[list[int]]:
    """The prompts of each round, by the rules of the order of data."""
    first = order.rows(NUM_PROMPTS, 4, step, 5)
    numbers = [step * max_refills + refill for refill in range(rounds - 1)]
    return [first] + [order.rows(NUM_PROMPTS, 4, number, derive(5, "refill")) for number in numbers]


def prompts_of(found: Answers) -> list[int]:
    """The prompt of every third row (they are neighbours), by its first token."""
    first = found.attention.int().argmax(-1)
    which = (found.ids.gather(1, first[:, None])[:, 0] - 50).tolist()
    assert which == [number for number in which[::3] for _ in range(3)]
    return which[::3]


@pytest.mark.parametrize("max_refills", [1, 2, 6])
def test_refills_keep_groups_in_the_order_of_their_drawing(forked, max_refills):
    def body():
        one = collector(max_refills=max_refills)
        for step in range(3):
            found, metrics = one.answers(step)
            rounds = 1 + int(metrics["rollout/refills"])
            all_drawn = drawn(step, rounds, max_refills)
            varied = [[number for number in each if number % 2] for each in all_drawn]
            assert rounds == 1 + max_refills or sum(map(len, varied)) >= 4
            assert sum(map(len, varied[:-1])) < 4, "a round too many"
            expected = [number for each in varied for number in each][:4]
            expected += [number for each in all_drawn for number in each if number % 2 == 0][: 4 - len(expected)]
            assert prompts_of(found) == expected and len(found) == 12
            assert metrics["rollout/groups_kept"] == sum(number % 2 for number in expected)
            assert metrics["rollout/flat_drawn"] == sum(number % 2 == 0 for number in all_drawn[0]) / 4

    forked(body)


def test_without_a_difference_anywhere_flat_groups_fill_the_batch(forked):
    def body():
        one = collector(lambda rollout: [1.0] * len(rollout.texts), max_refills=2)
        found, metrics = one.answers(0)
        assert prompts_of(found) == drawn(0, 1, 2)[0]  # the first to be drawn
        assert metrics == {"rollout/flat_drawn": 1.0, "rollout/refills": 2.0, "rollout/groups_kept": 0.0}

    forked(body)


def test_refilled_groups_are_new_draws(forked):
    """Another prompt or another seed, so the same prompt drawn again is answered otherwise."""

    def body():
        one = collector(max_refills=8)
        rounds = [one.draw(0, refill) for refill in range(4)]
        groups: dict[int, list[list]] = {}
        for found in rounds:
            logprobs = found.sample_logprobs.view(4, 3, -1)
            for number, group in zip(prompts_of(found), logprobs, strict=True):
                groups.setdefault(number, []).append([row[row != 0].tolist() for row in group])
        again = [each for each in groups.values() if len(each) > 1]
        assert again and all(each.count(group) == 1 for each in again for group in each)
        assert torch.equal(one.draw(0, 2).ids, rounds[2].ids)

    forked(body)


def test_without_refills_a_rollout_is_what_was_drawn(forked):
    def body():
        one = collector()
        found, metrics = one.answers(1)
        assert metrics == {} and prompts_of(found) == drawn(1, 1, 0)[0]

    forked(body)


def test_greedy_answers_are_one_per_prompt_and_without_chance(forked):
    def body():
        one = collector()
        greedy = one.draw(0, 0, "greedy")
        assert len(greedy) == 4
        for row in range(4):
            ids = greedy.ids[row][greedy.attention[row]]
            start = len(ids) - int(greedy.response_mask[row].sum())
            with torch.no_grad():
                logits = one.actor.module.core(input_ids=ids[None]).logits[0]
            assert torch.equal(ids[start:], logits[start - 1 : -1].argmax(-1))
        sampling = SamplingBlock(temperature=0.8, top_p=0.5, max_new_tokens=6)
        assert greedy_sampling(sampling) == SamplingBlock(temperature=0.8, top_k=1, max_new_tokens=6)

    forked(body)


# --- looking back ---------------------------------------------------------------------------------------------------


def plain_logprobs(core: torch.nn.Module, ids: torch.Tensor, start: int) -> torch.Tensor:
    with torch.no_grad():
        logits = core(input_ids=ids[None]).logits[0] / 0.8
    return logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[start - 1 :, 0]


def test_looking_back_says_what_one_plain_forward_per_row_says(forked):
    def body():
        one = collector(critic=True)
        found = one.draw(0, 0)
        assert len(set(found.lengths().tolist())) > 2, "rows of different lengths"
        with torch.no_grad():
            seen = one.look_back(found)
        for row in range(len(found)):
            ids = found.ids[row][found.attention[row]]
            count = int(found.response_mask[row].sum())
            start = len(ids) - count
            for name, core in (
                ("old_logprobs", one.actor.module.core),
                ("ref_logprobs", one.reference.engine.module.core),
            ):
                expected = plain_logprobs(core, ids, start)
                torch.testing.assert_close(getattr(seen, name)[row, :count], expected, atol=1e-5, rtol=0)
            critic = one.critic.module.core
            with torch.no_grad():  # the value of a token is read where it is predicted
                values = critic.score(critic.model(input_ids=ids[None]).last_hidden_state)[0, start - 1 : -1, 0]
            torch.testing.assert_close(seen.old_values[row, :count], values, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            seen.old_logprobs[found.response_mask], found.sample_logprobs[found.response_mask], atol=1e-5, rtol=0
        )

    forked(body)


# --- minibatches ----------------------------------------------------------------------------------------------------


def supervised() -> Dataset:
    """Seven rows, row i of i + 2 tokens i + 1."""

    def batch(rows: list[int]) -> Tokens:
        columns = torch.arange(max(rows) + 2)
        attention = columns < torch.tensor(rows)[:, None] + 2
        return Tokens((torch.tensor(rows)[:, None] + 1) * attention, attention, attention & (columns > 0))

    lengths = [i + 2 for i in range(7)]
    return Dataset(lengths, lengths, batch)


def experience_of(one: OnlineCollector, step: int):
    found = one.draw(step, 0)
    with torch.no_grad():
        return to_experience(found, one.look_back(found), one.recipe, one.state)


def rows_of(pools: list[Pool]) -> list[Any]:
    """All rows of every pool."""
    return [pool.batch(list(range(len(pool)))) for pool in pools]


def row_ids(batch) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for row in batch.ids]


def test_minibatches_have_every_row_once_per_pass(forked):
    def body():
        one = collector(inner_epochs=2, minibatches=3, pretraining=supervised())
        whole = experience_of(one, 0)
        pools = one.minibatches(0, whole)
        shares = rows_of(pools)
        assert len(shares) == 6 and all(len(share) == 4 for share in shares)
        assert all(len(pool.of("ptx")) == 4 and pool.of("policy") is pool for pool in pools)
        passes = [sum((row_ids(share) for share in shares[i : i + 3]), []) for i in (0, 3)]
        assert sorted(passes[0]) == sorted(passes[1]) == sorted(row_ids(whole)) and passes[0] != passes[1]
        by_ids = dict(zip(row_ids(whole), range(len(whole)), strict=True))
        for share in shares:
            rows = [by_ids[ids] for ids in row_ids(share)]
            assert torch.equal(share.advantages, whole.advantages[rows]) and torch.equal(
                share.scores, whole.scores[rows]
            )
        again, other = rows_of(one.minibatches(0, whole)), rows_of(one.minibatches(1, whole))
        assert [row_ids(share) for share in again] == [row_ids(share) for share in shares]
        assert [row_ids(share) for share in other] != [row_ids(share) for share in shares]

    forked(body)


def test_supervised_rows_go_on_where_the_last_step_ended(forked):
    def body():
        one = collector(inner_epochs=1, minibatches=3, pretraining=supervised())
        whole = experience_of(one, 0)
        seen = [
            int(row.max()) - 1
            for step in range(7)
            for share in rows_of([pool.of("ptx") for pool in one.minibatches(step, whole)])
            for row in share.ids
        ]
        assert len(seen) == 7 * 12 and all(seen.count(row) == 12 for row in range(7))  # twelve whole epochs
        assert collector(minibatches=3).minibatches(0, whole)[0].further == {}

    forked(body)


# --- on several ranks -----------------------------------------------------------------------------------------------


def test_an_error_of_one_rank_is_the_error_of_all(two_ranks):
    def body(rank: int) -> list[str]:
        told = []
        for failing in (0, 1, None):

            def work(failing=failing) -> int:
                if rank == failing:
                    raise DataError(f"rank {rank} has no answer", where="rows:3")
                return rank

            try:
                told.append(str(dist.agreed(work)))
            except DataError as error:
                told.append(error.what)
        return told

    first, second = two_ranks(body)
    assert first == ["rank 0 has no answer", "rank 1 has no answer", "0"]
    assert second == ["rank 0 has no answer", "rank 1 has no answer", "1"]


def test_each_rank_tells_its_own_error_where_both_fail(two_ranks):
    def body(rank: int) -> str:
        try:
            dist.agreed(lambda: (_ for _ in ()).throw(RecipeError(f"rank {rank}", where="here")))
        except RecipeError as error:
            return error.what
        return ""

    assert two_ranks(body) == ["rank 0", "rank 1"]


def test_two_ranks_collect_what_one_does(forked, two_ranks):
    """The same answers in the same order, the same numbers about them, and each half of every minibatch."""

    def collect() -> list[Any]:
        one = collector(max_refills=2, inner_epochs=1, minibatches=2, critic=True, pretraining=supervised())
        collected = one.collect(0)
        numbers = {name: value for name, value in collected.metrics.items() if not name.startswith("speed/")}
        cut = [list(pool.of(group).cut(one.budget)) for pool in collected.minibatches for group in ("policy", "ptx")]
        return [[[micro.rows.ids for micro in micros if micro.is_real] for micros in cut], list(map(len, cut)), numbers]

    read, write = os.pipe()

    def body():
        with os.fdopen(write, "wb") as pipe:
            pickle.dump(collect(), pipe)

    forked(body)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        shares, _, numbers = pickle.load(pipe)
    ranks = two_ranks(lambda rank: collect())
    assert ranks[0][1] == ranks[1][1], "turns of each rank"
    for _, _, told in ranks:
        assert told.keys() == numbers.keys()
        for name, value in numbers.items():
            assert told[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    for index, expected in enumerate(shares):
        both = [row for found, _, _ in ranks for row in real_tokens(found[index])]
        assert sorted(both) == sorted(real_tokens(expected)) and len(both) == 6, index


def real_tokens(batches: list[torch.Tensor]) -> list[tuple[int, ...]]:
    """The rows of several batches without their padding."""
    return [tuple(token for token in row if token != PAD) for ids in batches for row in ids.tolist()]
