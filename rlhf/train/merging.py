"""`rlhf merge`: policies that were trained from one base, put together into one. Nothing is trained, no rank is needed.

The base is loaded whole and becomes the result, tensor by tensor; of every other model one tensor is in memory.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from rlhf.algo.merging import MERGES
from rlhf.data import chat
from rlhf.errors import CheckpointError
from rlhf.models.build import build_policy, has_score_head
from rlhf.models.export import save_policy
from rlhf.models.forward import PolicyModule
from rlhf.models.load import DTYPES, read_config
from rlhf.models.stored import FROZEN, Reader, weights_of
from rlhf.models.tokenizer import ensure_pad, load_tokenizer
from rlhf.recipe.merge_options import DareMerge
from rlhf.recipe.merge_rules import merged_models
from rlhf.recipe.stages import MergeRecipe
from rlhf.run.disk import require_room
from rlhf.train.job import POLICY, Job
from rlhf.train.objectives import bind
from rlhf.train.preflight import check_kind
from rlhf.train.seeding import derive
from rlhf.train.tokenizers import check_published
from rlhf.train.writing import library_writes

logger = logging.getLogger("rlhf.merge")

# What a configuration says beside the architecture: rates of training, tokens (compared on their own), bookkeeping.
_BESIDE = ("dtype", "torch_dtype", "transformers_version", "use_cache", "vocab_size", "architectures", "_name_or_path")
_FIX = "Merge policies that were trained from the base: name the stage or folder that all of them started from."


def merge(job: Job, devices: list[str]) -> None:
    """Check the models against the base, merge, publish."""
    recipe, folder = job.recipe, job.folder
    assert isinstance(recipe, MergeRecipe)
    tokenizer = check_alike(job)
    seed = recipe.method.seed if isinstance(recipe.method, DareMerge) else 0
    folder.write_recipe(job.recipe_text, job.resolved_text)
    folder.write_provenance(devices=devices, seed=seed, parents=job.distinct_parents(), data={})
    base = build_policy(job.source("base", recipe.base), tokenizer, FROZEN, revision=recipe.base.revision)
    with ExitStack() as stack:
        readers = {
            key: stack.enter_context(weights_of(job.source(key, ref), ref.revision, base, tokenizer))
            for key, ref in merged_models(recipe)
            if key != "base"
        }
        changes = merge_into(base, readers, recipe, seed, job)
    publish(job, base.to(DTYPES[recipe.dtype]), tokenizer, changes)


# --- what can be merged -----------------------------------------------------------------------------------------------


def check_alike(job: Job) -> PreTrainedTokenizerFast:
    """Every model has the base's architecture and tokens, and the others' template. Returns the models' tokenizer."""
    recipe = job.recipe
    assert isinstance(recipe, MergeRecipe)
    first: PreTrainedTokenizerFast | None = None
    for key, ref in merged_models(recipe):
        source, where = job.source(key, ref), f"{key}.{'from' if ref.from_ else 'path'}"
        config = read_config(source, ref.revision)
        check_kind(POLICY, has_score_head(source, ref.revision), config, where, source)
        tokenizer = load_tokenizer(source, ref.revision)
        ensure_pad(tokenizer, config)
        if key == "base":  # its template may be another one: a pretrained model has often none
            base, tokens = config, chat.tokenizer_hash(tokenizer)
            continue
        check_architecture(base, config, where, source)
        if chat.tokenizer_hash(tokenizer) != tokens:
            what = f"expected the base's tokenizer, found another one in {source}"
            raise CheckpointError(what, where=where, fix=_FIX)
        chat.set_template(tokenizer, None)
        first = tokenizer if first is None else first
        if chat.template_hash(tokenizer) != chat.template_hash(first):
            what = f"expected the chat template of models.0, found another one in {source}"
            raise CheckpointError(what, where=where, fix="Train all models with the same model.chat_template.")
    assert first is not None
    return first


def check_architecture(base: PreTrainedConfig, config: PreTrainedConfig, where: str, source: str) -> None:
    """The configurations differ in nothing that makes another network."""
    wanted, found = (each.to_dict() for each in (base, config))
    for name in sorted(wanted.keys() | found.keys(), key=lambda name: (name != "model_type", name)):
        if name in _BESIDE or name.endswith("_token_id") or "drop" in name:
            continue
        pair = [each[name] if name in each else None for each in (wanted, found)]
        if pair[0] != pair[1]:
            what = f"expected the base's architecture, {name} {pair[0]}, found {pair[1]} in {source}"
            raise CheckpointError(what, where=where, fix=_FIX)


