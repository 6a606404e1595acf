"""Reading configurations and weights that others wrote, without running any code of theirs.

A source is a local folder or a hub id. Weights are read from safetensors only, remote code is never run, and a tensor
that is missing or superfluous is an error unless the caller expects it.
"""

from __future__ import annotations

import json
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

from rlhf.errors import CheckpointError, RecipeError, UnsafeError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(source: str) -> bool:
    """Whether a local folder holds a peft adapter instead of a whole model."""
    folder = Path(source)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def read_config(source: str, revision: str | None) -> PreTrainedConfig:
    """The configuration of a local folder or hub id; of an adapter folder, its base model's."""
    if is_adapter(source):
        adapter = read_adapter(source)
        return read_config(adapter["base_model_name_or_path"], adapter.get("revision"))
    check_folder(source)
    with reading(source):
        refuse_code(PreTrainedConfig.get_config_dict(source, revision=revision)[0], f"{source}/config.json")
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)


def check_folder(source: str) -> None:
    """Refuse a local path that is no model folder, before anything is looked up on the hub."""
    folder = Path(source).expanduser()
    if not folder.exists():
        if source.count("/") > 1 or source.startswith(("/", ".", "~")):
            raise CheckpointError("expected a model folder, found nothing", where=source)
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError("expected a model folder, found no config.json in it", where=source)


def refuse_code(config: dict[str, Any], where: str) -> None:
    """A file with `auto_map` asks for Python code beside the weights to be run."""
    if config.get("auto_map"):
        raise UnsafeError(
            "expected a model that transformers knows, found auto_map: it would run code from the model's folder",
            where=where,
            fix="If transformers has this architecture itself, make a local copy without auto_map and use that.",
        )


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turn what transformers and safetensors raise on unreadable files into an error with a place."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"cannot be read: {' '.join(lines[:3]) or type(error).__name__}",
            where=source,
            fix="Expected a local model folder, or the id of a model on the hub that can be reached from here.",
        ) from error


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
            trust_remote_code=False,
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


def check_files(source: str) -> None:
    """A local folder must hold safetensors, and its index must name files of that folder only."""
    folder = Path(source)
    if not folder.is_dir():
        return
    if (folder / ADAPTER_CONFIG).exists():  # transformers would add the adapter on its own, unmerged and frozen
        raise CheckpointError(
            f"expected a whole model or an adapter, found both config.json and {ADAPTER_CONFIG}",
            where=source,
            fix="Move one of them to a folder of its own.",
        )
    if not list(folder.glob("*.safetensors")):
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
            raise UnsafeError(
                "expected safetensors, found pickled weights only: reading them can run code",
                where=source,
                fix="Convert the model to safetensors in a place you trust.",
            )
        raise CheckpointError("expected weights (*.safetensors), found none", where=source)
    for index in folder.glob("*.safetensors.index.json"):
        with reading(str(index)):
            names = set(json.loads(index.read_text())["weight_map"].values())
        for name in sorted(names):
            if Path(name).name != name:
                raise UnsafeError(f"expected the name of a file in this folder, found {name!r}", where=str(index))


def read_adapter(source: str) -> dict[str, Any]:
    """The configuration of a peft adapter folder; only LoRA can be merged."""
    folder = Path(source)
    with reading(source):
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
    refuse_code(config, f"{source}/{ADAPTER_CONFIG}")
    if config.get("peft_type") != "LORA" or not config.get("base_model_name_or_path"):
        raise CheckpointError(
            "expected a LoRA adapter that names its base model,"
            f" found peft_type {config.get('peft_type')!r}, base {config.get('base_model_name_or_path')!r}",
            where=f"{source}/{ADAPTER_CONFIG}",
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"expected {ADAPTER_WEIGHTS}, found none", where=source)
    return config


def merge_adapter(model: nn.Module, source: str) -> nn.Module:
    """The model with an adapter folder's update added to its weights."""
    with reading(source):
        adapted = PeftModel.from_pretrained(model, source, autocast_adapter_dtype=False)
        with safe_open(str(Path(source) / ADAPTER_WEIGHTS), framework="pt") as file:
            stored = set(file.keys())
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    check_names(sorted(expected - stored), sorted(stored - expected), source, "LoRA adapter")
    return adapted.merge_and_unload()
