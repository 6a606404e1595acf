"""Tokenizers: trained on the stage's own data, or loaded; always with a padding token that is not the end token."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from rlhf.errors import CheckpointError
from rlhf.models.folder import is_adapter, read_adapter
from rlhf.models.load import reading
from rlhf.models.trust import may_run_code

logger = logging.getLogger("rlhf.models")

PAD, BOS, EOS, TURN_START, TURN_END = "<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"
# Tokens that a vocabulary keeps for padding or for nothing, best first.
_SPARE = [
    re.compile(pattern)
    for pattern in (
        r"<\|pad\|>|<pad>|\[PAD\]",
        r"<\|finetune_right_pad(_id)?\|>|<\|pad_token\|>|<\|padding\|>",
        r"<\|?(reserved|unused|extra)[a-z_ ]*\d+\|?>|\[unused\d+\]",
        r"<\|(fim|vision|image)_pad\|>",
        r"<unk>|<\|unk\|>|\[UNK\]",
    )
]


def train_tokenizer(texts: Iterable[str], vocab_size: int, chat_template: str | None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (no unknown token: every text can be written). The same texts give the same tokenizer.

    vocab_size: tokens, the five special ones and the 256 bytes included; fewer where the texts have no more pairs.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, TURN_START, TURN_END],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder or hub id, running code from it only where that is trusted.

    An adapter folder without a tokenizer of its own has its base model's.
    """
    if is_adapter(source) and not (Path(source) / "tokenizer_config.json").exists():
        adapter = read_adapter(source)
        return load_tokenizer(adapter["base_model_name_or_path"], adapter.get("revision"))
    with reading(source):
        config = get_tokenizer_config(source, revision=revision)
        trusted = may_run_code(source, revision, config, f"{source}/tokenizer_config.json")
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trusted)
    if not tokenizer.is_fast:
        raise CheckpointError(
            "expected a tokenizer of the `tokenizers` library, found one written in Python",
            where=source,
            fix="Convert it with transformers (AutoTokenizer with from_slow=True) and save it to a local folder.",
        )
    return tokenizer


@dataclass(frozen=True)
class PadToken:
    """Which token pads, and where it came from."""

    token: str
    id: int
    origin: Literal["own", "spare", "added"]
    embeddings: int | None  # rows the embedding must grow to, None where it is large enough


def ensure_pad(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig | None) -> PadToken:
    """Give the tokenizer a padding token that is none of the end tokens.

    Its own if that will do, else a spare token of the vocabulary, else a new one. `config` (None for a model made from
    scratch) says which ids end a text and how many rows the embedding has; `build_policy` and `build_scorer` grow it.
    """
    ends = end_ids(tokenizer, config)
    origin: Literal["own", "spare", "added"] = "own"
    if tokenizer.pad_token is None or tokenizer.pad_token_id in ends:
        spare = _spare_token(tokenizer, ends)
        origin = "added" if spare is None else "spare"
        tokenizer.add_special_tokens({"pad_token": PAD if spare is None else spare})
        logger.info("padding with %s (%s token %d)", tokenizer.pad_token, origin, tokenizer.pad_token_id)
    rows = None if config is None else config.get_text_config().vocab_size
    grows = rows is not None and len(tokenizer) > rows
    return PadToken(tokenizer.pad_token, tokenizer.pad_token_id, origin, len(tokenizer) if grows else None)


def end_ids(tokenizer: PreTrainedTokenizerFast, config: Any) -> set[int]:
    """The ids that end a text: of the tokenizer and of a model or generation configuration."""
    ids = [] if config is None or config.eos_token_id is None else config.eos_token_id
    return {*([ids] if isinstance(ids, int) else ids), tokenizer.eos_token_id} - {None}


def _spare_token(tokenizer: PreTrainedTokenizerFast, ends: set[int]) -> str | None:
    vocabulary = tokenizer.get_vocab()
    taken = {*ends, tokenizer.bos_token_id}
    for pattern in _SPARE:
        found = [
            (index, token) for token, index in vocabulary.items() if index not in taken and pattern.fullmatch(token)
        ]
        if found:
            return min(found)[1]
    return None


def decoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[list[int]], str]:
    """ids -> text without special tokens, spaces untouched."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return decode
