"""`rlhf dpo` put together: preference losses on pairs, single answers or lists, with or without a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf.data import collate
from rlhf.data.examples import Loaded
from rlhf.data.mismatch import mismatched_partners
from rlhf.engine.engine import Engine
from rlhf.recipe.stages import PreferenceRecipe
from rlhf.train import roles
from rlhf.train.coupling import PreferenceCollector, PreferenceState
from rlhf.train.guards import check_same_weights
from rlhf.train.job import Job
from rlhf.train.parts import Parts, list_dataset, pair_dataset, steps
from rlhf.train.preference import Policy, PreferenceObjective, Term, ValueOfPromptObjective
from rlhf.train.reference import Reference, cached_logprobs, logprobs_of_rows, reference_key, with_reference
from rlhf.train.samples import shown_prompts
from rlhf.train.supervised import Dataset, SupervisedCollector


def dpo(job: Job, tokenizer: PreTrainedTokenizerFast, data: Loaded) -> Parts:
    """Preference losses. The reference speaks once, before training, and is gone, unless a loss needs it whole."""
    recipe = job.recipe
    assert isinstance(recipe, PreferenceRecipe)
    terms = tuple(Term.of(block) for block in (recipe.loss, *recipe.further_losses))
    engine = roles.policy_engine(job, tokenizer)
    reference = _Lazy(lambda: roles.reference(job, tokenizer, engine))
    train, held_out = datasets(job, tokenizer, data, terms, reference)
    whole = reference() if any(term.block.whole for term in terms) else None
    contrast = next((term.block.k for term in terms if "contrast" in term.entry.inputs), 0)
    objective = PreferenceObjective(Policy(engine, whole, contrast), recipe.train, terms)
    valued = next((term.block for term in terms if "values" in term.entry.inputs), None)
    critic = roles.prompt_critic(job, tokenizer) if valued is not None else None
    state = PreferenceState()
    rows = SupervisedCollector(train, recipe.train.batch_size, recipe.train.seed, start_check(job))
    parts = Parts(
        engines={"policy": engine},
        objectives=[objective],
        collector=PreferenceCollector(rows, objective, state, recipe.train.micro_batch, critic),
        steps=steps(recipe, train),
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

    def check(step: int, metrics: dict[str, float]) -> None:
        if step == 0 and "reference_gap" in metrics and roles.is_same_start(job):
            check_same_weights(
                metrics["reference_gap"], job.recipe.model.dtype, "policy and reference at the start"
            )

    return check


# --- rows ------------------------------------------------------------------------------------------------------------


def datasets(
    job: Job,
    tokenizer: PreTrainedTokenizerFast,
    data: Loaded,
    terms: Sequence[Term],
    reference: Callable[[], Reference],
) -> tuple[Dataset, Dataset]:
    """Training and held-out rows, with the reference's log-probs where a loss compares with it."""
    recipe = job.recipe
    assert isinstance(recipe, PreferenceRecipe)
    examples, split, pad = [*data.train, *data.eval], len(data.train), tokenizer.pad_token_id
    # Partners are sought on either side of the split alone, so that held-out answers stay unseen.
    wants_partners = any(term.needs_mismatched for term in terms)
    sides = [data.train, data.eval] if wants_partners else []
    partners = [mismatched_partners(side, recipe.train.seed) if side else [] for side in sides]

    def dataset(rows: list[Any], others: list[int] | None) -> Dataset:
        if recipe.loss.rows == "pairs":
            return pair_dataset(rows, pad)
        return list_dataset(rows, pad) if recipe.loss.rows == "lists" else answer_dataset(rows, others, pad)

    plain = [dataset(rows, partners[i] if partners else None) for i, rows in enumerate((data.train, data.eval))]
    if not any(term.block.reference for term in terms):
        return plain[0], plain[1]
    joined = partners[0] + [split + place for place in partners[1]] if partners else None
    both = dataset(examples, joined)
    columns = {"pairs": 2, "answers": 2 if wants_partners else 1}.get(recipe.loss.rows) or longest(examples)

    def compute() -> Tensor:
        return logprobs_of_rows(reference(), both, columns, recipe.train.micro_batch)

    key = reference_key(job, tokenizer, examples, joined or [])
    logprobs = cached_logprobs(job.folder.root / "cache", key, (len(examples), columns), compute)
    return with_reference(plain[0], logprobs[:split]), with_reference(plain[1], logprobs[split:])


def answer_dataset(examples: list[Any], partners: list[int] | None, pad_id: int) -> Dataset:
    """Rows for losses on single answers; a row with a mismatched answer costs both."""

    def batch(rows: list[int]) -> Any:
        others = None if partners is None else [examples[partners[i]] for i in rows]
        return collate.answers([examples[i] for i in rows], others, pad_id)

    return Dataset([len(e.prompt_ids) + len(e.answer_ids) for e in examples], batch)


def longest(examples: Sequence[Any]) -> int:
    """Answers of the longest list."""
    return max(len(example.answers) for example in examples)


class _Lazy:
    """The reference, built when it is first asked for, and once."""

    def __init__(self, build: Callable[[], Reference]) -> None:
        self._build, self._found = build, list[Reference]()

    def __call__(self) -> Reference:
        if not self._found:
            self._found.append(self._build())
        return self._found[0]
