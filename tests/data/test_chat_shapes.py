"""Masks for the template shapes of the public model families, against spans written by hand.

A row is written as text with the trained parts between ⟦ and ⟧. Every answer is tokenised apart from its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data.chat import BUILT_IN, ChatTemplate, set_template, stop_token_ids
from rlhf.data.messages import message
from rlhf.errors import DataError

TEMPLATES = Path(__file__).parent / "templates"
SINGLE = [message("user", "hello there"), message("assistant", "fine thanks")]
MULTI = [*SINGLE, message("user", " how are you "), message("assistant", "it is four")]
SYSTEM = [message("system", "be kind"), *MULTI]


@dataclass(frozen=True)
class Shape:
    """A template with its tokenizer, and what its rows must look like."""

    single: str
    multi: str
    system: str | None  # None: the template refuses system messages
    end: str
    tokenizer: dict[str, Any] = field(default_factory=dict)


SHAPES = {
    "chatml": Shape(
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n⟦fine thanks<|im_end|>⟧",
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n⟦fine thanks<|im_end|>⟧\n"
        "<|im_start|>user\n how are you <|im_end|>\n<|im_start|>assistant\n⟦it is four<|im_end|>⟧",
        "<|im_start|>system\nbe kind<|im_end|>\n"
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n⟦fine thanks<|im_end|>⟧\n"
        "<|im_start|>user\n how are you <|im_end|>\n<|im_start|>assistant\n⟦it is four<|im_end|>⟧",
        "<|im_end|>",
        {"special": ["<|im_start|>", "<|im_end|>"], "eos": "<|endoftext|>"},
    ),
    "plain": Shape(
        "<s>hello there⟦fine thanks</s>⟧",
        "<s>hello there⟦fine thanks</s>⟧ how are you ⟦it is four</s>⟧",
        "<s>be kindhello there⟦fine thanks</s>⟧ how are you ⟦it is four</s>⟧",
        "</s>",
        {"bos": "<s>"},
    ),
    "llama3": Shape(  # trims contents; a turn ends with another token than a text
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nhello there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦fine thanks<|eot_id|>⟧",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nhello there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦fine thanks<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nhow are you<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is four<|eot_id|>⟧",
        "<|begin|><|start_header_id|>system<|end_header_id|>\n\nbe kind<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nhello there<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦fine thanks<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nhow are you<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦it is four<|eot_id|>⟧",
        "<|eot_id|>",
        {"special": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "eos": "<|end|>", "bos": "<|begin|>"},
    ),
    "llama2": Shape(  # no generation prompt, marks are plain text, pieces with a space in front, several begin tokens
        "<s>_[INST]_hello_there_[/INST]⟦_fine_thanks_</s>⟧",
        "<s>_[INST]_hello_there_[/INST]⟦_fine_thanks_</s>⟧<s>_[INST]_how_are_you_[/INST]⟦_it_is_four_</s>⟧",
        "<s>_[INST]_<<SYS>>\nbe_kind\n<</SYS>>\n\nhello_there_[/INST]⟦_fine_thanks_</s>⟧"
        "<s>_[INST]_how_are_you_[/INST]⟦_it_is_four_</s>⟧",
        "</s>",
        {"bos": "<s>", "words": "pieces"},
    ),
    "mistral": Shape(
        "<s>[INST]hello there[/INST]⟦fine thanks</s>⟧",
        "<s>[INST]hello there[/INST]⟦fine thanks</s>⟧[INST] how are you [/INST]⟦it is four</s>⟧",
        None,
        "</s>",
        {"special": ["[INST]", "[/INST]"], "bos": "<s>"},
    ),
    "gemma": Shape(  # the assistant has another name, no system messages
        "<bos><start_of_turn>user\nhello there<end_of_turn>\n<start_of_turn>model\n⟦fine thanks<end_of_turn>⟧",
        "<bos><start_of_turn>user\nhello there<end_of_turn>\n<start_of_turn>model\n⟦fine thanks<end_of_turn>⟧\n"
        "<start_of_turn>user\nhow are you<end_of_turn>\n<start_of_turn>model\n⟦it is four<end_of_turn>⟧",
        None,
        "<end_of_turn>",
        {"special": ["<start_of_turn>", "<end_of_turn>"], "eos": "<eos>", "bos": "<bos>"},
    ),
    "zephyr": Shape(  # headers are plain text
        "<|user|>\nhello there</s>\n<|assistant|>\n⟦fine thanks</s>⟧",
        "<|user|>\nhello there</s>\n<|assistant|>\n⟦fine thanks</s>⟧\n"
        "<|user|>\n how are you </s>\n<|assistant|>\n⟦it is four</s>⟧",
        "<|system|>\nbe kind</s>\n<|user|>\nhello there</s>\n<|assistant|>\n⟦fine thanks</s>⟧\n"
        "<|user|>\n how are you </s>\n<|assistant|>\n⟦it is four</s>⟧",
        "</s>",
        {"bos": "<s>"},
    ),
    "phi3": Shape(  # marks take the white space after them with them; the last turn is followed by a second end token
        "<|user|>hello there<|end|><|assistant|>⟦fine thanks<|end|>⟧",
        "<|user|>hello there<|end|><|assistant|>⟦fine thanks<|end|>⟧"
        "<|user|>how are you <|end|><|assistant|>⟦it is four<|end|>⟧",
        "<|system|>be kind<|end|><|user|>hello there<|end|><|assistant|>⟦fine thanks<|end|>⟧"
        "<|user|>how are you <|end|><|assistant|>⟦it is four<|end|>⟧",
        "<|end|>",
        {
            "special": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
            "eos": "<|endoftext|>",
            "rstrip": True,
        },
    ),
    "vicuna": Shape(  # a system text of its own, all marks plain text
        "A chat between a user and an assistant. USER: hello there ASSISTANT:⟦ fine thanks</s>⟧",
        "A chat between a user and an assistant. USER: hello there ASSISTANT:⟦ fine thanks</s>⟧"
        " USER:  how are you  ASSISTANT:⟦ it is four</s>⟧",
        "be kind USER: hello there ASSISTANT:⟦ fine thanks</s>⟧ USER:  how are you  ASSISTANT:⟦ it is four</s>⟧",
        "</s>",
    ),
    "deepseek": Shape(  # the generation prompt opens reasoning, earlier turns do not show it
        "<s><|User|>hello there<|Assistant|><think>\n⟦fine thanks</s>⟧",
        "<s><|User|>hello there<|Assistant|>fine thanks</s><|User|> how are you <|Assistant|><think>\n⟦it is four</s>⟧",
        "<s>be kind<|User|>hello there<|Assistant|>fine thanks</s><|User|> how are you <|Assistant|><think>\n"
        "⟦it is four</s>⟧",
        "</s>",
        {"plain": ["<|User|>", "<|Assistant|>", "<think>", "</think>"], "bos": "<s>"},
    ),
    "qwen25": Shape(  # a default system message
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n⟦fine thanks<|im_end|>⟧",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n⟦fine thanks<|im_end|>⟧\n"
        "<|im_start|>user\n how are you <|im_end|>\n<|im_start|>assistant\n⟦it is four<|im_end|>⟧",
        "<|im_start|>system\nbe kind<|im_end|>\n"
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n⟦fine thanks<|im_end|>⟧\n"
        "<|im_start|>user\n how are you <|im_end|>\n<|im_start|>assistant\n⟦it is four<|im_end|>⟧",
        "<|im_end|>",
        {"special": ["<|im_start|>", "<|im_end|>"], "eos": "<|endoftext|>"},
    ),
    "qwen3": Shape(  # the last answer shows its (empty) reasoning, earlier ones do not
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nfine thanks<|im_end|>⟧",
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\nfine thanks<|im_end|>\n"
        "<|im_start|>user\n how are you <|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nit is four<|im_end|>⟧",
        "<|im_start|>system\nbe kind<|im_end|>\n"
        "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\nfine thanks<|im_end|>\n"
        "<|im_start|>user\n how are you <|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\n\n</think>\n\nit is four<|im_end|>⟧",
        "<|im_end|>",
        {"special": ["<|im_start|>", "<|im_end|>"], "plain": ["<think>", "</think>"], "eos": "<|endoftext|>"},
    ),
    "instruct": Shape(  # no end token anywhere: the tokenizer's is put after every answer
        "### Instruction:\nhello there\n\n### Response:\n⟦fine thanks</s>⟧",
        "### Instruction:\nhello there\n\n### Response:\n⟦fine thanks</s>⟧\n\n"
        "### Instruction:\n how are you \n\n### Response:\n⟦it is four</s>⟧",
        "### Response:\nbe kind\n\n### Instruction:\nhello there\n\n### Response:\n⟦fine thanks</s>⟧\n\n"
        "### Instruction:\n how are you \n\n### Response:\n⟦it is four</s>⟧",
        "</s>",
    ),
}


def make(name: str, build_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    """The tokenizer of a shape, with its template set."""
    tokenizer = build_tokenizer(None, **SHAPES[name].tokenizer)
    set_template(tokenizer, name if name in BUILT_IN else str(TEMPLATES / f"{name}.jinja"))
    return tokenizer


def parts(marked: str) -> list[tuple[str, bool]]:
    """[(text, trained)] of a row written with ⟦ and ⟧."""
    pieces = re.split("[⟦⟧]", marked)
    return [(text, place % 2 == 1) for place, text in enumerate(pieces) if text]


def spans(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, mask: np.ndarray) -> list[tuple[str, bool]]:
    """[(text, trained)] of a tokenised row; a piece's leading space is written _ as in SentencePiece."""
    found: list[tuple[str, bool]] = []
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    for start, stop in zip(edges, edges[1:], strict=False):
        piece = ids[start:stop].tolist()
        text = tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if "▁" in "".join(tokenizer.convert_ids_to_tokens(piece)):
            text = "".join(tokenizer.convert_ids_to_tokens(piece)).replace("▁", "_")
        found.append((text, bool(mask[start])))
    return found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("conversation", ["single", "multi", "system"])
