"""Preference learning: views of batches, sums of losses, the same update on any number of ranks and micro-batches."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.batch import AnswerLogprobs, Answers, ListLogprobs, Lists, Pairs, Tokens
from rlhf.data import collate
from rlhf.data.examples import AnswerExample, ListExample, PairExample
from rlhf.engine import dist
from rlhf.engine.engine import sum_terms
from rlhf.models.build import Setup, build_policy, build_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.fields import shape_of
from rlhf.recipe.options import PreferenceLoss
from rlhf.recipe.pair_options import CpoLoss, DpoLoss, PreferredFtLoss
from rlhf.recipe.schema import InitBlock, OptimBlock
from rlhf.train.coupling import PreferenceCollector, PreferenceState
from rlhf.train.describe_preferences import describe, kendall_tau
from rlhf.train.judged import rows_for
from rlhf.train.loop import counted
from rlhf.train.pool import Budget
from rlhf.train.preference import Policy, PreferenceObjective, Term, flat, folded, view_of
from rlhf.train.reference import Reference, logprobs_of_rows, with_reference
from rlhf.train.supervised import SupervisedCollector

BLOCKS = {block.model_fields["name"].default: block for block in shape_of(PreferenceLoss).blocks}
INIT = InitBlock(hidden=16, layers=1, heads=2, ffn=32, vocab=300, context=64)
PAD = 0


# --- rows ------------------------------------------------------------------------------------------------------------


def ids(draw: np.random.Generator, low: int, high: int) -> np.ndarray:
    return draw.integers(5, 260, draw.integers(low, high)).astype(np.int32)


def answer(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    found = ids(draw, 2, 9)
    return found, np.ones(len(found), np.bool_)


def examples(kind: str, count: int = 8) -> list:
    draw = np.random.default_rng(7)
    found: list = []
    for row in range(count):
        prompt = ids(draw, 2, 6)
        if kind == "pairs":
            (chosen, a), (rejected, b) = answer(draw), answer(draw)
            found.append(
                PairExample(prompt, chosen, a, rejected, b, 0.0, row, (1.0 + row, 0.5), (0.8, 0.1 * (row % 3)))
            )
        elif kind == "answers":
            found.append(AnswerExample(prompt, *answer(draw), row % 3 > 0, 0.5 * row - 2, 0.3 + row / 20, row))
        else:
            size = 2 + row % 3
            scores = tuple(float(x) for x in draw.permutation(size) / size)
            found.append(ListExample(prompt, tuple(answer(draw) for _ in range(size)), scores, row))
    return found


def setup(seed: int, *, trained: bool) -> Setup:
    return Setup("fp32", "sdpa", None, gradient_checkpointing=False, dropout=False, trained=trained, seed=seed)


class Bare:
    """A module where an engine stands, so that gradients can be looked at before anything is made of them."""

    device = torch.device("cpu")

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    def __call__(self, *args, **options):
        return self.module(*args, **options)

    def evaluating(self):
        return torch.no_grad()


def updates(budget: Budget) -> dict[str, list[float]]:
    """Loss, gradient norm and a projection of the gradient of every loss, on as many ranks as there are."""
    tokenizer = train_tokenizer(["a b c d e f g"] * 3, 300, None)
    optim = OptimBlock()
    policy = Bare(PolicyModule(build_policy(INIT, tokenizer, setup(1, trained=True))))
    reference = Reference(Bare(PolicyModule(build_policy(INIT, tokenizer, setup(2, trained=False)))))
    critic = Bare(ScorerModule(build_scorer(INIT, tokenizer, setup(3, trained=True), head="new")))
    parameters = list(policy.module.parameters())
    found = {}
    for name, block in BLOCKS.items():
        rows = examples(block.rows)
        others = rows[1:] + rows[:1] if name == "kto" else None
        data = rows_for(block.rows, rows, others, PAD)
        columns = {"pairs": 2, "answers": 1 if others is None else 2, "lists": 4}[block.rows]
        data = with_reference(data, logprobs_of_rows(reference, data, columns, budget))
        whole = reference if block.whole else None
        contrast = 5 if "contrast" in PREFERENCE_LOSSES[name].inputs else 0
        objective = PreferenceObjective.of(Policy(policy, whole, contrast), optim, block())
        source = SupervisedCollector(data, 8, 0, lambda step, metrics: None)
        valued = critic if name == "dro_v" else None
        collector = PreferenceCollector(source, objective, PreferenceState(), budget, valued)
        (pool,) = collector.collect(0).minibatches
        micros = list(pool.cut(budget))
        counts = counted(objective, micros)
        divisors = {key: value or 1.0 for key, value in counts.items()}
        parts = [sum_terms(micro.weighed(objective.loss(micro.rows)), divisors) for micro in micros]
        total = torch.stack(parts).sum()
        gradients = torch.autograd.grad(total, parameters)
        joined = torch.cat([gradient.flatten() for gradient in gradients]).double()
        everything = dist.gather_rows(torch.cat([total.detach().double()[None], joined])[None]).sum(0)
        gradient = everything[1:]
        direction = torch.linspace(-1, 1, len(gradient), dtype=torch.float64)
        found[name] = [float(everything[0]), float(gradient.norm()), float(gradient @ direction)]
    return found


def test_ranks_and_micro_batches_change_no_update(forked, two_ranks, tmp_path):
    def alone(budget: Budget) -> None:
        torch.save(updates(budget), tmp_path / f"{budget.tokens}.pt")

    forked(lambda: alone(Budget(10_000)))
    forked(lambda: alone(Budget(64, 3)))
    whole, cut = (torch.load(tmp_path / f"{tokens}.pt") for tokens in (10_000, 64))
    first, second = two_ranks(lambda rank: updates(Budget(25)))  # with stand-ins
    few, _ = two_ranks(lambda rank: updates(Budget(300)))
    assert first == second
    for name, expected in whole.items():
        assert expected[1] > 0 and math.isfinite(expected[1]), name
        for found in (cut[name], first[name], few[name]):
            assert found == pytest.approx(expected, rel=2e-5, abs=2e-5), name


# --- views -----------------------------------------------------------------------------------------------------------


def test_a_batch_of_lists_goes_flat_and_comes_back():
    lists = collate.lists(examples("lists", 3), PAD)
    assert lists.present.sum(-1).tolist() == [2, 3, 4]
    tokens = flat(lists)
    assert len(tokens) == 9 and bool(tokens.attention.any(-1).all())
    back = folded(lists, torch.arange(9.0))
    assert back.tolist() == [[0, 1, 0, 0], [2, 3, 4, 0], [5, 6, 7, 8]]
    view = view_of(replace(lists, ref=torch.zeros(3, 4)), back, folded(lists, torch.ones(9)))
    assert isinstance(view, ListLogprobs) and view.scores.equal(lists.scores)


def test_mismatched_prompts_keep_their_own_prompt():
    rows = examples("answers", 2)
    batch = collate.answers(rows, PAD, [rows[1], rows[0]])
    length = len(rows[0].prompt_ids)
    assert batch.mismatched.ids[0, :length].tolist() == rows[0].prompt_ids.tolist()
    assert batch.mismatched.ids[0, length : length + 2].tolist() == rows[1].answer_ids[:2].tolist()


# --- sums and metrics ------------------------------------------------------------------------------------------------


class Given:
    """Stands where the policy's engine stands: log-probs that name their token."""

    device = torch.device("cpu")

    def __call__(self, ids, attention, mask, **_):
        return -ids[:, -mask.shape[1] :].float() / 100 * mask


