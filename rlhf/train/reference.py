"""The frozen reference policy, and its answer log-probs computed once for a fixed dataset."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf.batch import Answers, Lists, Pairs
from rlhf.data import chat
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.errors import NumericsError
from rlhf.recipe.stages import PreferenceRecipe
from rlhf.run.commit import write_atomic
from rlhf.train import memory
from rlhf.train.job import Job
from rlhf.train.objectives import answer_logprobs, join, trim
from rlhf.train.pool import Budget, Micro, at_places
from rlhf.train.supervised import Dataset

logger = logging.getLogger("rlhf.reference")


@dataclass(frozen=True)
class Reference:
    """Called like the policy's engine. With `is_base` it is the trained LoRA policy with its adapter switched off.

    role: the reference's, where the engine's module plays several.
    """

    engine: Engine
    is_base: bool = False
    role: str | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.role is not None:
            return self.engine(*args, role=self.role, **kwargs)
        if not self.is_base:
            return self.engine(*args, **kwargs)
        with self.engine.module.adapter_off():
            return self.engine(*args, **kwargs)

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self.engine.device


def logprobs_of_rows(reference: Reference, data: Dataset, columns: int, budget: Budget) -> Tensor:
    """Summed reference log-probs of every answer of every row, (n, columns), on every rank.

    columns: 2 of pairs, 1 of answers (2 with a mismatched one), the longest list's number of lists.
    """
    found: list[tuple[Micro, Tensor]] = []
    with memory.phase("log-probs of the reference", "train.micro_tokens"), reference.engine.evaluating():
        for micro in data.pool().cut(budget):
            sums = _columns(reference, micro.rows).float().cpu()
            found.append((micro, torch.nn.functional.pad(sums, (0, columns - sums.shape[1]))))
    return at_places(found, len(data))


def _columns(reference: Reference, batch: Any) -> Tensor:
    """Log-prob sums of a batch's answers, one row each."""

    def ask(tokens: Any) -> Tensor:
        return answer_logprobs(reference, trim(tokens).to(reference.device))

    if isinstance(batch, Pairs):
        return torch.stack(ask(join(batch)).chunk(2), dim=-1)
    if isinstance(batch, Answers):
        sides = [batch.tokens] if batch.mismatched is None else [batch.tokens, batch.mismatched]
        return torch.stack([ask(side) for side in sides], dim=-1)
    assert isinstance(batch, Lists)
    sums = ask(batch.answers())
    present = batch.present.to(sums.device)
    return sums.new_zeros(present.shape).masked_scatter(present, sums)


def reference_key(job: Job, tokenizer: PreTrainedTokenizerFast, rows: Sequence[Sequence[Any]]) -> list[str]:
    """Hashes of everything that the reference's log-probs depend on: its weights, its type, and every token.

    rows: of every row the prompt's ids, then those of every answer.
    """
    recipe = job.recipe
    assert isinstance(recipe, PreferenceRecipe)
    named = "reference" if recipe.reference.from_ or recipe.reference.path else "model"
    ref = recipe.reference if named == "reference" else recipe.model
    weights = job.parents[named].content_hash if named in job.parents else f"{ref.path}@{ref.revision}"
    digest = hashlib.sha256()
    for row in rows:
        for part in row:
            digest.update(len(part).to_bytes(4, "big") + part.tobytes())
    return [weights, recipe.model.dtype, chat.tokenizer_hash(tokenizer), digest.hexdigest()]


def cached_logprobs(folder: Path, key: list[str], shape: tuple[int, int], compute: Callable[[], Tensor]) -> Tensor:
    """`compute()` once per content: the file's name is a hash of everything that the numbers depend on.

    key: hashes of model, tokenizer, template, rows and dtype. shape: of the result, for the check on reading.
    """
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    path = folder / f"reference-{name}.safetensors"
    if dist.from_main(path.exists() if dist.is_main() else None):
        found = load_file(path)["logprobs"]
        if tuple(found.shape) == shape:
            logger.info("reference log-probs of %d rows read from %s", shape[0], path)
            return found
    found = compute()
    if not found.isfinite().all():
        bad = (~found.isfinite()).any(-1).nonzero().flatten().tolist()
        raise NumericsError(
            f"expected finite log-probs, found {len(bad)} of {shape[0]} rows with others, the first is row {bad[0]}",
            where="reference",
            fix="Look at the reference's weights, or take fp32 (model.dtype).",
        )
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"logprobs": found.contiguous()}))
    dist.barrier()
    return found


def with_reference(data: Dataset, logprobs: Tensor) -> Dataset:
    """The same dataset whose rows carry their reference log-probs, (n, columns)."""

    def batch(rows: list[int]) -> Any:
        found, given = data.batch(rows), logprobs[rows]
        if isinstance(found, Answers):
            mismatched = None if found.mismatched is None else given[:, 1]
            return replace(found, ref=given[:, 0], ref_mismatched=mismatched)
        return replace(found, ref=given[:, : found.present.shape[1]] if isinstance(found, Lists) else given)

    return replace(data, batch=batch)
