"""The frozen reference policy, and its answer log-probs computed once for a fixed dataset."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf.batch import Pairs
from rlhf.data import chat
from rlhf.data.examples import PairExample
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.recipe.stages import PreferenceRecipe
from rlhf.run.commit import write_atomic
from rlhf.train.job import Job
from rlhf.train.objectives import answer_logprobs, join, trim
from rlhf.train.supervised import Dataset, even_batches

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


def pair_logprobs(reference: Reference, data: Dataset, micro_batch: int) -> tuple[Tensor, Tensor]:
    """Summed reference log-probs of all chosen and all rejected answers, (n,) each, on every rank."""
    found = torch.zeros(2, len(data), dtype=torch.float64)
    with reference.engine.evaluating():
        for rows, is_real in even_batches(len(data), micro_batch, dist.rank(), dist.world_size()):
            pairs = data.batch(rows)
            assert isinstance(pairs, Pairs)
            both = trim(join(pairs)).to(reference.device)
            sums = answer_logprobs(reference, both).double().cpu().view(2, -1)
            if is_real:
                found[:, rows] = sums
    # Every row was filled by one rank and is zero elsewhere.
    total = dist.gather_rows(found[None]).sum(0).float()
    return total[0], total[1]


def reference_key(job: Job, tokenizer: PreTrainedTokenizerFast, examples: list[PairExample]) -> list[str]:
    """Hashes of everything that the reference's log-probs depend on: its weights, its type, and every token."""
    recipe = job.recipe
    assert isinstance(recipe, PreferenceRecipe)
    named = "reference" if recipe.reference.from_ or recipe.reference.path else "model"
    ref = recipe.reference if named == "reference" else recipe.model
    weights = job.parents[named].content_hash if named in job.parents else f"{ref.path}@{ref.revision}"
    digest = hashlib.sha256()
    for example in examples:
        for part in (example.prompt_ids, example.chosen_ids, example.rejected_ids):
            digest.update(len(part).to_bytes(4, "big") + part.tobytes())
    return [weights, recipe.model.dtype, chat.tokenizer_hash(tokenizer), digest.hexdigest()]


def cached_pair_logprobs(folder: Path, key: list[str], lengths: list[int], compute: Any) -> tuple[Tensor, Tensor]:
    """`compute()` once per content: the file's name is a hash of everything that the numbers depend on.

    key: hashes of model, tokenizer, template, rows and dtype. lengths: tokens of each row, for the check on reading.
    """
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    path = folder / f"reference-{name}.safetensors"
    if dist.from_main(path.exists() if dist.is_main() else None):
        tensors = load_file(path)
        if all(tensors[side].shape == (len(lengths),) for side in ("chosen", "rejected")):
            logger.info("reference log-probs of %d pairs read from %s", len(lengths), path)
            return tensors["chosen"], tensors["rejected"]
    chosen, rejected = compute()
    if dist.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, save({"chosen": chosen.contiguous(), "rejected": rejected.contiguous()}))
    dist.barrier()
    return chosen, rejected


def with_reference(data: Dataset, chosen: Tensor, rejected: Tensor) -> Dataset:
    """The same dataset whose pairs carry their reference log-probs."""

    def batch(rows: list[int]) -> Pairs:
        pairs = data.batch(rows)
        assert isinstance(pairs, Pairs)
        return replace(pairs, ref_chosen=chosen[rows], ref_rejected=rejected[rows])

    return Dataset(data.lengths, batch)
