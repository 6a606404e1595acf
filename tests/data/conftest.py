"""Small tokenizers trained on the spot, and files written for a test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "You are a helpful assistant. A chat between a curious user and an assistant. hello there how are you fine thanks "
    "what is two plus two it is four USER: ASSISTANT: [INST] [/INST] ### Instruction: ### Response: user assistant"
)
SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def build_tokenizer(
    template: str | None,
    special: Sequence[str] = (),
    *,
    plain: Sequence[str] = (),
    eos: str = "</s>",
    bos: str | None = None,
    pad: str | None = None,
    rstrip: bool = False,
    words: str = "bytes",
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer whose `special` tokens are special and whose `plain` ones are added without being so.

    words: "bytes" writes every text as bytes (as GPT-2 and its followers do); "pieces" puts a space before the first
    word of a text (as SentencePiece does).
    """
    backend = Tokenizer(models.BPE(unk_token=None, byte_fallback=words == "pieces"))
    tokens = list(dict.fromkeys([*([bos] if bos else []), eos, *special]))
    if words == "bytes":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([WORDS] * 3, trainer)
    backend.add_special_tokens([AddedToken(t, rstrip=rstrip, normalized=False, special=True) for t in tokens])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in plain])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token=pad or eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(name="build_tokenizer")
def _build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture
def chatml() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the built-in chatml template, pad = eos."""
    from rlhf.data.chat import set_template

    tokenizer = build_tokenizer(None, ["<|im_start|>", "<|im_end|>"])
    set_template(tokenizer, "chatml")
    return tokenizer


@pytest.fixture
def plain() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the built-in plain template."""
    from rlhf.data.chat import set_template

    tokenizer = build_tokenizer(None, bos="<s>")
    set_template(tokenizer, "plain")
    return tokenizer


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    """Write bytes, text, or rows (as JSON lines) to a file of the test and return its path."""

    def write(name: str, content: Any) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return write


@pytest.fixture
def shared() -> Path:
    """The folder of real data beside the project; the test is skipped where there is none."""
    if not SHARED.is_dir():
        pytest.skip("no real data beside the project")
    return SHARED
