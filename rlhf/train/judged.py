"""`rlhf dpo` put together: preference losses on pairs, single answers or lists, with or without a reference."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf.algo.selection import win_rates
from rlhf.data import collate
from rlhf.data.examples import AnswerExample, ListExample, Loaded, PairExample
from rlhf.data.mismatch import partners as mismatched_partners
from rlhf.errors import DataError
from rlhf.recipe.loss_options import CringeLoss, DroVLoss
from rlhf.recipe.pair_options import DpoLoss, PairwiseCringeLoss
from rlhf.recipe.stages import PreferenceRecipe
from rlhf.train import roles
from rlhf.train.coupling import PreferenceCollector, PreferenceState
from rlhf.train.guards import check_same_weights, check_start_loss
from rlhf.train.job import Job
from rlhf.train.parts import Parts, dataset, steps
from rlhf.train.pool import Budget
from rlhf.train.preference import Policy, PreferenceObjective, Term, ValueOfPromptObjective
from rlhf.train.reference import Reference, cached_logprobs, logprobs_of_rows, reference_key, with_reference
from rlhf.train.samples import shown_prompts
from rlhf.train.supervised import Dataset, SupervisedCollector

logger = logging.getLogger("rlhf.preference")


def dpo(job: Job, tokenizer: PreTrainedTokenizerFast, data: Loaded) -> Parts:
    """Preference losses. The reference speaks once, before training, and is gone, unless a loss needs it whole."""
    recipe = job.recipe
    assert isinstance(recipe, PreferenceRecipe)
    terms = tuple(Term.of(block) for block in recipe.losses)
    valued = next((block for block in recipe.losses if isinstance(block, DroVLoss)), None)
    budget = Budget.of(recipe)
    engine = roles.policy_engine(job, tokenizer)
    reference = _Lazy(lambda: roles.reference(job, tokenizer, engine))
    if valued is not None:
        data = with_standard_rewards(data)
    if any(block.unit_scores for block in recipe.losses):
        data = with_unit_scores(data)
    train, held_out = datasets(job, tokenizer, data, terms, reference, budget)
    whole = reference() if any(term.block.whole for term in terms) else None
    contrast = next((block.k for block in recipe.losses if isinstance(block, CringeLoss | PairwiseCringeLoss)), 0)
    objective = PreferenceObjective(Policy(engine, whole, contrast), recipe.train, terms)
    critic = roles.prompt_critic(job, tokenizer) if valued is not None else None
    state = PreferenceState()
    rows = SupervisedCollector(train, recipe.train.batch_size, recipe.train.seed, start_check(job))
    parts = Parts(
        engines={"policy": engine},
        objectives=[objective],
        collector=PreferenceCollector(rows, objective, state, budget, critic),
        steps=steps(recipe, train),
        budget=budget,
        key_metric=key_metric(recipe, has_held_out=len(held_out) > 0),
        published={"model": (engine, "policy")},
        held_out=held_out,
        prompts=shown_prompts(recipe.log, data, tokenizer),
        sampling=recipe.sampling,
        state=state,
        completed=objective.total,
    )
    if critic is not None and valued is not None:
        parts.engines["critic"] = critic
        parts.objectives.append(ValueOfPromptObjective(critic, recipe.critic, valued.tau))
        parts.published["critic"] = (critic, "value")
    return parts


def key_metric(recipe: PreferenceRecipe, *, has_held_out: bool) -> str:
    """What a stage is known by: how often its implicit reward agrees with the labels."""
    name = "accuracy" if recipe.loss.reference or recipe.loss.rows != "answers" else "reward_good"
    return f"{'eval' if has_held_out else 'train'}/{name}"


def start_check(job: Job) -> Callable[[int, dict[str, float]], None]:
    """Policy and reference agree at the start, where they are the same model."""

    assert isinstance(job.recipe, PreferenceRecipe)

    def check(step: int, metrics: dict[str, float]) -> None:
        if step == 0 and "reference_gap" in metrics and roles.is_same_start(job):
            check_same_weights(metrics["reference_gap"], job.recipe.model.dtype, "policy and reference at the start")
            for block in job.recipe.losses:
                if isinstance(block, DpoLoss) and job.recipe.data.reweight is None:
                    check_start_loss(metrics, block.beta, job.recipe.model.dtype)

    return check


# --- rows ------------------------------------------------------------------------------------------------------------


def datasets(
    job: Job,
    tokenizer: PreTrainedTokenizerFast,
    data: Loaded,
    terms: Sequence[Term],
    reference: Callable[[], Reference],
    budget: Budget,
) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, with the reference's log-probs where a loss compares with it.

    Only training rows have a mismatched answer: what looks at the whole batch has no value on held-out ones.
    """
    recipe = job.recipe
    assert isinstance(recipe, PreferenceRecipe)
    partners = None
    if any(term.needs_mismatched for term in terms):
        found = mismatched_partners(data.train, recipe.train.seed, recipe.data.max_length)
        partners = [data.train[place] for place in found]
    compares = any(term.block.reference for term in terms)

    def side(examples: list[Any], others: list[AnswerExample] | None) -> Dataset:
        data = rows_for(recipe.loss.rows, examples, others, tokenizer.pad_token_id)
        if not compares or not examples:
            return data
        columns = {"pairs": 2, "answers": 1 if others is None else 2, "lists": most_answers(examples)}[recipe.loss.rows]
        key = reference_key(job, tokenizer, [token_parts(*row) for row in zip_longest(examples, others or [])])

        def compute() -> Tensor:
            return logprobs_of_rows(reference(), data, columns, budget)

        shape = (len(examples), columns)
        return with_reference(data, cached_logprobs(job.folder.root / "cache", key, shape, compute))

    return side(data.train, partners), side(data.eval, None)


