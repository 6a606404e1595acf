"""Published models, asked: answers of a policy with its distance to a reference, scores of a reward model on pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from rlhf.data import collate
from rlhf.data.examples import load_examples
from rlhf.models.build import Setup, build_policy, build_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.sample import generate
from rlhf.models.tokenizer import decoder, load_tokenizer
from rlhf.recipe.schema import DataBlock, SamplingBlock
from rlhf.run.stage import StageDir

Item = TypeVar("Item")
FROZEN = Setup.frozen("fp32", "sdpa")
ROWS = 128  # rows that are sampled or scored together


@dataclass(frozen=True)
class Answers:
    """One answer to each prompt, in the order of their source."""

    texts: list[str]
    kl: list[float]  # nats per answer: log-prob under the policy - log-prob under the reference (k1, unbiased)


def load_policy(stage: StageDir) -> PolicyModule:
    """The policy that a stage published, frozen."""
    folder = str(stage.model)
    policy = PolicyModule(build_policy(folder, load_tokenizer(folder, None), FROZEN))
    policy.prove(policy)
    return policy


@torch.no_grad()
def evaluate_policy(stage: StageDir, reference: PolicyModule, prompts: str, sampling: SamplingBlock) -> Answers:
    """Sample one answer per prompt from the policy of a finished stage.

    prompts: path of a source of prompts, tokenised as the stage's own tokenizer and template say. The seed of an answer
    is the row number of its prompt, so that stages that share a tokenizer draw from equal random numbers.
    """
    policy = load_policy(stage)
    tokenizer = load_tokenizer(str(stage.model), None)
    facts = stage.read_manifest()["facts"]
    examples = load_examples(DataBlock(path=prompts), tokenizer, "prompts", seed=0).train
    texts: list[str] = []
    kl: list[float] = []
    for part in in_parts(examples, ROWS):
        rollout = generate(
            policy,
            collate.prompts(part, facts["pad_id"]),
            answers=1,
            sampling=sampling,
            stop_ids=facts["stop_ids"],
            pad_id=facts["pad_id"],
            seeds=[example.row for example in part],
            decode=decoder(tokenizer),
        )
        distances = _distances(policy, reference, rollout.ids, rollout.attention, rollout.response_mask, sampling)
        kl += distances.double().sum(-1).tolist()
        texts += rollout.texts
    return Answers(texts, kl)


def _distances(policy: PolicyModule, reference: PolicyModule, *inputs: Any) -> torch.Tensor:
    return policy(*inputs) - reference(*inputs)


def score_pairs(stage: StageDir, pairs: str) -> tuple[list[float], list[float]]:
    """Scores of the chosen and the rejected sides of a source of pairs, under the reward model of a finished stage."""
    found = RewardModel(str(stage.model)).scores(DataBlock(path=pairs)).values()
    return [chosen for chosen, _ in found], [rejected for _, rejected in found]


class RewardModel:
    """A published reward model, which reads answers with its own tokenizer and template."""

    def __init__(self, folder: str) -> None:
        self._tokenizer = load_tokenizer(folder, None)
        self._model = ScorerModule(build_scorer(folder, self._tokenizer, FROZEN, head="keep"))

    @torch.no_grad()
    def scores(self, data: DataBlock) -> dict[int, tuple[float, float]]:
        """Row number -> scores of the chosen and the rejected side, of all pairs that fit."""
        found: dict[int, tuple[float, float]] = {}
        for part in in_parts(load_examples(data, self._tokenizer, "pairs", seed=0).train, ROWS):
            batch = collate.pairs(part, self._tokenizer.pad_token_id)
            sides = [self._model(tokens.ids, tokens.attention).tolist() for tokens in (batch.chosen, batch.rejected)]
            found |= {example.row: (chosen, rejected) for example, chosen, rejected in zip(part, *sides, strict=True)}
        return found


def in_parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of `size` items, the last one perhaps shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