def pairs() -> Pairs:
    return replace(collate.pairs(examples("pairs", 4), PAD), ref=-torch.ones(4, 2))


def test_the_total_is_the_weighted_sum_of_all_parts():
    blocks = (DpoLoss(beta=0.3), PreferredFtLoss(weight=0.2), CpoLoss(weight=2.0))
    objective = PreferenceObjective.of(Policy(Given()), OptimBlock(), *blocks)
    batch = pairs()
    loss, counts = objective.loss(batch), {name: float(n) for name, n in objective.counts(batch).items()}
    means = {f"train/{name}": float(total) / counts[unit] for name, (total, unit) in loss.metrics.items()}
    assert set(loss.terms) == {
        "loss_dpo",
        "loss_preferred_ft_per_chosen_tokens",
        "loss_cpo",
        "loss_cpo_per_chosen_tokens",
    }
    assert objective.total(means) == {"train/loss": pytest.approx(float(sum_terms(loss, counts)))}


def test_metrics_of_pairs_by_hand():
    traits = PREFERENCE_LOSSES["dpo"].traits
    view = view_of(
        Pairs(*[tokens(2)] * 2, torch.zeros(2), ref=torch.tensor([[-2.0, -2.0], [-1.0, -1.0]])),
        torch.tensor([[-1.0, -3.0], [-2.0, -2.0]]),
        torch.tensor([[2.0, 2.0], [4.0, 1.0]]),
    )
    found = {name: float(total) for name, (total, _) in describe(view, traits, 0.5).items()}
    assert found["accuracy"] == 1 and found["ties"] == 1 and found["margin"] == 0.5 * (1 + 1)
    assert found["both_fell"] == 1 and found["chosen_displaced"] == 1
    assert found["kl"] == (-1 + 1) / 2 + (1 + 1) / 2 and found["reference_gap"] == 1 / 2 + 1 / 4
    assert found["logprobs_chosen_mean"] == -1 / 2 - 2 / 4


