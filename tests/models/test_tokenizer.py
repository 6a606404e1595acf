from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer, LlamaConfig

from rlhf.errors import CheckpointError, UnsafeError
from rlhf.models.tokenizer import decoder, ensure_pad, load_tokenizer, train_tokenizer

TEXTS = ["one fish two fish", "red fish blue fish", "the old fish is red and eats seven other little fishes"] * 10


def trained(**tokens: str | None):
    """A fresh tokenizer, some of its special tokens replaced."""
    tokenizer = train_tokenizer(TEXTS, 290, "{{ messages }}")
    for name, value in tokens.items():
        setattr(tokenizer, name, value)
    return tokenizer


def test_every_text_survives(tokenizer):
    for text in ("the cat", "Tschüß, 猫!\n\t  two  spaces ", "\x00\x7f ", "<|not special|>"):
        assert decoder(tokenizer)(tokenizer(text).input_ids) == text


def test_the_same_texts_give_the_same_tokenizer():
    first, second = trained(), trained()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_vocabulary_holds_special_tokens_and_bytes_first():
    tokenizer = train_tokenizer(TEXTS, 270, None)
    assert len(tokenizer) == 270
    names = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4]
    assert tokenizer.pad_token_id == 0 and tokenizer.bos_token_id == 1 and tokenizer.eos_token_id == 2
    assert decoder(tokenizer)([1, 3, *tokenizer("fish").input_ids, 4, 2, 0]) == "fish"
    assert tokenizer.chat_template is None


def test_a_published_tokenizer_is_read_back_equal(tmp_path):
    tokenizer = trained()
    tokenizer.save_pretrained(tmp_path)
    text = "<|im_start|>user\nred fish?<|im_end|>\n"
    for again in (load_tokenizer(str(tmp_path), None), AutoTokenizer.from_pretrained(tmp_path)):
        assert again(text).input_ids == tokenizer(text).input_ids
        assert again.chat_template == tokenizer.chat_template
        assert (again.pad_token_id, again.eos_token_id) == (0, 2)


def test_an_adapter_has_its_own_tokenizer_or_its_base_models(tmp_path):
    trained().save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").touch()
    assert load_tokenizer(str(adapter), None).eos_token == "<|eos|>"
    trained(eos_token="<|im_end|>").save_pretrained(adapter)
    assert load_tokenizer(str(adapter), None).eos_token == "<|im_end|>"


def test_its_own_padding_token_is_kept():
    pad = ensure_pad(trained(), LlamaConfig(vocab_size=290))
    assert (pad.token, pad.id, pad.origin, pad.embeddings) == ("<|pad|>", 0, "own", None)


def test_a_spare_token_pads_where_there_is_one():
    tokenizer = trained(pad_token="<|eos|>")
    pad = ensure_pad(tokenizer, LlamaConfig(vocab_size=290, eos_token_id=2))
    assert (pad.token, pad.id, pad.origin, pad.embeddings) == ("<|pad|>", 0, "spare", None)
    assert tokenizer.pad_token_id == 0 and len(tokenizer) == 290


def test_a_padding_token_that_ends_texts_by_the_model_is_replaced():
    tokenizer = trained(pad_token="<|im_end|>")
    pad = ensure_pad(tokenizer, LlamaConfig(vocab_size=290, eos_token_id=[2, 4]))
    assert pad.token == "<|pad|>"


@pytest.mark.parametrize(("rows", "grows_to"), [(290, 291), (291, None), (320, None)])
def test_a_new_token_is_added_otherwise(rows, grows_to):
    backend = trained().backend_tokenizer.to_str().replace("<|pad|>", "<|other|>")
    tokenizer = trained()
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer.from_str(backend), eos_token="<|eos|>")
    assert tokenizer.pad_token is None
    pad = ensure_pad(tokenizer, LlamaConfig(vocab_size=rows, eos_token_id=2))
    assert (pad.token, pad.id, pad.origin, pad.embeddings) == ("<|pad|>", 290, "added", grows_to)
    assert tokenizer("<|pad|>").input_ids == [290]


@pytest.mark.parametrize("spare", ["<|reserved_special_token_0|>", "<unused3>", "<|finetune_right_pad_id|>", "<unk>"])
def test_spare_tokens_of_known_families_are_found(spare):
    backend = trained().backend_tokenizer
    changed = backend.from_str(backend.to_str().replace("<|pad|>", spare))
    tokenizer = type(trained())(tokenizer_object=changed, eos_token="<|eos|>")
    pad = ensure_pad(tokenizer, LlamaConfig(vocab_size=290, eos_token_id=2))
    assert (pad.token, pad.id, pad.origin) == (spare, 0, "spare")


def test_code_of_a_tokenizer_is_refused(tmp_path):
    trained().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsafeError, match="auto_map"):
        load_tokenizer(str(tmp_path), None)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_tokenizer_is_an_error(tmp_path):
    with pytest.raises(CheckpointError):
        load_tokenizer(str(tmp_path), None)