def with_standard_rewards(data: Loaded) -> Loaded:
    """Rewards with mean 0 and deviation 1 over the training rows, as the paper of DRO has them."""
    rewards = [example.reward for example in data.train]
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    if std == 0:
        what = f"expected rewards that differ, found {mean:g} in every row"
        raise DataError(what, where="data", fix="There is nothing to learn from them: add other rows.")
    logger.info("rewards of %d rows: mean %.4g, deviation %.4g; standardised", len(rewards), mean, std)

    def standard(examples: list[AnswerExample]) -> list[AnswerExample]:
        return [replace(example, reward=(example.reward - mean) / std) for example in examples]

    return replace(data, train=standard(data.train), eval=standard(data.eval))


def with_unit_scores(data: Loaded) -> Loaded:
    """Lists whose scores lie in [0, 1]: as they are, or else how often each answer beats the others of its list.

    A score is then the mean over the others of sigmoid(s_i - s_j), a reward read as a preference model.
                                                                                          [arXiv:2402.01878 sec. 3.1]
    """
    if all(0 <= score <= 1 for example in (*data.train, *data.eval) for score in example.scores):
        return data
    logger.info("scores lie outside [0, 1]: taken as win rates within their lists")

    def rated(examples: list[ListExample]) -> list[ListExample]:
        return [replace(e, scores=tuple(win_rates(torch.tensor(e.scores)).tolist())) for e in examples]

    return replace(data, train=rated(data.train), eval=rated(data.eval))


def rows_for(kind: str, examples: list[Any], others: list[AnswerExample] | None, pad_id: int) -> Dataset:
    """A dataset of one of the three kinds. others: for every row the one whose answer is put after its prompt, too."""
    if kind != "answers":
        return dataset(examples, collate.pairs if kind == "pairs" else collate.lists, pad_id)

    def batch(rows: list[int]) -> Any:
        mismatched = None if others is None else [others[i] for i in rows]
        return collate.answers([examples[i] for i in rows], pad_id, mismatched)

    lengths = [example.cost() for example in examples]
    costs = lengths
    if others is not None:  # which have a pass of their own
        second = [len(e.prompt_ids) + len(other.answer_ids) for e, other in zip(examples, others, strict=True)]
        costs = [max(both) for both in zip(lengths, second, strict=True)]
    return Dataset(lengths, costs, batch, [example.row for example in examples])


def most_answers(examples: Sequence[Any]) -> int:
    """Answers of the longest list; 0 of other rows."""
    return max((len(example.answers) for example in examples if isinstance(example, ListExample)), default=0)


def token_parts(example: Any, other: AnswerExample | None) -> list[Any]:
    """The ids that a row's reference log-probs depend on."""
    if isinstance(example, PairExample):
        answers = [example.chosen_ids, example.rejected_ids]
    elif isinstance(example, ListExample):
        answers = [ids for ids, _ in example.answers]
    else:
        answers = [example.answer_ids]
    return [example.prompt_ids, *answers, *([other.answer_ids] if other is not None else [])]


class _Lazy:
    """The reference, built when it is first asked for, and once."""

    def __init__(self, build: Callable[[], Reference]) -> None:
        self._build, self._found = build, list[Reference]()

    def __call__(self) -> Reference:
        if not self._found:
            self._found.append(self._build())
        return self._found[0]
