"""Tiny random models of several families, wide awake: weights large enough that a wrong position or mask shows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf.models.tokenizer import train_tokenizer

TEXTS = ["the cat sat on the mat", "a dog ran after the cat", "42 birds, 7 dogs and 1 cat", "what did the dog do?"] * 5
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
COMMON = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 2}
WIDE = {"intermediate_size": 64, "initializer_range": 0.15, "max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False, **WIDE},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True, **WIDE},
    "gpt2": {"n_positions": 64, "initializer_range": 0.15},
    "gpt_neox": {"tie_word_embeddings": False, **WIDE},
    "gemma2": {
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
        **WIDE,
    },
}


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300, TEMPLATE)


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """tiny("llama") is a causal language model, tiny("llama", scorer=True) has a scalar head; weights from a seed."""

    def make(name: str, scorer: bool = False, **changes: object) -> nn.Module:
        config = AutoConfig.for_model(name, **{**COMMON, **FAMILIES.get(name, {}), "pad_token_id": 0, **changes})
        auto_class = AutoModelForCausalLM
        if scorer:
            config.num_labels, auto_class = 1, AutoModelForSequenceClassification
        attention = "eager" if name == "gemma2" else "sdpa"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return auto_class.from_config(config, attn_implementation=attention).eval()

    return make


@pytest.fixture
def ragged() -> tuple[list[Tensor], Callable[[str], tuple[Tensor, Tensor]]]:
    """Rows of unequal length, and a function that pads them on one side: (ids, attention)."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 300, (n,), generator=generator) for n in (12, 7, 9, 4)]

    def padded(side: str) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows))
        ids, attention = (
            torch.zeros(len(rows), width, dtype=torch.long),
            torch.zeros(len(rows), width, dtype=torch.bool),
        )
        for i, row in enumerate(rows):
            columns = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, columns], attention[i, columns] = row, True
        return ids, attention

    return rows, padded
