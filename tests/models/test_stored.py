"""Weights by name, from folders that are laid out in every way that a model can be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf.errors import CheckpointError
from rlhf.models.build import add_lora, build_policy
from rlhf.models.export import save_policy
from rlhf.models.forward import PolicyModule
from rlhf.models.stored import FROZEN, weights_of
from rlhf.recipe.schema import LoraBlock


def read_all(folder: Path, like: nn.Module, tokenizer) -> dict[str, torch.Tensor]:
    with weights_of(str(folder), None, like, tokenizer) as read:
        return {name: read(name).clone() for name, _ in like.named_parameters()}


def check(found: dict[str, torch.Tensor], expected: nn.Module, atol: float = 0.0) -> None:
    for name, value in expected.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), atol=atol, rtol=0)


def test_a_published_folder_is_read_by_every_family(tiny, family, tokenizer, tmp_path):
    model = tiny(family, vocab_size=len(tokenizer))
    save_policy(PolicyModule(model), tokenizer, tmp_path)
    check(read_all(tmp_path, model, tokenizer), model)


def test_a_folder_of_several_files(tiny, tokenizer, tmp_path):
    model = tiny("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check(read_all(tmp_path, model, tokenizer), model)


def test_a_folder_with_names_of_its_own_is_loaded_as_transformers_reads_it(tiny, tokenizer, tmp_path):
    """Checkpoints of the network without its head have no prefix."""
    model = tiny("gpt2", vocab_size=len(tokenizer))
    model.transformer.save_pretrained(tmp_path)
    check(read_all(tmp_path, model, tokenizer), model)


def test_new_tokens_have_rows_as_in_a_model_that_is_built(tiny, tokenizer, tmp_path):
    model = tiny("gpt2", vocab_size=len(tokenizer) - 3)
    model.transformer.save_pretrained(tmp_path)
    grown = build_policy(str(tmp_path), tokenizer, FROZEN)
    check(read_all(tmp_path, grown, tokenizer), grown)


def test_an_adapter_is_added_to_its_base(tiny, tokenizer, tmp_path):
    base = tiny("llama", vocab_size=len(tokenizer))
    save_policy(PolicyModule(base), tokenizer, tmp_path / "base")
    adapted = add_lora(build_policy(str(tmp_path / "base"), tokenizer, FROZEN), LoraBlock(rank=4), "CAUSAL_LM")
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    found = read_all(tmp_path / "adapter", base, tokenizer)
    whole = adapted.merge_and_unload()
    check(found, whole, atol=1e-6)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (found[name] - dict(base.named_parameters())[name]).abs().max() > 0.1


def test_a_damaged_file_is_an_error_with_a_place(tiny, tokenizer, tmp_path):
    model = tiny("llama", vocab_size=len(tokenizer))
    save_policy(PolicyModule(model), tokenizer, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError) as caught:
        read_all(tmp_path, model, tokenizer)
    assert caught.value.where == str(tmp_path)
