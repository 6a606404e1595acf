"""Rows, tokenizers and models of the benchmark: made on the spot, kept in the work folder for the next run."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf.data import chat
from rlhf.data.examples import raw_texts
from rlhf.models.build import draw_head, seeded
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.schema import DataBlock

# hidden size, layers, heads, key/value heads, feed-forward size, vocabulary, tied embeddings
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "small": (256, 6, 8, 4, 1024, 4096, False),
    "wide": (256, 4, 8, 4, 1024, 32_000, True),
}
WARM_STEPS, WARM_ROWS = 80, 16  # of fine-tuning before a model samples: its answers then end, at various lengths


@dataclass(frozen=True)
class Sources:
    """Where rows come from. Without files they are those of the package's demo task, which are short."""

    hh: str | None
    gsm8k: str | None

    def sft(self) -> dict[str, Any]:
        """The `data` block of supervised rows."""
        if self.gsm8k is None:
            return {"path": "demo:sft"}
        return {"path": self.gsm8k, "columns": {"prompt": "question", "completion": "answer"}}

    def pairs(self) -> dict[str, Any]:
        """Of pairs."""
        return {"path": "demo:pairs"} if self.hh is None else {"path": self.hh, "format": "dialogue_pairs"}

    def prompts(self) -> dict[str, Any]:
        """Of prompts to answer."""
        if self.gsm8k is None:
            return {"path": "demo:prompts"}
        return {"path": self.gsm8k, "columns": {"prompt": "question"}, "format": "prompts"}

    def rule(self) -> dict[str, Any]:
        """The reward that needs no model. A small model gets no sum right, but its answers differ in length."""
        return {"kind": "demo_gold"} if self.gsm8k is None else {"kind": "length", "target": 40, "scale": 40}

    def home(self, work: Path) -> Path:
        """The folder for what is made from these rows."""
        return work / hashlib.sha256(json.dumps([self.hh, self.gsm8k]).encode()).hexdigest()[:8]


def tokenizer_of(sources: Sources, vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the rows. Its vocabulary is smaller where they have no more pairs to merge."""
    texts = [*raw_texts(_block(sources.sft()), "tokens"), *raw_texts(_block(sources.pairs()), "pairs")]
    tokenizer = train_tokenizer(texts, vocab, None)
    chat.set_template(tokenizer, "plain")
    return tokenizer


def _block(values: dict[str, Any]) -> DataBlock:
    return DataBlock.model_validate(values, by_alias=True)


def config_of(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The configuration; it has all rows of the vocabulary, whatever the tokenizer found."""
    hidden, layers, heads, kv_heads, ffn, vocab, tied = SHAPES[name]
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def random_policy(name: str, sources: Sources, work: Path) -> Path:
    """The folder of a policy with drawn weights, and its tokenizer."""
    folder = sources.home(work) / name
    if not folder.exists():
        tokenizer = tokenizer_of(sources, SHAPES[name][5])
        with seeded(0):
            model = LlamaForCausalLM(config_of(name, tokenizer))
        keep_model(folder, model, tokenizer)
    return folder


def scorer_of(policy: Path) -> Path:
    """The folder of a reward model: the policy with a drawn head."""
    folder = policy.with_name(f"{policy.name}-rm")
    if not folder.exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(policy)
        model = LlamaForSequenceClassification.from_pretrained(policy, num_labels=1, dtype=torch.float32)
        draw_head(model, 0)
        keep_model(folder, model, tokenizer)
    return folder


def keep_model(folder: Path, model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Written whole or not at all: an interrupted run leaves nothing that looks finished."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(folder)


def long_rows(sources: Sources, tokens: int, rows: int, folder: Path) -> Path:
    """A file of supervised rows that are all longer than this many tokens; the recipe cuts them to length."""
    path = folder / f"rows-{tokens}-{rows}.jsonl"
    if not path.exists():
        texts = [text for text in raw_texts(_block(sources.sft()), "tokens") if text.strip()]
        folder.mkdir(parents=True, exist_ok=True)
        lines, place = [], 0
        for _ in range(rows):
            parts, size = [], 0
            while size < 8 * tokens:  # characters, far more than a token has on average
                parts.append(texts[place % len(texts)])
                size += len(parts[-1])
                place += 1
            lines.append(json.dumps({"prompt": parts[0][:20], "completion": " ".join(parts)}) + "\n")
        path.write_text("".join(lines), encoding="utf-8")
    return path
