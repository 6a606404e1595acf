"""beta log(policy / reference) as a score of answers, beside an explicit reward model on the same pairs."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf.algo.credit import implicit_reward
from rlhf.batch import Tokens
from rlhf.data import collate
from rlhf.data.chat import tokenizer_hash
from rlhf.data.examples import Loaded, PairExample, load_examples
from rlhf.data.show import token_texts
from rlhf.errors import CheckpointError
from rlhf.eval.comparison import Verdicts, difference, even_bins, verdicts
from rlhf.eval.implicit_text import print_record
from rlhf.eval.policy import FROZEN, RewardModel, in_parts, load_policy
from rlhf.eval.reference import COMMAND, Reference, Scale, scale_of, trained_against
from rlhf.models.build import build_policy
from rlhf.models.forward import PolicyModule
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.schema import DataBlock
from rlhf.run.commit import read_json, write_json
from rlhf.run.lineage import PROVENANCE, Parent
from rlhf.run.rundir import RunDir, resolve_parent

logger = logging.getLogger("rlhf.eval")

IMPLICIT, PER_TOKEN, EXPLICIT, LONGER = "implicit", "implicit per token", "reward model", "longer wins"
_ROWS = 32  # pairs that are scored together
_LENGTH_BINS = 5
_LIMITS = ("max_length", "max_prompt_length", "on_long", "on_empty", "train_on")


@dataclass(frozen=True)
class Question:
    """What was typed."""

    run: Path
    policy: str
    data: list[str]
    reference: str | None
    reward: str | None
    beta: float | None
    tokens: int  # rows of each dataset whose tokens are shown
    as_json: bool


@dataclass(frozen=True)
class Judges:
    """The models, found and checked, not loaded yet."""

    policy: Parent
    reference: Reference
    reward: Parent | None
    scale: Scale


@dataclass(frozen=True)
class Side:
    """One answer: its tokens that count, each with its credit."""

    ids: list[int]
    credits: list[float]
    reward: float  # their sum

    @property
    def mean(self) -> float:
        """Reward per token."""
        return self.reward / len(self.credits)


Rated = tuple[PairExample, Side, Side]  # a pair, its chosen and its rejected side


def evaluate_implicit(question: Question) -> None:
    """Score all pairs, print the comparison, write report/implicit.json. Every check comes before any model."""
    judges = find_judges(question)
    tokenizer = check_tokenizers(judges)
    blocks = [data_block(judges.policy, path) for path in question.data]
    loaded = [load_examples(block, tokenizer, "pairs", seed=0) for block in blocks]
    policy = load_policy(RunDir(judges.policy.path.parent).stage(judges.policy.name))
    reference = PolicyModule(
        build_policy(judges.reference.source, tokenizer, FROZEN, revision=judges.reference.revision)
    )
    reward = RewardModel(str(judges.reward.model)) if judges.reward else None
    datasets: list[dict[str, Any]] = []
    for block, rows in zip(blocks, loaded, strict=True):
        logger.info("scoring %s", block.path)
        rated = rate(policy, reference, rows.train, tokenizer.pad_token_id, judges.scale.beta)
        explicit = reward.scores(block) if reward else None
        first = datasets[0]["scores"] if datasets else None
        found = compare(rated, explicit, judges.scale, first)
        shown = [shown_row(pair, tokenizer) for pair in rated[: question.tokens]]
        datasets.append({"data": str(block.path), **left_out(rows, explicit, found["pairs"]), **found, "rows": shown})
    record = {
        "policy": judges.policy.name,
        "reference": judges.reference.name,
        "reward": judges.reward.name if judges.reward else None,
        "beta": judges.scale.beta,
        "datasets": datasets,
    }
    (question.run / "report").mkdir(exist_ok=True)
    write_json(question.run / "report" / "implicit.json", record)
    if question.as_json:
        print(json.dumps(record, indent=2))
    else:
        print_record(record)


# --- the models and the rows -----------------------------------------------------------------------------------------


def find_judges(question: Question) -> Judges:
    """The stages that the command line names, and what is read off them."""
    run = RunDir(question.run)
    policy = resolve_parent(question.policy, run, ("policy",), "--policy", COMMAND)
    if question.reference is None:
        reference = trained_against(policy)
    else:
        named = resolve_parent(question.reference, run, ("policy",), "--reference", COMMAND)
        reference = Reference(str(named.model), None, named.name)
    reward = None
    if question.reward is not None:
        reward = resolve_parent(question.reward, run, ("reward",), "--reward", COMMAND)
    return Judges(policy, reference, reward, scale_of(policy, question.beta))


def check_tokenizers(judges: Judges) -> PreTrainedTokenizerFast:
    """The policy's tokenizer; the reference must have the same one. A reward model reads answers in its own way."""
    tokenizer = load_tokenizer(str(judges.policy.model), None)
    other = load_tokenizer(judges.reference.source, judges.reference.revision)
    if tokenizer_hash(tokenizer) != tokenizer_hash(other):
        raise CheckpointError(
            f"expected the tokenizer of {judges.policy.path}, found another one in {judges.reference.source}",
            where=f"{COMMAND}: --reference",
            fix="Policy and reference are compared token by token: name the policy that the stage started from.",
        )
    return tokenizer