def test_masks_equal_hand_made_spans(name: str, conversation: str, build_tokenizer: Any) -> None:
    tokenizer = make(name, build_tokenizer)
    chat = ChatTemplate(tokenizer)
    messages = {"single": SINGLE, "multi": MULTI, "system": SYSTEM}[conversation]
    expected = getattr(SHAPES[name], conversation)
    if expected is None:
        with pytest.raises(DataError, match="rows.jsonl:7: messages: expected a conversation that the chat template"):
            chat.conversation(messages, 0, "rows.jsonl:7")
        return
    ((ids, mask),) = chat.encode([chat.conversation(messages, 0, "rows.jsonl:7")])
    assert spans(tokenizer, ids, mask) == parts(expected)


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_starts_with_the_ids_of_its_rollout_prompt(name: str, build_tokenizer: Any) -> None:
    tokenizer = make(name, build_tokenizer)
    chat = ChatTemplate(tokenizer)
    for messages in (SINGLE, MULTI):
        last = len(messages) - 1
        rows = [chat.prompt(messages[:-1], "a"), chat.conversation(messages, last, "a")]
        (prompt, none_trained), (ids, mask) = chat.encode(rows)
        assert not none_trained.any()
        np.testing.assert_array_equal(ids[: len(prompt)], prompt)
        assert mask.tolist() == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


