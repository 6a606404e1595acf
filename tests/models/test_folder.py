"""Local model folders are judged without torch, before anything is loaded from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.errors import CheckpointError, UnsafeError
from rlhf.models.folder import check_model_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_a_model_folder_and_hub_ids_pass(folder: Path) -> None:
    for source in (str(folder), "owner/name", "gpt2"):
        check_model_folder(source)


def test_what_is_no_model_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a model folder, found nothing"):
        check_model_folder(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="expected a model folder, found a file"):
        check_model_folder(str(folder / "config.json"))
    with pytest.raises(CheckpointError, match=r"found no config.json in it\n  Name .*/model, or write from:"):
        check_model_folder(str(tmp_path))
    (folder / "config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match="config.json: expected JSON"):
        check_model_folder(str(folder))


def test_weights_must_be_there_and_safe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected weights"):
        check_model_folder(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeError, match="pickled weights only"):
        check_model_folder(str(folder))


def test_a_tokenizer_must_be_there(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"expected a tokenizer \(tokenizer.json\), found none"):
        check_model_folder(str(folder))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_beside_the_weights_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text('{"auto_map": {"AutoModel": "their.Model"}}')
    with pytest.raises(UnsafeError, match=f"{name}: expected a model that transformers knows, found auto_map"):
        check_model_folder(str(folder))


@pytest.mark.parametrize(
    ("listed", "error", "message"),
    [
        ("part-2.safetensors", CheckpointError, "found no part-2.safetensors"),
        ("../other/model.safetensors", UnsafeError, "expected the name of a file in this folder"),
        (3, UnsafeError, "expected the name of a file in this folder"),
        ("", UnsafeError, "expected the name of a file in this folder"),
        ("..", UnsafeError, "expected the name of a file in this folder"),
    ],
)
def test_an_index_names_files_that_are_there(folder: Path, listed: object, error: type, message: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": listed}}))
    with pytest.raises(error, match=message):
        check_model_folder(str(folder))


def test_an_adapter_is_judged_with_its_base(folder: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="expected adapter_model.safetensors"):
        check_model_folder(str(adapter))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    check_model_folder(str(adapter))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected weights"):
        check_model_folder(str(adapter))


def test_torch_is_not_needed() -> None:
    code = "import sys, rlhf.models.folder; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json", "x"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UnsafeError, match="expected plain files, found a pipe, socket or device"):
        check_model_folder(str(folder))
