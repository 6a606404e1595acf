"""Single answers and lists of answers, from file to example: what is kept, left out and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data.drafts import ALL_EQUAL, EMPTY, UNTRAINED
from rlhf.data.examples import Loaded, load_examples, raw_texts
from rlhf.data.formats import EQUAL, NO_ANSWER
from rlhf.data.limits import ANSWER_CUT, ANSWERS_OUT, FEW_ANSWERS, LONG, LONG_ANSWER, NO_ROOM, PROMPT_CUT
from rlhf.data.messages import message
from rlhf.data.records import check_records
from rlhf.errors import DataError
from rlhf.recipe.schema import DataBlock

Write = Callable[[str, Any], str]
Tokenizer = PreTrainedTokenizerFast


def text(tokenizer: Tokenizer, ids: Any) -> str:
    return tokenizer.decode(ids.tolist())


def counts(loaded: Loaded) -> tuple[int, int, dict[str, int], dict[str, int]]:
    report = loaded.report.sources[0]
    return report.read, report.kept, dict(report.dropped), dict(report.changed)


def scored_list(prompt: int, lengths: list[int], **fields: Any) -> dict[str, Any]:
    """Answers of so many tokens, the end token not counted; their scores are their places."""
    scores = list(range(len(lengths)))
    return {"prompt": "Q" * prompt, "answers": ["Z" * n for n in lengths], "scores": scores, **fields}


# --- answers -------------------------------------------------------------------------------------------------------


def test_answers_of_labels_and_scores(write: Write, plain: Tokenizer) -> None:
    single = {"prompt": "QQ", "completion": "ZZZ"}
    labelled = write("a.jsonl", [{**single, "label": True}, {**single, "label": 0, "density": 0.25}])
    good, bad = load_examples(DataBlock(path=labelled), plain, "answers", 0).train
    assert (text(plain, good.prompt_ids), text(plain, good.answer_ids)) == ("<s>QQ", "ZZZ</s>")
    assert good.answer_mask.all() and good.lengths() == (7, 4)
    assert (good.is_good, good.reward, good.density, good.row) == (True, 1.0, 0.5, 0)
    assert (bad.is_good, bad.reward, bad.density, bad.row) == (False, -1.0, 0.25, 1)
    scored = write("b.jsonl", [{**single, "score": score} for score in (0.5, 0, -3)])
    loaded = load_examples(DataBlock(path=scored), plain, "answers", 0)
    assert [(e.is_good, e.reward) for e in loaded.train] == [(True, 0.5), (False, 0.0), (False, -3.0)]
    assert len(load_examples(DataBlock(path=scored), plain, "tokens", 0).train) == 3  # imitation asks for no score


def test_answers_of_pairs_are_numbered_apart(write: Write, chatml: Tokenizer) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "d", "rejected": "d"}]
    loaded = load_examples(DataBlock(path=write("a.jsonl", rows)), chatml, "answers", 0)
    assert counts(loaded) == (2, 2, {EQUAL: 2}, {})
    assert [(e.row, e.is_good, text(chatml, e.answer_ids)) for e in loaded.train] == [
        (0, True, "b<|im_end|>"),
        (1, False, "c<|im_end|>"),
    ]


def test_only_what_follows_the_prompt_is_trained(write: Write, chatml: Tokenizer) -> None:
    turns = [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    loaded = load_examples(DataBlock(path=write("a.jsonl", [{"messages": turns, "label": 1}])), chatml, "answers", 0)
    (example,) = loaded.train
    assert text(chatml, example.answer_ids[example.answer_mask]) == "d<|im_end|>"
    assert text(chatml, example.prompt_ids).endswith("c<|im_end|>\n<|im_start|>assistant\n")


def test_answers_that_cannot_be_used_are_counted(write: Write, plain: Tokenizer) -> None:
    user, good = message("user", "a"), message("assistant", "b")
    rows: list[Any] = [{"messages": [user], "label": 1}, {"messages": [user, good], "label": 1}]
    rows += [{"messages": [user, message("assistant", each)], "label": 0} for each in ("", "Z" * 30)]
    loaded = load_examples(DataBlock(path=write("a.jsonl", rows), max_length=20), plain, "answers", 0)
    assert counts(loaded) == (4, 1, {NO_ANSWER: 1, EMPTY: 1, LONG: 1}, {})


# --- lists ---------------------------------------------------------------------------------------------------------


def test_lists(write: Write, chatml: Tokenizer) -> None:
    row = {"prompt": "a b", "answers": ["c", [message("assistant", "d e")], "c"], "scores": [0.5, 2, 0.5]}
    (example,) = load_examples(DataBlock(path=write("a.jsonl", [row])), chatml, "lists", 0).train
    assert text(chatml, example.prompt_ids) == "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n"
    assert [text(chatml, ids) for ids, _ in example.answers] == ["c<|im_end|>", "d e<|im_end|>", "c<|im_end|>"]
    assert all(mask.all() for _, mask in example.answers)
    assert (example.scores, example.row) == ((0.5, 2.0, 0.5), 0)
    tokens = sum(len(example.prompt_ids) + len(ids) for ids, _ in example.answers)
    assert example.lengths() == (tokens, tokens - 3 * len(example.prompt_ids))


def test_pairs_are_lists_of_two(write: Write, plain: Tokenizer) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "d", "rejected": "d"}]
    loaded = load_examples(DataBlock(path=write("a.jsonl", rows)), plain, "lists", 0)
    assert counts(loaded) == (2, 1, {EQUAL: 1}, {})
    assert [text(plain, ids) for ids, _ in loaded.train[0].answers] == ["b</s>", "c</s>"]
    assert loaded.train[0].scores == (1.0, 0.0)


# The limit is 12: begin token, prompt, answer and end token.
ROWS = [scored_list(4, [3, 6, 7, 4]), scored_list(4, [3, 9, 8]), scored_list(20, [1, 2]), scored_list(2, [11, 12, 13])]


@pytest.mark.parametrize(
    ("rule", "kept", "dropped", "changed"),
    [
        ("drop", [(4, (4, 7, 5), (0, 1, 3))], {FEW_ANSWERS: 1, LONG: 2}, {ANSWERS_OUT: 1}),
        (
            "truncate_prompt",
            [(3, (4, 7, 8, 5), (0, 1, 2, 3)), (1, (4, 10, 9), (0, 1, 2)), (8, (2, 3), (0, 1))],
            {LONG_ANSWER: 1},
            {PROMPT_CUT: 3},
        ),
        (
            "truncate_answer",
            [(4, (4, 7, 7, 5), (0, 1, 2, 3)), (4, (4, 7, 7), (0, 1, 2))],
            {NO_ROOM: 1, ALL_EQUAL: 1},  # the last list is cut to equal answers
            {ANSWER_CUT: 3},
        ),
    ],
)
def test_long_answers_are_left_out_of_their_list(
    rule: str, kept: list[Any], dropped: dict[str, int], changed: dict[str, int], write: Write, plain: Tokenizer
) -> None:
    path = write("a.jsonl", ROWS)
    loaded = load_examples(DataBlock(path=path, max_length=12, on_long=rule), plain, "lists", 0)
    assert counts(loaded) == (4, len(kept), dropped, changed)
    found = [(len(e.prompt_ids) - 1, tuple(len(ids) for ids, _ in e.answers), e.scores) for e in loaded.train]
    assert found == kept


def test_long_answers_as_an_error(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [scored_list(1, [1, 2]), scored_list(1, [1, 2, 30])])
    with pytest.raises(DataError, match=f"{path}:2: expected at most 12 tokens, found a row that is longer than"):
        load_examples(DataBlock(path=path, max_length=12, on_long="error"), plain, "lists", 0)


def test_lists_that_cannot_be_used_are_counted(write: Write, plain: Tokenizer) -> None:
    turns = [message("assistant", "X"), message("user", "Q" * 9), message("assistant", "Y")]
    rows = [
        scored_list(1, [1, 0]),
        scored_list(1, [2, 2]),
        scored_list(1, [1, 2]),
        {"prompt": "Q", "answers": ["Z", turns], "scores": [0, 1]},
    ]
    data = DataBlock(path=write("a.jsonl", rows), max_length=10, on_long="truncate_answer", train_on="last_answer")
    loaded = load_examples(data, plain, "lists", 0)
    assert counts(loaded) == (4, 1, {EMPTY: 1, ALL_EQUAL: 1, UNTRAINED: 1}, {ANSWER_CUT: 1})
    with pytest.raises(DataError, match=r"a.jsonl:1: answers\[1\]: expected words, found empty text"):
        load_examples(data.model_copy(update={"on_empty": "error"}), plain, "lists", 0)


def test_other_kinds_of_the_same_rows(write: Write, plain: Tokenizer) -> None:
    data = DataBlock(path=write("a.jsonl", [scored_list(2, [1, 2])]))
    (prompt,) = load_examples(data, plain, "prompts", 0, max_new_tokens=4).train
    assert text(plain, prompt.ids) == "<s>QQ"
    assert list(raw_texts(data, "lists")) == ["QQ", "Z", "ZZ"]


# --- what a kind refuses -------------------------------------------------------------------------------------------

FORMATS = {
    "prompts": {"prompt": "a"},
    "prompt_completion": {"prompt": "a", "completion": "b"},
    "labelled": {"prompt": "a", "completion": "b", "label": 1},
    "scored": {"prompt": "a", "completion": "b", "score": 1},
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "lists": {"prompt": "a", "answers": ["b", "c"], "scores": [1, 2]},
    "text": {"text": "a"},
}
TAKES = {
    "tokens": {"prompt_completion", "labelled", "scored", "pairs", "text"},
    "pairs": {"pairs"},
    "answers": {"labelled", "scored", "pairs"},
    "lists": {"lists", "pairs"},
    "prompts": set(FORMATS) - {"text"},
}


@pytest.mark.parametrize("kind", TAKES)
@pytest.mark.parametrize("found", FORMATS)
def test_formats_that_a_kind_takes(kind: Any, found: str, write: Write) -> None:
    data = DataBlock(path=write("a.jsonl", [FORMATS[found]]))
    if found in TAKES[kind]:
        check_records(data, kind)
        return
    with pytest.raises(DataError, match=rf"a.jsonl:1: expected .*, found rows of the format {found}"):
        check_records(data, kind)


def test_refusals_name_the_losses_that_would_take_the_rows(write: Write) -> None:
    for found in ("labelled", "scored"):
        with pytest.raises(DataError, match="losses of single answers \\(kto, bco"):
            check_records(DataBlock(path=write(f"{found}.jsonl", [FORMATS[found]])), "pairs")
    with pytest.raises(DataError, match="Choose a loss of lists"):
        check_records(DataBlock(path=write("lists.jsonl", [FORMATS["lists"]])), "pairs")
    with pytest.raises(DataError, match="Make every answer a row of its own: prompt, completion, score"):
        check_records(DataBlock(path=write("lists.jsonl", [FORMATS["lists"]])), "answers")
