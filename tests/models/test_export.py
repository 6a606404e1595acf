from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from rlhf.errors import CheckpointError, NumericsError
from rlhf.models.build import Setup, add_lora, build_policy
from rlhf.models.export import check_files, keep_code, merged_state_dict, save_policy, save_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.linear import hasten
from rlhf.recipe.schema import LoraBlock, ModelBlock


def gathered(module: nn.Module) -> dict[str, Tensor]:
    """What an engine hands over: every parameter by every one of its names, copied to the CPU."""
    return {name: p.detach().clone() for name, p in module.named_parameters(remove_duplicate=False)}


def with_lora(model: nn.Module, task: str, target: str | list[str] = "all-linear") -> nn.Module:
    """Adapters that do something."""
    model = add_lora(model, LoraBlock(rank=4, alpha=7, target=target), task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    return model.eval()


def stored(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


IDS = torch.randint(5, 299, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source", ["live", "gathered"])
def test_a_published_policy_has_equal_logits_in_plain_transformers(tiny, family, tokenizer, tmp_path, source):
    module = PolicyModule(tiny(family, vocab_size=len(tokenizer)))
    save_policy(module, tokenizer, tmp_path, gathered(module) if source == "gathered" else None)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again(input_ids=IDS).logits.equal(module.core(input_ids=IDS).logits)
    tokens = AutoTokenizer.from_pretrained(tmp_path)
    assert tokens.chat_template == tokenizer.chat_template
    assert tokens("the cat<|im_end|>").input_ids == tokenizer("the cat<|im_end|>").input_ids
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2


@pytest.mark.parametrize("source", ["live", "gathered"])
def test_a_published_scorer_has_equal_scores_in_plain_transformers(tiny, family, tokenizer, tmp_path, source, ragged):
    module = ScorerModule(tiny(family, scorer=True, vocab_size=len(tokenizer)))
    save_scorer(module, tokenizer, tmp_path, gathered(module) if source == "gathered" else None)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == 1 and again.config.pad_token_id == tokenizer.pad_token_id
    ids, attention = ragged[1]("right")
    ids = ids.clamp(max=len(tokenizer) - 1)
    plain = again(input_ids=ids, attention_mask=attention.long()).logits[:, 0]
    torch.testing.assert_close(plain, module(ids, attention), atol=1e-6, rtol=0)


def test_tied_weights_are_stored_once_and_stay_tied(tiny, tokenizer, tmp_path):
    module = PolicyModule(tiny("qwen2", vocab_size=len(tokenizer)))
    state = gathered(module)
    assert "model.lm_head.weight" in state and "model.model.embed_tokens.weight" in state
    save_policy(module, tokenizer, tmp_path, state)
    assert "lm_head.weight" not in stored(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_the_file_has_the_model_dtype(tiny, tokenizer, tmp_path):
    module = PolicyModule(tiny("llama", vocab_size=len(tokenizer)).bfloat16())
    save_policy(module, tokenizer, tmp_path, {name: value.float() for name, value in gathered(module).items()})
    assert {value.dtype for value in stored(tmp_path).values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@pytest.mark.parametrize("source", ["live", "gathered"])
def test_a_lora_policy_is_published_merged(tiny, family, tokenizer, tmp_path, source):
    module = PolicyModule(with_lora(tiny(family, vocab_size=len(tokenizer)), "CAUSAL_LM"))
    before = gathered(module)
    expected = module.core(input_ids=IDS).logits
    save_policy(module, tokenizer, tmp_path, before if source == "gathered" else None)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, atol=2e-5, rtol=0)
    with torch.no_grad(), module.adapter_off():
        assert (again(input_ids=IDS).logits - module.core(input_ids=IDS).logits).abs().max() > 1e-2
    assert all(value.equal(before[name]) for name, value in gathered(module).items())
    assert module.core(input_ids=IDS).logits.equal(expected)


def test_the_adapter_beside_it_fits_on_the_base(tiny, family, tokenizer, tmp_path):
    module = PolicyModule(with_lora(tiny(family, vocab_size=len(tokenizer)), "CAUSAL_LM"))
    save_policy(module, tokenizer, tmp_path, gathered(module))
    adapted = PeftModel.from_pretrained(tiny(family, vocab_size=len(tokenizer)), tmp_path / "adapter").eval()
    hasten(adapted)  # products by the same library, so that only the weights could differ
    expected = module.core(input_ids=IDS).logits
    torch.testing.assert_close(adapted(input_ids=IDS).logits, expected, atol=1e-6, rtol=0)


def test_a_lora_scorer_is_published_merged_with_its_head(tiny, family, tokenizer, tmp_path):
    module = ScorerModule(with_lora(tiny(family, scorer=True, vocab_size=len(tokenizer)), "SEQ_CLS"))
    expected = module(IDS, torch.ones_like(IDS))
    save_scorer(module, tokenizer, tmp_path, gathered(module))
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(again(input_ids=IDS).logits[:, 0], expected, atol=2e-5, rtol=0)
    base = tiny(family, scorer=True, vocab_size=len(tokenizer))
    adapted = ScorerModule(PeftModel.from_pretrained(base, tmp_path / "adapter").eval())
    torch.testing.assert_close(adapted(IDS, torch.ones_like(IDS)), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("name", "target"), [("llama", ["embed_tokens", "lm_head", "q_proj"]), ("gpt2", ["c_proj"])])
def test_merging_agrees_with_peft(tiny, tokenizer, name, target):
    module = PolicyModule(with_lora(tiny(name, vocab_size=len(tokenizer)), "CAUSAL_LM", target))
    ours = merged_state_dict(module, gathered(module))
    theirs = module.model.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if name == "gpt2" else set())
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], atol=1e-6, rtol=0)


def test_the_same_weights_give_the_same_files(tiny, tokenizer, tmp_path):
    for name in "ab":
        module = PolicyModule(with_lora(tiny("llama", vocab_size=len(tokenizer)), "CAUSAL_LM"))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(0.1)
        config = module.model.peft_config["default"]
        config.target_modules = set(sorted(config.target_modules, reverse=name == "a"))
        save_policy(module, tokenizer, tmp_path / name)
    one, other = (
        {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*.*")}
        for folder in (tmp_path / "a", tmp_path / "b")
    )
    assert one == other and "adapter/adapter_config.json" in one


def test_a_published_policy_builds_again(tiny, tokenizer, tmp_path):
    module = PolicyModule(with_lora(tiny("llama", vocab_size=len(tokenizer)), "CAUSAL_LM"))
    save_policy(module, tokenizer, tmp_path)
    setup = Setup.to_train(ModelBlock(path=str(tmp_path), lora=LoraBlock(rank=2)), seed=0)
    again = PolicyModule(build_policy(str(tmp_path), tokenizer, setup))
    ones = torch.ones_like(IDS, dtype=torch.bool)
    torch.testing.assert_close(again(IDS, ones, ones[:, 2:]), module(IDS, ones, ones[:, 2:]), atol=2e-5, rtol=0)


def test_nothing_broken_is_published(tiny, tokenizer, tmp_path):
    module = PolicyModule(tiny("llama", vocab_size=len(tokenizer)))
    name = "model.model.layers.1.mlp.up_proj.weight"
    whole = gathered(module)
    sharded = {**whole, name: torch.empty(0)}
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight of shape \(64, 32\), found \(0,\)"):
        save_policy(module, tokenizer, tmp_path / "out", sharded)
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight of shape .* found none"):
        save_policy(module, tokenizer, tmp_path / "out", {key: value for key, value in whole.items() if key != name})
    with pytest.raises(CheckpointError, match="expected extra of shape none"):
        save_policy(module, tokenizer, tmp_path / "out", {**whole, "model.extra": torch.zeros(2)})
    broken = {**whole, name: torch.full((64, 32), torch.nan)}
    with pytest.raises(NumericsError, match="layers.1.mlp.up_proj.weight") as error:
        save_policy(module, tokenizer, tmp_path / "out", broken)
    assert error.value.exit_code == 5
    assert not (tmp_path / "out").exists()


DAMAGES = {
    "another value": lambda weights, name: {**weights, name: weights[name] + 1e-3},
    "another type": lambda weights, name: {**weights, name: weights[name].double()},
    "another shape": lambda weights, name: {**weights, name: weights[name].T.contiguous()},
    "one missing": lambda weights, name: {key: value for key, value in weights.items() if key != name},
    "one more": lambda weights, name: {**weights, "extra": weights[name].clone()},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_reads_back_as_other_weights_is_not_published(tiny, tokenizer, tmp_path, damage):
    module = PolicyModule(tiny("llama", vocab_size=len(tokenizer)))
    save_policy(module, tokenizer, tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    check_files(tmp_path, weights)
    save_file(DAMAGES[damage](weights, "model.layers.1.mlp.up_proj.weight"), file)
    with pytest.raises(CheckpointError, match="expected on disk the weights that were written") as error:
        check_files(tmp_path, weights)
    assert ("extra" if damage == "one more" else "up_proj") in str(error.value)


def test_a_scorer_that_plain_transformers_would_misread_is_not_published(tiny, tokenizer, tmp_path):
    module = ScorerModule(tiny("llama", scorer=True, vocab_size=len(tokenizer), pad_token_id=2))
    with pytest.raises(AssertionError, match="padding token 2"):
        save_scorer(module, tokenizer, tmp_path)


def test_contradictory_generation_options_of_the_base_do_not_stop_publishing(tiny, tokenizer, tmp_path):
    module = PolicyModule(tiny("llama", vocab_size=len(tokenizer)))
    module.core.generation_config = GenerationConfig(
        temperature=0.6, do_sample=False, eos_token_id=[2, 4], pad_token_id=0
    )
    save_policy(module, tokenizer, tmp_path)
    again = GenerationConfig.from_pretrained(tmp_path)
    assert again.eos_token_id == [2, 4] and again.pad_token_id == 0 and again.temperature is None


def test_a_published_model_asks_for_no_code_that_is_not_beside_it(tmp_path):
    (tmp_path / "own.py").write_text("")
    asked = {
        "AutoConfig": "owner/model--own.Config",
        "AutoModelForCausalLM": "own.Model",
        "AutoModel": "owner/model--absent.Model",
        "AutoTokenizer": ["owner/model--absent.Slow", None],
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": asked, "x": 1}))
    keep_code(tmp_path)
    kept = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    assert json.loads((tmp_path / "config.json").read_text()) == {"auto_map": kept, "x": 1}
    (tmp_path / "own.py").unlink()
    with pytest.raises(CheckpointError, match="expected the model's code beside its weights"):
        keep_code(tmp_path)