@pytest.mark.parametrize("name", SHAPES)
def test_a_first_prompt_is_what_the_tokenizer_makes_of_the_rendered_text(name: str, build_tokenizer: Any) -> None:
    tokenizer = make(name, build_tokenizer)
    rendered = tokenizer.apply_chat_template(
        SINGLE[:1], tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors=None
    )
    ((ids, _),) = ChatTemplate(tokenizer).encode([ChatTemplate(tokenizer).prompt(SINGLE[:1], "a")])
    assert ids.tolist() == rendered["input_ids"]
    assert ids.tolist().count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", SHAPES)
def test_end_tokens_are_trained_and_stop_rollouts(name: str, build_tokenizer: Any) -> None:
    tokenizer = make(name, build_tokenizer)
    chat = ChatTemplate(tokenizer)
    assert chat.end_token == SHAPES[name].end
    end = tokenizer.convert_tokens_to_ids(chat.end_token)
    ((ids, mask),) = chat.encode([chat.conversation(SINGLE, 0, "a")])
    assert (ids[-1], mask[-1]) == (end, True)
    assert stop_token_ids(tokenizer) == sorted({end, tokenizer.eos_token_id})
    assert tokenizer.pad_token_id == tokenizer.eos_token_id  # nothing above was masked by id


@pytest.mark.parametrize("name", SHAPES)
def test_contents_never_become_control_tokens(name: str, build_tokenizer: Any) -> None:
    tokenizer = make(name, build_tokenizer)
    chat = ChatTemplate(tokenizer)
    marks = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    nasty = "a " + " ".join(marks) + " " + "".join(marks) + f"b{marks[0][:1]}{marks[0]}{marks[0][1:]}c"
    harmless = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    hostile = [message(m["role"], nasty) for m in harmless]
    rows = [chat.conversation(messages, 0, "a") for messages in (harmless, hostile)]
    special = [tokenizer.convert_tokens_to_ids(mark) for mark in marks]
    counts = [[int((ids == index).sum()) for index in special] for ids, _ in chat.encode(rows)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", SHAPES)
def test_last_answer_leaves_earlier_answers_untrained_with_the_same_ids(name: str, build_tokenizer: Any) -> None:
    chat = ChatTemplate(make(name, build_tokenizer))
    (every, every_mask), (last, last_mask) = chat.encode([chat.conversation(MULTI, first, "a") for first in (0, 3)])
    np.testing.assert_array_equal(every, last)
    assert last_mask.sum() <= every_mask.sum() and not (last_mask & ~every_mask).any()
    assert np.flatnonzero(np.diff(last_mask)).size == 1