def data_block(policy: Parent, path: str) -> DataBlock:
    """A source of pairs, its rows cut or left out as those that the policy learned from."""
    recorded = read_json(policy.path / PROVENANCE)["inputs"]["recipe"]["data"]
    return DataBlock(path=path, **{key: recorded[key] for key in _LIMITS})


def left_out(rows: Loaded, explicit: dict[int, Any] | None, pairs: int) -> dict[str, Any]:
    """How many rows were read, and why some were not compared."""
    (source,) = rows.report.sources
    reasons = dict(source.dropped)
    if explicit is not None and len(rows.train) > pairs:
        reasons["does not fit the reward model"] = len(rows.train) - pairs
    return {"read": source.read, "left_out": reasons}


@torch.no_grad()
def rate(
    policy: PolicyModule, reference: PolicyModule, examples: Sequence[PairExample], pad_id: int, beta: float
) -> list[Rated]:
    """The implicit reward of both sides of every pair, token by token."""
    rated: list[Rated] = []
    for part in in_parts(examples, _ROWS):
        batch = collate.pairs(part, pad_id)
        sides = [_sides(policy, reference, tokens, beta) for tokens in (batch.chosen, batch.rejected)]
        rated += zip(part, *sides, strict=True)
    return rated


def _sides(policy: PolicyModule, reference: PolicyModule, tokens: Tokens, beta: float) -> list[Side]:
    start = max(1, int(tokens.mask.any(0).long().argmax()))  # before it no row has an answer
    mask, ids = tokens.mask[:, start:], tokens.ids[:, start:]
    inputs = (tokens.ids, tokens.attention, mask)
    credits, rewards = implicit_reward(policy(*inputs), reference(*inputs), mask, beta=beta)
    rows: list[tuple[Tensor, ...]] = list(zip(ids, credits, mask, rewards, strict=True))
    return [Side(i[m].tolist(), c[m].tolist(), float(reward)) for i, c, m, reward in rows]


def shown_row(pair: Rated, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The texts of a pair's tokens with their credit."""
    example, *sides = pair
    prompt = tokenizer.decode(example.prompt_ids.tolist(), skip_special_tokens=True)
    record: dict[str, Any] = {"row": example.row, "prompt": prompt}
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        tokens = list(zip(token_texts(tokenizer, side.ids), side.credits, strict=True))
        record[name] = {"reward": side.reward, "tokens": tokens}
    return record


# --- the comparison --------------------------------------------------------------------------------------------------


def compare(
    rated: Sequence[Rated],
    explicit: dict[int, tuple[float, float]] | None,
    scale: Scale,
    first: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every score's verdicts on the pairs that all of them rate, and which of two scores is right more often.

    explicit: scores of a reward model by row. first: the scores of the dataset that accuracies are compared with.
    """
    rated = [pair for pair in rated if explicit is None or pair[0].row in explicit]
    prompts = [example.prompt_ids.tobytes() for example, _, _ in rated]
    found = {
        IMPLICIT: verdicts([c.reward - r.reward for _, c, r in rated], prompts, log_odds=not scale.is_average),
        PER_TOKEN: verdicts([c.mean - r.mean for _, c, r in rated], prompts, log_odds=scale.is_average),
    }
    if explicit is not None:
        margins = [explicit[example.row][0] - explicit[example.row][1] for example, _, _ in rated]
        found[EXPLICIT] = verdicts(margins, prompts, log_odds=True)
    lengths = [float(len(c.ids) - len(r.ids)) for _, c, r in rated]
    found[LONGER] = verdicts(lengths, prompts, log_odds=False)
    asked = [(EXPLICIT, IMPLICIT), (EXPLICIT, PER_TOKEN), (IMPLICIT, LONGER)]
    return {
        "pairs": len(rated),
        "prompts": len(set(prompts)),
        "scores": {name: _as_dict(each, first[name] if first else None) for name, each in found.items()},
        "differences": [
            {"first": a, "second": b, **asdict(difference(found[a].margins, found[b].margins, prompts))}
            for a, b in asked
            if a in found
        ],
        "bins": length_bins(lengths, found),
    }


def _as_dict(found: Verdicts, first: dict[str, Any] | None) -> dict[str, Any]:
    """For JSON; drop: accuracy on the first dataset less accuracy here."""
    drop = None if first is None else first["accuracy"]["mean"] - found.accuracy.mean
    return {
        "accuracy": asdict(found.accuracy),
        "drop": drop,
        "margin": asdict(found.margin),
        "nll": found.nll,
        "ece": found.ece,
    }


def length_bins(lengths: Sequence[float], found: dict[str, Verdicts]) -> list[dict[str, Any]]:
    """Accuracy in groups of about equal size by how many tokens the chosen answer is longer than the rejected one."""
    bins = []
    for group in even_bins(lengths, _LENGTH_BINS):
        here = [lengths[i] for i in group]
        accuracy = {
            name: verdicts([each.margins[i] for i in group], group, log_odds=False).accuracy.mean
            for name, each in found.items()
        }
        span = {"longer_from": int(min(here)), "longer_to": int(max(here))}
        bins.append({**span, "pairs": len(group), "accuracy": accuracy})
    return bins
