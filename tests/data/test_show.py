"""What `rlhf show` prints, with colours and without."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from rlhf.data.show import show
from rlhf.recipe.schema import DataBlock

Write = Callable[[str, Any], str]


def printed(
    data: DataBlock, tokenizer: PreTrainedTokenizerFast, kind: Any, coloured: bool = False, **options: Any
) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=coloured, color_system="standard" if coloured else None)
    for part in show(data, tokenizer, kind, **options):
        console.print(part)
    return out.getvalue()


def test_trained_and_context(write: Write, chatml: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", [{"prompt": "hi", "completion": "hello [x] ä"}, {"prompt": "2", "completion": "3"}])
    text = printed(DataBlock(path=path), chatml, "tokens", count=1)
    assert text.startswith("[trained]  context  {dropped}")
    assert f"{path}:1  prompt_completion" in text and f"{path}:2" not in text
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n[hello [x] " in text
    assert "<|im_end|>]" in text and " trained, " in text


def test_both_sides_of_pairs_and_the_fate_of_long_ones(write: Write, plain: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "QQQQ", "chosen": "XX", "rejected": "Z" * n} for n in (3, 9)]
    path = write("a.jsonl", [*rows, {"prompt": "Q", "chosen": "X", "rejected": ""}])
    text = printed(DataBlock(path=path, max_length=10), plain, "pairs", count=3)
    assert "chosen (3 trained, 5 context): <s>QQQQ[XX</s>]" in text
    assert "rejected (4 trained, 5 context): <s>QQQQ[ZZZ</s>]" in text
    assert "dropped: longer than max_length" in text and "rejected (15 dropped): {<s>QQQQZZZZZZZZZ</s>}" in text
    assert f"{path}:3  pairs  dropped: empty answer" in text
    cut = printed(DataBlock(path=path, max_length=10, on_long="truncate_answer"), plain, "pairs", count=2)
    assert "rejected (5 trained, 5 context, 5 dropped): <s>QQQQ[ZZZZZ]{ZZZZ</s>}" in cut
    cut = printed(DataBlock(path=path, max_length=11, on_long="truncate_prompt"), plain, "pairs", count=2)
    assert "chosen (3 trained, 1 context, 4 dropped): <s>{QQQQ}[XX</s>]" in cut and "prompt cut on the left" in cut


def test_single_answers_and_lists(write: Write, plain: PreTrainedTokenizerFast) -> None:
    pair = {"prompt": "QQQQ", "chosen": "XX", "rejected": "ZZZ"}
    text = printed(DataBlock(path=write("a.jsonl", [pair])), plain, "answers", count=2)
    assert "good answer, reward 1 (3 trained, 5 context): <s>QQQQ[XX</s>]" in text
    assert "bad answer, reward -1 (4 trained, 5 context): <s>QQQQ[ZZZ</s>]" in text
    row = {"prompt": "QQQQ", "answers": ["X", "Z" * 9, "Y"], "scores": [0.5, 2, -1]}
    path = write("b.jsonl", [row, {**row, "answers": ["X", "Z" * 9, "Y" * 9]}])
    text = printed(DataBlock(path=path, max_length=10), plain, "lists", count=2)
    assert f"{path}:1  lists  9 tokens kept  answers of a list left out as too long" in text
    assert "answer 1, score 0.5 (2 trained, 5 context): <s>QQQQ[X</s>]" in text
    assert "answer 2, score 2 (15 dropped): {<s>QQQQZZZZZZZZZ</s>}" in text
    assert f"{path}:2  lists  0 tokens kept  dropped: fewer than two answers of a list fit" in text
    assert "answer 1, score 0.5 (7 dropped): {<s>QQQQX</s>}" in text


def test_prompts_and_errors_are_shown(write: Write, plain: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", [{"prompt": "Q" * 3}, {"prompt": "Q" * 30}])
    data = DataBlock(path=path, max_length=20, on_long="error")
    text = printed(data, plain, "prompts", count=2, max_new_tokens=10)
    assert "prompt (4 context): <s>QQQ" in text and "prompt (31 dropped): {<s>" in text


def test_colours_replace_brackets(write: Write, plain: PreTrainedTokenizerFast) -> None:
    path = write("a.jsonl", [{"prompt": "Q", "completion": "Z" * 12}])
    data = DataBlock(path=path, max_length=10, on_long="truncate_answer")
    text = printed(data, plain, "tokens", coloured=True, count=1)
    assert "\x1b[1;32m" in text and "\x1b[9;31m" in text and "\x1b[2m" in text
    assert "[Z" not in text.replace("\x1b[", "") and "{" not in text