def tokens(rows: int) -> Tokens:
    return Tokens(torch.ones(rows, 3, dtype=torch.int64), *[torch.ones(rows, 3, dtype=torch.bool)] * 2)


def test_metrics_of_answers_are_split_by_label():
    traits = PREFERENCE_LOSSES["kto"].traits
    view = AnswerLogprobs(
        torch.tensor([-1.0, -4.0]), torch.tensor([-2.0, -3.0]), torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    )
    found = {name: (float(total), unit) for name, (total, unit) in describe(view, traits, 2.0).items()}
    assert found["reward_good"] == (2.0, "good") and found["reward_bad"] == (-2.0, "bad")
    assert found["accuracy"] == (2.0, "rows") and found["good_displaced"] == (0.0, "good")


def test_kendall_tau_counts_pairs_of_present_answers_with_unequal_scores():
    present = torch.tensor([[True, True, True], [True, True, False]])
    scores = torch.tensor([[3.0, 2.0, 2.0], [1.0, 2.0, 9.0]])
    found = torch.tensor([[1.0, 2.0, 0.0], [5.0, 6.0, 0.0]])
    assert kendall_tau(found, scores, present).tolist() == [0.0, 1.0]


def test_a_batch_without_good_answers_has_no_mean_of_them():
    rows = [replace(row, is_good=False) for row in examples("answers", 3)]
    batch = replace(collate.answers(rows, PAD), ref=-torch.ones(3))
    objective = PreferenceObjective.of(Policy(Given()), OptimBlock(), BLOCKS["npo"]())
    assert isinstance(batch, Answers) and int(objective.counts(batch)["good"]) == 0
    assert "good" in objective.optional and float(objective.loss(batch).terms["loss_npo_per_bad"][0]) > 0


def test_displacement_is_told_once(forked):
    def body() -> None:
        said: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("rlhf.preference").addHandler(handler)
        objective = PreferenceObjective.of(Policy(Given()), OptimBlock(), DpoLoss())
        collector = PreferenceCollector(None, objective, PreferenceState(), 4)
        for fell in [0.9] * 9 + [0.1] + [0.9] * 12:
            collector.learned(0, {"train/both_fell": fell, "train/loss_dpo": 1.0})
        assert len(said) == 1 and "likelihood displacement" in said[0], said

    forked(body)


def test_the_state_of_a_coupling_survives_a_checkpoint():
    state = PreferenceState({"bco": {"count": 8.0, "mean": 0.25}})
    again = PreferenceState()
    again.restore(state.as_json())
    assert again == state


def test_every_block_is_bound_to_its_function():
    for name, block in BLOCKS.items():
        term = Term.of(block())
        assert term.entry.name == name and term.reward_scale > 0


def test_absent_answers_never_reach_the_model():
    lists = collate.lists(examples("lists", 4), PAD)
    assert isinstance(lists, Lists) and len(lists.answers()) == int(lists.present.sum())