# --- merging ----------------------------------------------------------------------------------------------------------


@dataclass
class Change:
    """How far a model is from the base."""

    squares: float = 0.0
    changed: int = 0
    weights: int = 0

    def add(self, delta: Tensor) -> None:
        """Count one tensor's differences."""
        self.squares += float(delta.double().square().sum())
        self.changed += int(delta.count_nonzero())
        self.weights += delta.numel()

    def facts(self) -> dict[str, float]:
        """Euclidean norm over all weights, and the share of the weights that differ at all."""
        return {"norm": math.sqrt(self.squares), "changed": self.changed / self.weights}


@torch.no_grad()
def merge_into(
    base: nn.Module, readers: dict[str, Reader], recipe: MergeRecipe, seed: int, job: Job
) -> dict[str, Change]:
    """Replace the base's parameters by the merged ones. Returns the changes of the models by key, and of the result."""
    function, wanted = bind(MERGES, recipe.method), MERGES[recipe.method.name].inputs
    weights = torch.tensor([model.weight for model in recipe.models])
    parameters = list(base.named_parameters())  # tied weights once
    changes = {key: Change() for key in (*readers, "merged")}
    for number, (name, parameter) in enumerate(parameters):
        models = torch.stack([read_checked(read, name, parameter, key) for key, read in readers.items()])  # (M, ...)
        given: dict[str, Tensor] = {}
        if "draws" in wanted:
            generator = torch.Generator().manual_seed(derive(seed, "merge", number))
            given["draws"] = torch.rand(models.shape, generator=generator)
        merged = function(parameter, models, weights, **given)
        for key, each in zip(changes, [*models, merged], strict=True):
            changes[key].add(each - parameter)
        parameter.copy_(merged)
        job.folder.write_status(step=number + 1, total_steps=len(parameters))
    return changes


def read_checked(read: Reader, name: str, like: Tensor, key: str) -> Tensor:
    """One tensor of a model in float32, of the base's shape and finite."""
    tensor = read(name).float()
    if tensor.shape != like.shape:
        what = f"expected {name} of the base's shape {tuple(like.shape)}, found {tuple(tensor.shape)}"
        raise CheckpointError(what, where=key, fix=_FIX)
    if not tensor.isfinite().all():
        raise CheckpointError(f"expected finite weights, found NaN or infinity in {name}", where=key)
    return tensor


# --- the result -------------------------------------------------------------------------------------------------------


def publish(job: Job, model: nn.Module, tokenizer: PreTrainedTokenizerFast, changes: dict[str, Change]) -> None:
    """Write the policy as a Hugging Face folder; the manifest comes last."""
    recipe, folder = job.recipe, job.folder
    assert isinstance(recipe, MergeRecipe)
    stop_ids = chat.stop_token_ids(tokenizer, model.generation_config)
    model.generation_config.eos_token_id = stop_ids  # plain `generate` must stop where our rollouts do
    needs = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    require_room(folder.path, needs)
    target = folder.export_dir("model")
    with library_writes(target, needs):
        save_policy(PolicyModule(model), tokenizer, target)
    check_published(target, tokenizer)
    names = {key: ref.from_ or ref.path for key, ref in merged_models(recipe)} | {"merged": "merged"}
    for key, change in changes.items():
        facts = change.facts()
        logger.info("%s: %.4g away from %s, %.1f%% of its weights changed", names[key], facts["norm"], names["base"],
                    100 * facts["changed"])  # fmt: skip
    facts: dict[str, Any] = {
        "base": names["base"],
        "tokenizer_hash": chat.tokenizer_hash(tokenizer),
        "template_hash": chat.template_hash(tokenizer),
        "stop_ids": stop_ids,
        "pad_id": tokenizer.pad_token_id,
        "head": None,
        "dtype": recipe.dtype,
        "lora": False,
        "adapter_base": None,
        "changes": {key: change.facts() for key, change in changes.items()},
    }
    folder.publish("policy", facts, 0)
