"""Reading configurations and weights that others wrote, without running any code of theirs.

A source is a local folder or a hub id. Weights are read from safetensors only, remote code is not run unless the
command line trusts it, and a tensor that is missing or superfluous is an error unless the caller expects it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging as hf_logging
from transformers.utils.hub import LocalEntryNotFoundError

from rlhf.errors import CheckpointError, RecipeError, ServiceError, UserError
from rlhf.models.folder import (
    ADAPTER_WEIGHTS,
    check_files,
    check_folder,
    is_adapter,
    read_adapter,
)
from rlhf.models.trust import may_run_code, trusted_revision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def read_config(source: str, revision: str | None) -> PreTrainedConfig:
    """The configuration of a local folder or hub id; of an adapter folder, its base model's."""
    if is_adapter(source):
        adapter = read_adapter(source)
        return read_config(adapter["base_model_name_or_path"], adapter.get("revision"))
    check_folder(source)
    with reading(source):
        trust = _trust(source, revision)
        return AutoConfig.from_pretrained(source, revision=revision, **trust)


def _trust(source: str, revision: str | None) -> dict[str, Any]:
    """How transformers is told whether a model's own code may run; that of a hub id comes from the same commit."""
    config = PreTrainedConfig.get_config_dict(source, revision=revision)[0]
    if not may_run_code(source, revision, config, f"{source}/config.json"):
        return {"trust_remote_code": False}
    return {"trust_remote_code": True, "code_revision": revision}


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise on unreadable files into an error with a place."""
    try:
        yield
    except (torch.OutOfMemoryError, UserError):
        raise
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, *_faults(source)) as error:
        if _is_unreachable(error):
            raise ServiceError(
                "the hub cannot be reached, and the model is not in the local cache",
                where=source,
                fix="Try again, or download the model and name its folder.",
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"cannot be read: {textwrap.shorten(' '.join(lines), 300) or type(error).__name__}",
            where=source,
            fix="Expected a local model folder, or the id of a model on the hub that can be reached from here.",
        ) from error


def _faults(source: str) -> tuple[type[Exception], ...]:
    """What a model's own code may raise beside that, where it has some."""
    return () if trusted_revision(source) is None else (Exception,)


def _is_unreachable(error: BaseException | None) -> bool:
    """Whether the network is what failed: the cause that transformers wraps says so."""
    while error is not None and not isinstance(error, LocalEntryNotFoundError):
        error = error.__cause__ or error.__context__
    return error is not None


def load_weights(
    auto_class: Any,
    source: str,
    revision: str | None,
    config: PreTrainedConfig,
    *,
    dtype: str,
    attention: str,
    fresh: Callable[[str], bool] = lambda name: False,
    unused: Callable[[str], bool] = lambda name: False,
) -> nn.Module:
    """A model with the weights of a folder or hub id.

    fresh, unused: which tensors may be absent from the files, and which may be in the files without being needed.
    """
    check_files(source)
    with quiet(), reading(source), attention_checked(attention):
        model, info = auto_class.from_pretrained(
            source,
            config=config,
            revision=revision,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            **_trust(source, revision),
            use_safetensors=True,
            output_loading_info=True,
        )
    if hasattr(model, "peft_config"):
        raise CheckpointError(
            "expected a whole model, found an adapter on the hub",
            where=source,
            fix="Download it to a local folder and name that: adapters of local folders are merged.",
        )
    missing = sorted(name for name in info["missing_keys"] if not fresh(name))
    superfluous = sorted(name for name in info["unexpected_keys"] if not unused(name))
    check_names(missing, superfluous, source, type(model).__name__)
    return model


@contextmanager
def attention_checked(attention: str) -> Iterator[None]:
    """Say which key asks for an attention that the model inside, or this machine, does not have."""
    try:
        yield
    except (ImportError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, ValueError) and "attention implementation" not in reason:
            raise
        raise RecipeError(
            f"{attention} cannot be used here: {reason}",
            where="model.attention",
            fix="Set model.attention to eager, which every model has, or to sdpa.",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars and load reports: what they say is checked here."""
    verbosity, has_bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if has_bars:
            hf_logging.enable_progress_bar()


def check_names(missing: Iterable[str], superfluous: Iterable[str], source: str, kind: str) -> None:
    """Every tensor of the model is in the files, and no other."""
    found = [f"{label} {_some(names)}" for label, names in (("no", missing), ("unknown", superfluous)) if names]
    if found:
        raise CheckpointError(
            f"expected the weights of a {kind}, found {' and '.join(found)}",
            where=source,
            fix="A reward model or critic has a `score` head, a policy a language-model head: name the right folder.",
        )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def merge_adapter(model: nn.Module, source: str) -> nn.Module:
    """The model with an adapter folder's update added to its weights."""
    with reading(source):
        adapted = PeftModel.from_pretrained(model, source, autocast_adapter_dtype=False)
        with safe_open(str(Path(source) / ADAPTER_WEIGHTS), framework="pt") as file:
            stored = set(file.keys())
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    check_names(sorted(expected - stored), sorted(stored - expected), source, "LoRA adapter")
    return adapted.merge_and_unload()
