"""What a local model folder must hold, checked without torch or transformers and without running anything in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlhf.errors import CheckpointError, UnsafeError
from rlhf.models.trust import may_run_code

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INDEX = "*.safetensors.index.json"
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def check_model_folder(source: str) -> None:
    """Refuse a local path that holds no model, pickles instead of safetensors, or code that is not trusted.

    A hub id is left alone; of an adapter, the base model is checked too.
    """
    folder = Path(source)
    if is_adapter(source):
        return check_model_folder(read_adapter(source)["base_model_name_or_path"])
    check_folder(source)
    if folder.is_dir():
        check_code(source)
        check_files(source)
        if not any((folder / name).is_file() for name in _TOKENIZER):
            fix = "Copy the tokenizer's files into the folder."
            raise CheckpointError(f"expected a tokenizer ({_TOKENIZER[0]}), found none", where=source, fix=fix)
    return None


def check_folder(source: str) -> None:
    """Refuse a local path that is no model folder, before anything is looked up on the hub."""
    folder = Path(source)
    if not folder.exists():
        if source.count("/") > 1 or source.startswith(("/", ".")):
            fix = "Name a folder with config.json and weights, or a hub id (owner/name)."
            raise CheckpointError("expected a model folder, found nothing", where=source, fix=fix)
        return
    if not folder.is_dir():
        raise CheckpointError("expected a model folder, found a file", where=source, fix="Name the folder it is in.")
    if not (folder / "config.json").is_file():
        inner = folder / "model" / "config.json"
        fix = f"Name {inner.parent}, or write from: instead of path:." if inner.is_file() else "Name another folder."
        raise CheckpointError("expected a model folder, found no config.json in it", where=source, fix=fix)
    for path in folder.iterdir():
        if path.exists() and not (path.is_file() or path.is_dir()):
            what = "expected plain files, found a pipe, socket or device: reading it could hang or do harm"
            raise UnsafeError(what, where=str(path), fix="Remove it.")


def check_code(source: str) -> bool:
    """Whether a local folder's configurations ask for code that the command line trusts; refused where it does not."""
    asks = False
    for name in ("config.json", "tokenizer_config.json"):
        if (Path(source) / name).is_file():
            asks |= may_run_code(source, None, read_json(Path(source) / name), str(Path(source) / name))
    return asks


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
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        if not os.access(file, os.R_OK):
            fix = "Change its permissions."
            raise CheckpointError("expected weights that can be read, found no permission to", where=str(file), fix=fix)
    if not weights:
        if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
            raise UnsafeError(
                "expected safetensors, found pickled weights only: reading them can run code",
                where=source,
                fix="Convert the model to safetensors in a place you trust.",
            )
        fix = "Name another folder, or put the model's weights there."
        raise CheckpointError("expected weights (*.safetensors), found none", where=source, fix=fix)
    for index in folder.glob(_INDEX):
        listed = read_json(index).get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else {None}
        for name in sorted(names, key=str):
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
                raise UnsafeError(f"expected the name of a file in this folder, found {name!r}", where=str(index))
            if not (folder / name).is_file():
                what = f"expected all weights that {index.name} names, found no {name}"
                raise CheckpointError(what, where=source, fix="Copy or download the missing file.")


def is_adapter(source: str) -> bool:
    """Whether a local folder holds a peft adapter instead of a whole model."""
    folder = Path(source)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").exists()


def read_adapter(source: str) -> dict[str, Any]:
    """The configuration of a peft adapter folder; only LoRA can be merged."""
    folder = Path(source)
    config = read_json(folder / ADAPTER_CONFIG)
    if config.get("auto_map"):
        where = f"{source}/{ADAPTER_CONFIG}"
        raise UnsafeError("expected an adapter without code, found auto_map", where=where, fix="Take it out.")
    if config.get("peft_type") != "LORA" or not config.get("base_model_name_or_path"):
        raise CheckpointError(
            "expected a LoRA adapter that names its base model,"
            f" found peft_type {config.get('peft_type')!r}, base {config.get('base_model_name_or_path')!r}",
            where=f"{source}/{ADAPTER_CONFIG}",
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(f"expected {ADAPTER_WEIGHTS}, found none", where=source)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"expected JSON, found: {reason}", where=str(path), fix="Restore the file.") from error
    if not isinstance(found, dict):
        raise CheckpointError("expected a JSON object, found something else", where=str(path), fix="Restore the file.")
    return found
