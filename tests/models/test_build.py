from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from rlhf.errors import CheckpointError, RecipeError, UnsafeError
from rlhf.models.build import Setup, build_policy, build_scorer, has_score_head, max_positions, seeded
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.load import read_config
from rlhf.recipe.schema import InitBlock, LoraBlock, ModelBlock

INIT = InitBlock(hidden=32, layers=2, heads=4, kv_heads=2, context=64)
SETUP = Setup.to_train(ModelBlock(init=INIT), seed=3)


def after(ids: torch.Tensor, start: int) -> torch.Tensor:
    """The mask of all columns from `start` on."""
    return torch.ones_like(ids, dtype=torch.bool)[:, start:]


def equal(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(value.equal(theirs[name]) for name, value in one.state_dict().items())


@pytest.fixture
def policy_folder(tmp_path, tiny, tokenizer) -> str:
    folder = tmp_path / "policy"
    tiny("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def scorer_folder(tmp_path, tiny, tokenizer) -> str:
    folder = tmp_path / "scorer"
    tiny("llama", scorer=True, vocab_size=len(tokenizer)).save_pretrained(folder)
    return str(folder)


def test_a_model_from_scratch_depends_on_its_seed_alone(tokenizer):
    before = torch.get_rng_state()
    first = build_policy(INIT, tokenizer, SETUP)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(99)
    assert equal(first, build_policy(INIT, tokenizer, SETUP))
    assert not equal(first, build_policy(INIT, tokenizer, replace(SETUP, seed=4)))
    config = first.config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (len(tokenizer), 0, 2)
    assert config.intermediate_size == 128 and max_positions(config) == 64
    assert first.lm_head.weight is first.model.embed_tokens.weight
    scorer = build_scorer(INIT, tokenizer, SETUP, head="new")
    assert equal(scorer, build_scorer(INIT, tokenizer, SETUP, head="new"))


def test_adapters_depend_on_the_seed_alone(tokenizer, policy_folder):
    setup = replace(SETUP, lora=LoraBlock(rank=4))
    first = build_policy(policy_folder, tokenizer, setup)
    torch.manual_seed(99)
    assert equal(first, build_policy(policy_folder, tokenizer, setup))


def test_seeded_gives_the_generator_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), seeded(1):
        1 / 0  # noqa: B018
    assert torch.get_rng_state().equal(before)


def test_heads_must_divide_hidden(tokenizer):
    with pytest.raises(RecipeError, match="model.init.heads"):
        build_policy(InitBlock(hidden=32, heads=5), tokenizer, SETUP)


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_weight_has_the_recipe_dtype(tokenizer, policy_folder, dtype, expected):
    for lora in (None, LoraBlock(rank=2)):
        setup = replace(SETUP, dtype=dtype, lora=lora)
        for model in (
            build_policy(INIT, tokenizer, setup),
            build_policy(policy_folder, tokenizer, setup),
            build_scorer(policy_folder, tokenizer, setup, head="new"),
        ):
            assert {p.dtype for p in model.parameters()} == {expected}
            assert model.training


def test_loaded_weights_are_the_files_weights(tokenizer, policy_folder):
    assert equal(build_policy(policy_folder, tokenizer, SETUP), AutoModelForCausalLM.from_pretrained(policy_folder))


def test_a_frozen_model_has_no_gradients(tokenizer, policy_folder):
    model = build_policy(policy_folder, tokenizer, Setup.frozen("fp32", "sdpa"))
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_policy_becomes_a_scorer_with_a_fresh_head(tokenizer, policy_folder):
    first = build_scorer(policy_folder, tokenizer, SETUP, head="new")
    second = build_scorer(policy_folder, tokenizer, replace(SETUP, seed=8), head="new")
    assert not first.score.weight.equal(second.score.weight)
    assert equal(first, build_scorer(policy_folder, tokenizer, SETUP, head="new"))
    policy = build_policy(policy_folder, tokenizer, SETUP)
    assert equal(first.model, policy.model)
    wide = build_scorer(InitBlock(hidden=4096, layers=1, heads=1, ffn=8), tokenizer, SETUP, head="new")
    assert wide.score.weight.detach().std() == pytest.approx(1 / math.sqrt(4097), rel=0.05)


def test_a_scorer_keeps_its_head(tokenizer, scorer_folder, tiny):
    kept = build_scorer(scorer_folder, tokenizer, SETUP, head="keep")
    assert equal(kept, tiny("llama", scorer=True, vocab_size=len(tokenizer)))
    fresh = build_scorer(scorer_folder, tokenizer, SETUP, head="new")
    assert not fresh.score.weight.equal(kept.score.weight)


def test_a_folder_of_the_wrong_kind_is_an_error(tokenizer, policy_folder, scorer_folder):
    assert has_score_head(scorer_folder, None) and not has_score_head(policy_folder, None)
    with pytest.raises(CheckpointError, match="score.weight"):
        build_scorer(policy_folder, tokenizer, SETUP, head="keep")
    with pytest.raises(CheckpointError, match="lm_head.weight.*score.weight"):
        build_policy(scorer_folder, tokenizer, SETUP)


def test_tied_policies_become_scorers_too(tokenizer, tiny, tmp_path):
    tiny("qwen2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    assert build_scorer(str(tmp_path), tokenizer, SETUP, head="new").config.num_labels == 1
    with pytest.raises(CheckpointError, match="score.weight"):
        build_scorer(str(tmp_path), tokenizer, SETUP, head="keep")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_dropout_is_off_unless_asked_for(tokenizer, tiny, tmp_path, name):
    tiny(name, vocab_size=len(tokenizer), hidden_dropout=0.5, attention_dropout=0.5).save_pretrained(tmp_path)
    ids = torch.randint(5, len(tokenizer), (2, 8))
    calls = {}
    for dropout in (False, True):
        policy = PolicyModule(build_policy(str(tmp_path), tokenizer, replace(SETUP, dropout=dropout)))
        assert policy.training
        calls[dropout] = [policy(ids, torch.ones_like(ids), after(ids, 1)) for _ in range(2)]
    assert calls[False][0].equal(calls[False][1])
    assert not calls[True][0].equal(calls[True][1])
    off = build_policy(str(tmp_path), tokenizer, SETUP)
    assert all(module.p == 0 for module in off.modules() if isinstance(module, nn.Dropout))
    assert all(value == 0 for key, value in off.config.to_dict().items() if "drop" in key and value is not None)


def test_attention_dropout_of_a_model_from_scratch(tokenizer):
    block = INIT.model_copy(update={"dropout": 0.5})
    assert build_policy(block, tokenizer, SETUP).model.layers[0].self_attn.attention_dropout == 0
    on = build_policy(block, tokenizer, replace(SETUP, dropout=True))
    assert on.model.layers[0].self_attn.attention_dropout == 0.5


def test_lora_trains_adapters_and_the_score_head_only(tokenizer, policy_folder):
    setup = replace(SETUP, lora=LoraBlock(rank=4))
    names = {name for name, p in build_policy(policy_folder, tokenizer, setup).named_parameters() if p.requires_grad}
    assert names and all(".lora_" in name for name in names)
    assert not any("lm_head" in name for name in names)
    scorer = build_scorer(policy_folder, tokenizer, setup, head="new")
    names = {name for name, p in scorer.named_parameters() if p.requires_grad}
    assert [name for name in names if ".lora_" not in name] == ["base_model.model.score.modules_to_save.default.weight"]
    assert not any("score" in name and ".lora_" in name for name in names)


def test_lora_targets_must_exist_and_must_not_untie(tokenizer, tiny, policy_folder, tmp_path):
    with pytest.raises(RecipeError, match="model.lora.target"):
        build_policy(policy_folder, tokenizer, replace(SETUP, lora=LoraBlock(target=["nonsense"])))
    tiny("qwen2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "tied")
    for target in ("lm_head", "embed_tokens"):
        setup = replace(SETUP, lora=LoraBlock(target=["q_proj", target]))
        build_policy(policy_folder, tokenizer, setup)
        with pytest.raises(RecipeError, match="which share theirs"):
            build_policy(str(tmp_path / "tied"), tokenizer, setup)


@pytest.mark.parametrize("lora", [None, LoraBlock(rank=2)])
def test_gradient_checkpointing_changes_no_gradient(tokenizer, policy_folder, lora):
    ids = torch.randint(5, 250, (2, 8))
    gradients = []
    for checkpointing in (False, True):
        setup = replace(SETUP, lora=lora, gradient_checkpointing=checkpointing)
        policy = PolicyModule(build_policy(policy_folder, tokenizer, setup))
        policy(ids, torch.ones_like(ids), after(ids, 2)).sum().backward()
        gradients.append([p.grad for p in policy.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_embedding_grows_for_new_tokens(tokenizer, tiny, tmp_path, name):
    tiny(name, vocab_size=len(tokenizer) - 3).save_pretrained(tmp_path)
    policy = build_policy(str(tmp_path), tokenizer, SETUP)
    for layer in (policy.get_input_embeddings(), policy.get_output_embeddings()):
        assert layer.weight.shape[0] == len(tokenizer)
        torch.testing.assert_close(layer.weight[-1], layer.weight[:-3].mean(0), atol=1e-6, rtol=0)
    assert policy.config.vocab_size == len(tokenizer)
    assert build_scorer(str(tmp_path), tokenizer, SETUP, head="new").config.vocab_size == len(tokenizer)
    assert equal(policy, build_policy(str(tmp_path), tokenizer, SETUP))


def test_a_padding_token_that_ends_texts_is_our_own_mistake(tokenizer, tiny, tmp_path):
    tiny("llama", vocab_size=len(tokenizer), eos_token_id=[0, 2]).save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="padding token 0"):
        build_policy(str(tmp_path), tokenizer, SETUP)


def test_an_adapter_folder_is_merged_into_its_base(tokenizer, policy_folder, tmp_path):
    setup = replace(SETUP, lora=LoraBlock(rank=4))
    ids = torch.randint(5, 250, (2, 8))
    for kind, make, module in (
        ("policy", build_policy, PolicyModule),
        ("scorer", lambda *args: build_scorer(*args, head="new"), ScorerModule),
    ):
        adapted = make(policy_folder, tokenizer, setup)
        with torch.no_grad():
            for name, p in adapted.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.05)
        folder = tmp_path / f"{kind}-adapter"
        adapted.save_pretrained(folder)
        keep = (lambda *args: build_scorer(*args, head="keep")) if kind == "scorer" else make
        merged = keep(str(folder), tokenizer, SETUP)
        assert [name for name, p in merged.named_parameters() if not p.requires_grad] == []
        options = {"mask": after(ids, 2)} if kind == "policy" else {}
        expected = module(adapted)(ids, torch.ones_like(ids), **options)
        torch.testing.assert_close(module(merged)(ids, torch.ones_like(ids), **options), expected, atol=1e-5, rtol=0)
    assert has_score_head(str(tmp_path / "scorer-adapter"), None)
    assert not has_score_head(str(tmp_path / "policy-adapter"), None)
    assert read_config(str(tmp_path / "policy-adapter"), None).hidden_size == 32
    with pytest.raises(CheckpointError, match="no score head"):
        build_scorer(str(tmp_path / "policy-adapter"), tokenizer, SETUP, head="keep")


def test_an_attention_that_the_model_lacks_names_the_key(tokenizer, tiny, tmp_path):
    tiny("gemma2", vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="model.attention: sdpa"):
        build_policy(str(tmp_path), tokenizer, SETUP)
    assert build_policy(str(tmp_path), tokenizer, replace(SETUP, attention="eager"))


# --- what is refused ------------------------------------------------------------------------------------------------


def test_code_of_a_model_is_refused(tokenizer, policy_folder, tmp_path):
    config = tmp_path / "policy" / "config.json"
    changed = {**json.loads(config.read_text()), "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    config.write_text(json.dumps(changed))
    (tmp_path / "policy" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for build in (build_policy, lambda *args: build_scorer(*args, head="new")):
        with pytest.raises(UnsafeError, match="auto_map") as error:
            build(policy_folder, tokenizer, SETUP)
        assert error.value.exit_code == 9
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(tokenizer, policy_folder, tmp_path):
    (tmp_path / "policy" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "policy" / "pytorch_model.bin")
    with pytest.raises(UnsafeError, match="pickled"):
        build_policy(policy_folder, tokenizer, SETUP)


@pytest.mark.parametrize("name", ["../other.safetensors", "/tmp/other.safetensors", "sub/other.safetensors"])
def test_shards_outside_of_the_folder_are_refused(tokenizer, policy_folder, tmp_path, name):
    index = tmp_path / "policy" / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UnsafeError, match="other.safetensors"):
        build_policy(policy_folder, tokenizer, SETUP)


def test_unreadable_folders_are_errors_with_a_place(tokenizer, policy_folder, tmp_path):
    weights = tmp_path / "policy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="policy: cannot be read"):
        build_policy(policy_folder, tokenizer, SETUP)
    weights.unlink()
    with pytest.raises(CheckpointError, match="expected weights"):
        build_policy(policy_folder, tokenizer, SETUP)
    (tmp_path / "policy" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="policy: cannot be read"):
        build_policy(policy_folder, tokenizer, SETUP)
    (tmp_path / "policy" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        build_policy(policy_folder, tokenizer, SETUP)
    with pytest.raises(CheckpointError, match="found nothing"):
        build_policy(str(tmp_path / "nowhere"), tokenizer, SETUP)


def test_a_tensor_of_another_shape_is_an_error(tokenizer, policy_folder, tmp_path):
    config = tmp_path / "policy" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 80}))
    with pytest.raises(CheckpointError):
        build_policy(policy_folder, tokenizer, SETUP)


def test_a_folder_that_is_both_model_and_adapter_is_refused(tokenizer, policy_folder):
    build_policy(policy_folder, tokenizer, replace(SETUP, lora=LoraBlock(rank=2))).save_pretrained(policy_folder)
    with pytest.raises(CheckpointError, match="found both"):
        build_policy(policy_folder, tokenizer, SETUP)


@pytest.mark.parametrize("change", [{"peft_type": "IA3"}, {"base_model_name_or_path": None}, {"auto_map": {"a": "b"}}])
def test_adapters_that_cannot_be_merged_are_refused(tokenizer, policy_folder, tmp_path, change):
    build_policy(policy_folder, tokenizer, replace(SETUP, lora=LoraBlock(rank=2))).save_pretrained(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UnsafeError if "auto_map" in change else CheckpointError):
        build_policy(str(tmp_path / "lora"), tokenizer, SETUP)


def test_experts_get_no_adapter(tokenizer, tmp_path):
    config = MixtralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="cannot be merged"):
        build_policy(str(tmp_path), tokenizer, replace(SETUP, lora=LoraBlock(rank=2)))
    assert build_policy(str(tmp_path), tokenizer, replace(SETUP, lora=LoraBlock(rank=2, target=["q_proj"])))


def test_a_model_without_a_score_head_is_no_scorer(tokenizer, tmp_path):
    config = BertConfig(
        vocab_size=300, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4
    )
    config.num_labels = 1
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="`score` head, found a BertForSequenceClassification"):
        build_scorer(str(tmp_path), tokenizer, SETUP, head="new")
