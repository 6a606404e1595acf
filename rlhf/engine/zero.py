"""From a recipe's `zero` block to DeepSpeed's configuration, and the few tools that sharded parameters need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.zero.utils import is_zero_param
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from rlhf.recipe.schema import OptimBlock, ZeroBlock

_QUIET = {"steps_per_print": 10**9, "wall_clock_breakdown": False}


def trained_config(zero: ZeroBlock, optim: OptimBlock, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed configuration of a trained model. The accumulation boundary is ours: `step()` is where ranks meet."""
    return {
        **_QUIET,
        "train_micro_batch_size_per_gpu": 1,  # a formality: rows are counted by the trainer, before any backward
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # At stage 0 the engine clips by itself, in a hook that also sees the norm before the step.
        "gradient_clipping": optim.max_grad_norm if zero.stage else 0.0,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},  # else it steps with what is not finite
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero(zero, train=True),
    }


def frozen_config(zero: ZeroBlock, *, bf16: bool) -> dict[str, Any]:
    """DeepSpeed configuration of a frozen model: stage 0 or 3 (1 and 2 shard an optimizer that it does not have)."""
    # Without these bounds a small frozen model would stay fully gathered after its first forward.
    limits = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0} if zero.stage == 3 else {}
    return {
        **_QUIET,
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": bf16},
        "zero_optimization": _zero(zero, train=False) | limits,
    }


def _zero(zero: ZeroBlock, *, train: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": False,  # caller-owned accumulation allows overlap at stage 2 only; one rule for all stages
        "reduce_bucket_size": zero.bucket_size,
        "allgather_bucket_size": zero.bucket_size,
    }
    if zero.stage == 3:
        config |= {
            "stage3_param_persistence_threshold": zero.persistence_threshold,
            "stage3_prefetch_bucket_size": zero.bucket_size,
        }
        if zero.offload_params:
            config["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if train and zero.offload_optimizer:
        config["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config


@contextmanager
def sharded_loading(zero: ZeroBlock, *, bf16: bool) -> Iterator[None]:
    """Inside, transformers' `from_pretrained` gives every rank only its shard (stage 3); other stages are untouched."""
    if zero.stage != 3:
        yield
        return
    config = HfDeepSpeedConfig(frozen_config(zero, bf16=bf16))  # transformers keeps only a weak reference to it
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del config


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The shape of a parameter before sharding."""
    return torch.Size(parameter.ds_shape) if is_sharded(parameter) else parameter.shape


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """True for a parameter that DeepSpeed keeps in pieces (ZeRO-3)."""
    return is_zero_param(parameter)


def held_elements(module: torch.nn.Module) -> tuple[int, int]:
    """(elements this rank keeps between uses, elements of the whole model) over all parameters."""
    held = total = 0
    for parameter in module.parameters():
        elements = full_shape(parameter).numel()
        total += elements
        held += parameter.ds_tensor.numel() if is_sharded(parameter) and not parameter.ds_persist else elements
    return held, total


def held_bytes(parameters: Iterable[torch.nn.Parameter]) -> tuple[int, int]:
    """(elements of whole parameters, bytes of them that this rank keeps between uses)."""
    elements = held = 0
    for parameter in parameters:
        whole = full_shape(parameter).numel()
        elements += whole
        kept = parameter.ds_tensor.numel() if is_sharded(parameter) and not parameter.ds_persist else whole
        held += kept * parameter.element_size()
    return elements, held
