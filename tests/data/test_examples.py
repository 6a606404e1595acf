"""From recipe to examples: what is kept, what is cut, what is dropped, and that all of it is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data.chat import ChatTemplate
from rlhf.data.drafts import EMPTY, EMPTY_PROMPT, REWRITTEN, UNTRAINED
from rlhf.data.examples import LEFT_OUT, Loaded, load_examples, raw_texts
from rlhf.data.formats import BAD_LABEL, EQUAL, NO_ANSWER, NO_PARTNER, OTHER_PROMPT
from rlhf.data.limits import ANSWER_CUT, LONG, LONG_ANSWER, LONG_PROMPT, NO_ROOM, PROMPT_CUT
from rlhf.data.messages import message
from rlhf.errors import DataError
from rlhf.recipe.schema import DataBlock, SourceBlock

Write = Callable[[str, Any], str]
Tokenizer = PreTrainedTokenizerFast


def text(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist())


def counts(loaded: Loaded, source: int = 0) -> tuple[int, int, dict[str, int], dict[str, int]]:
    report = loaded.report.sources[source]
    return report.read, report.kept, dict(report.dropped), dict(report.changed)


def letters(prompt: int, completion: int) -> dict[str, str]:
    """A row of exactly so many tokens, the begin and end token not counted: no two such letters merge."""
    return {"prompt": "Q" * prompt, "completion": "Z" * completion}


# --- kinds ---------------------------------------------------------------------------------------------------------


def test_tokens(write: Write, plain: Tokenizer) -> None:
    loaded = load_examples(DataBlock(path=write("a.jsonl", [letters(2, 3), letters(1, 1)])), plain, "tokens", 0)
    first = loaded.train[0]
    assert text(plain, first.ids) == "<s>QQZZZ</s>"
    assert text(plain, first.ids[first.mask]) == "ZZZ</s>"
    assert (first.ids.dtype, first.mask.dtype, first.row, loaded.train[1].row) == (np.int32, np.bool_, 0, 1)
    assert (loaded.report.train.tokens, loaded.report.train.trained, loaded.report.train.longest) == (11, 6, 7)
    assert loaded.eval == []


def test_pairs_share_their_prompt(write: Write, chatml: Tokenizer) -> None:
    row = {"prompt": "a b", "chosen": "c", "rejected": "d e", "margin": 2}
    (pair,) = load_examples(DataBlock(path=write("a.jsonl", [row])), chatml, "pairs", 0).train
    assert text(chatml, pair.prompt_ids) == "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n"
    assert (text(chatml, pair.chosen_ids), text(chatml, pair.rejected_ids)) == ("c<|im_end|>", "d e<|im_end|>")
    assert pair.chosen_mask.all() and pair.rejected_mask.all() and pair.margin == 2.0


def test_answers_of_several_turns_are_trained_without_the_turns_between(write: Write, chatml: Tokenizer) -> None:
    start = [message("user", "a"), message("assistant", "same")]
    row = {
        "chosen": [*start, message("user", "b"), message("assistant", "c")],
        "rejected": [message("user", "a"), message("assistant", "other")],
    }
    path = write("a.jsonl", [row])
    (pair,) = load_examples(DataBlock(path=path), chatml, "pairs", 0).train
    assert text(chatml, pair.prompt_ids).endswith("user\na<|im_end|>\n<|im_start|>assistant\n")
    assert text(chatml, pair.chosen_ids[pair.chosen_mask]) == "same<|im_end|>c<|im_end|>"
    (pair,) = load_examples(DataBlock(path=path, train_on="last_answer"), chatml, "pairs", 0).train
    assert text(chatml, pair.chosen_ids[pair.chosen_mask]) == "c<|im_end|>"


def test_prompts_carry_what_rewards_need(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [{"question": "2+2", "answer": "#### 4"}])
    data = DataBlock(path=path, columns={"prompt": "question"})
    (prompt,) = load_examples(data, plain, "prompts", 0, max_new_tokens=8).train
    assert text(plain, prompt.ids) == "<s>2+2"
    assert (prompt.fields["answer"], prompt.fields["prompt"]) == ("#### 4", "2+2")


def test_prompts_of_pairs_and_completions_are_the_rollout_prompts_of_training_rows(
    write: Write, chatml: Tokenizer
) -> None:
    row = {
        "messages": [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    }
    data = DataBlock(path=write("a.jsonl", [row]))
    (prompt,) = load_examples(data, chatml, "prompts", 0, max_new_tokens=8).train
    (row_example,) = load_examples(data, chatml, "tokens", 0).train
    np.testing.assert_array_equal(row_example.ids[: len(prompt.ids)], prompt.ids)
    assert prompt.fields["completion"] == "d"


def test_train_on(write: Write, chatml: Tokenizer) -> None:
    row = {
        "messages": [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")]
    }
    for train_on, expected in (("all_answers", "b<|im_end|>d<|im_end|>"), ("last_answer", "d<|im_end|>")):
        data = DataBlock(path=write("a.jsonl", [row]), train_on=train_on)
        (example,) = load_examples(data, chatml, "tokens", 0).train
        assert text(chatml, example.ids[example.mask]) == expected


def test_labelled_rows_teach_their_good_answers(write: Write, plain: Tokenizer) -> None:
    rows = [{**letters(1, n), "label": n % 2} for n in range(1, 6)]
    path = write("a.jsonl", rows)
    assert counts(load_examples(DataBlock(path=path), plain, "tokens", 0)) == (5, 3, {BAD_LABEL: 2}, {})
    loaded = load_examples(DataBlock(path=path, pair_labels=True), plain, "pairs", 0)
    assert counts(loaded) == (5, 2, {NO_PARTNER: 1}, {})
    assert [text(plain, p.chosen_ids) + text(plain, p.rejected_ids) for p in loaded.train] == [
        "Z</s>ZZ</s>",
        "ZZZ</s>ZZZZ</s>",
    ]


# --- dropping and cutting ------------------------------------------------------------------------------------------

# Rows of prompt + answer tokens; begin and end token make two more. The limit is 12.
LENGTHS = [(5, 5), (6, 5), (3, 9), (20, 2), (2, 20), (11, 1)]


@pytest.mark.parametrize(
    ("rule", "kept", "dropped", "changed"),
    [
        ("drop", ["QQQQQZZZZZ"], {LONG: 5}, {}),
        (
            "truncate_prompt",
            ["QQQQQZZZZZ", "QQQQQZZZZZ", "QZZZZZZZZZ", "QQQQQQQQZZ", "QQQQQQQQQZ"],
            {LONG_ANSWER: 1},
            {PROMPT_CUT: 4},
        ),
        (
            "truncate_answer",
            ["QQQQQZZZZZ", "QQQQQQZZZZZ", "QQQZZZZZZZZ", "QQZZZZZZZZZ"],
            {NO_ROOM: 2},
            {ANSWER_CUT: 3},
        ),
    ],
)
def test_long_rows(
    rule: str, kept: list[str], dropped: dict[str, int], changed: dict[str, int], write: Write, plain: Tokenizer
) -> None:
    path = write("a.jsonl", [letters(*lengths) for lengths in LENGTHS])
    loaded = load_examples(DataBlock(path=path, max_length=12, on_long=rule), plain, "tokens", 0)
    assert counts(loaded) == (6, len(kept), dropped, changed)
    shown = [text(plain, e.ids).removeprefix("<s>").removesuffix("</s>") for e in loaded.train]
    assert shown == kept
    assert all(len(e.ids) <= 12 and e.ids[0] == plain.bos_token_id and e.mask.any() for e in loaded.train)
    ends = [e.ids[-1] == plain.eos_token_id and e.mask[-1] for e in loaded.train]
    assert ends == [rule != "truncate_answer" or len(row) < 11 for row in kept]  # a cut answer gets no end token


def test_long_rows_as_an_error(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [letters(*lengths) for lengths in LENGTHS])
    with pytest.raises(DataError, match=f"{path}:2: expected at most 12 tokens, found a row that is longer"):
        load_examples(DataBlock(path=path, max_length=12, on_long="error"), plain, "tokens", 0)


def test_long_prompts(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [letters(3, 3), letters(5, 3)])
    data = DataBlock(path=path, max_prompt_length=4)
    assert counts(load_examples(data, plain, "tokens", 0)) == (2, 1, {LONG_PROMPT: 1}, {})
    assert counts(load_examples(data, plain, "prompts", 0, max_new_tokens=9)) == (2, 1, {LONG_PROMPT: 1}, {})
    cut = load_examples(data.model_copy(update={"on_long": "truncate_prompt"}), plain, "prompts", 0, max_new_tokens=9)
    assert [text(plain, e.ids) for e in cut.train] == ["<s>QQQ", "<s>QQQ"]
    assert counts(cut) == (2, 2, {}, {PROMPT_CUT: 1})


def test_prompts_leave_room_for_new_tokens(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [{"prompt": "Q" * n} for n in (3, 4, 5)])
    loaded = load_examples(DataBlock(path=path, max_length=12), plain, "prompts", 0, max_new_tokens=7)
    assert counts(loaded) == (3, 2, {LONG: 1}, {})


def test_pairs_are_cut_on_both_sides_by_the_same_rule(write: Write, plain: Tokenizer) -> None:
    rows = [{"prompt": "QQQQ", "chosen": "X" * c, "rejected": "Z" * r} for c, r in ((3, 4), (3, 8), (8, 3), (20, 1))]
    path = write("a.jsonl", rows)
    expected: dict[str, Any] = {
        "drop": ([("<s>QQQQ", 4, 5)], {LONG: 3}, {}),
        "truncate_prompt": (
            [("<s>QQQQ", 4, 5), ("<s>QQ", 4, 9), ("<s>QQ", 9, 4)],
            {LONG_ANSWER: 1},
            {PROMPT_CUT: 2},
        ),
        "truncate_answer": (
            [("<s>QQQQ", 4, 5), ("<s>QQQQ", 4, 7), ("<s>QQQQ", 7, 4), ("<s>QQQQ", 7, 2)],
            {},
            {ANSWER_CUT: 3},
        ),
    }
    for rule, (kept, dropped, changed) in expected.items():
        loaded = load_examples(DataBlock(path=path, max_length=12, on_long=rule), plain, "pairs", 0)
        assert counts(loaded) == (4, len(kept), dropped, changed)
        assert [(text(plain, p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in loaded.train] == kept


def test_pairs_with_equal_sides_are_dropped_also_if_cutting_made_them_equal(write: Write, plain: Tokenizer) -> None:
    rows = [
        {"prompt": "Q", "chosen": "X", "rejected": "X"},
        {"prompt": "Q", "chosen": "X" * 30 + "Y", "rejected": "X" * 30 + "Z"},
        {"prompt": "Q", "chosen": "X", "rejected": "Y"},
    ]
    data = DataBlock(path=write("a.jsonl", rows), max_length=12, on_long="truncate_answer")
    loaded = load_examples(data, plain, "pairs", 0)
    assert counts(loaded) == (3, 1, {EQUAL: 2}, {ANSWER_CUT: 1})
    assert loaded.train[0].row == 2  # rows keep their numbers


def test_rows_that_are_cut_before_their_trained_answer_are_dropped(write: Write, plain: Tokenizer) -> None:
    answers = [message("assistant", "X"), message("user", "Q" * 9), message("assistant", "Y")]
    row = {"chosen": [message("user", "Q"), *answers], "rejected": [message("user", "Q"), message("assistant", "Z")]}
    path = write("a.jsonl", [row, {"chosen": row["chosen"][:2], "rejected": row["rejected"]}])
    data = DataBlock(path=path, max_length=8, on_long="truncate_answer", train_on="last_answer")
    assert counts(load_examples(data, plain, "pairs", 0)) == (2, 1, {UNTRAINED: 1}, {ANSWER_CUT: 1})


def test_empty_answers(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [letters(1, 0), letters(1, 1), {"prompt": "Q", "completion": " \n"}])
    assert counts(load_examples(DataBlock(path=path), plain, "tokens", 0)) == (3, 1, {EMPTY: 2}, {})
    with pytest.raises(DataError, match=f"{path}:1: completion: expected words, found empty text"):
        load_examples(DataBlock(path=path, on_empty="error"), plain, "tokens", 0)
    pairs = [{"prompt": "Q", "chosen": c, "rejected": r} for c, r in (("a", ""), ("", "b"), ("a", "b"))]
    path = write("b.jsonl", pairs)
    assert counts(load_examples(DataBlock(path=path), plain, "pairs", 0)) == (3, 1, {EMPTY: 2}, {})
    assert counts(load_examples(DataBlock(path=path), plain, "tokens", 0)) == (3, 2, {EMPTY: 1}, {})
    path = write("c.jsonl", [{"prompt": ""}, {"prompt": "a"}])
    assert counts(load_examples(DataBlock(path=path), plain, "prompts", 0)) == (2, 1, {EMPTY_PROMPT: 1}, {})


def test_rows_that_cannot_be_used_are_counted(write: Write, chatml: Tokenizer) -> None:
    user, answer = message("user", "a"), message("assistant", "b")
    path = write("a.jsonl", [{"messages": [user]}, {"messages": [user, answer]}])
    assert counts(load_examples(DataBlock(path=path), chatml, "tokens", 0)) == (2, 1, {NO_ANSWER: 1}, {})
    pairs = [
        {"chosen": [user, answer], "rejected": [message("user", "x"), answer]},
        {"chosen": [user, answer, user], "rejected": [user, answer]},
        {"chosen": [user, answer], "rejected": [user, message("assistant", "c")]},
    ]
    loaded = load_examples(DataBlock(path=write("b.jsonl", pairs)), chatml, "pairs", 0)
    assert counts(loaded) == (3, 1, {OTHER_PROMPT: 1, NO_ANSWER: 1}, {})


def test_answers_that_a_template_rewrites_are_counted(write: Write, build_tokenizer: Any) -> None:
    stripping = (
        "{% for m in messages %}{{ m['content'] if loop.last else m['content'][:1] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    row = {
        "messages": [message("user", "a"), message("assistant", "bb"), message("user", "c"), message("assistant", "dd")]
    }
    data = DataBlock(path=write("a.jsonl", [row]))
    loaded = load_examples(data, build_tokenizer(stripping), "tokens", 0)
    assert counts(loaded) == (1, 1, {}, {REWRITTEN: 1})


def test_nothing_left_is_an_error_with_the_counts(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [letters(20, 20), letters(1, 0), letters(1, 30)])
    with pytest.raises(DataError) as caught:
        load_examples(DataBlock(path=path, max_length=12), plain, "tokens", 0)
    assert caught.value.exit_code == 3
    assert "found none among 3: 2 longer than max_length, 1 empty answer" in str(caught.value)


# --- several sources, held-out rows --------------------------------------------------------------------------------


def rows_of(examples: list[Any]) -> list[int]:
    return [example.row for example in examples]


def test_held_out_rows_are_chosen_by_seed_and_not_trained_on(write: Write, plain: Tokenizer) -> None:
    sources = [SourceBlock(path=write(f"{n}.jsonl", [letters(1, k + 1) for k in range(n)])) for n in (20, 10)]
    data = DataBlock(sources=sources, eval_rows=8)
    first, again, other = (load_examples(data, plain, "tokens", seed) for seed in (0, 0, 1))
    assert rows_of(first.eval) == rows_of(again.eval) != rows_of(other.eval)
    assert len(first.eval) == 8 and sorted(rows_of(first.train) + rows_of(first.eval)) == list(range(30))
    assert rows_of(first.train) == sorted(rows_of(first.train))
    with pytest.raises(DataError, match="data.eval_rows: expected more rows than are held out, found 30"):
        load_examples(DataBlock(sources=sources, eval_rows=30), plain, "tokens", 0)


def test_held_out_source(write: Write, plain: Tokenizer) -> None:
    held_out = SourceBlock(path=write("b.jsonl", [{"text": "Z"}]))
    data = DataBlock(path=write("a.jsonl", [letters(1, 1)] * 2), eval=held_out)
    loaded = load_examples(data, plain, "tokens", 0)
    assert (rows_of(loaded.train), rows_of(loaded.eval)) == ([0, 1], [2])
    assert [source.format for source in loaded.report.sources] == ["prompt_completion", "text"]


@pytest.mark.parametrize(
    ("weights", "taken"), [((1, 1), (20, 10)), ((1, 0.5), (20, 5)), ((0.5, 2), (5, 10)), ((1, 0.001), (20, 1))]
)
def test_weights_are_shares_of_a_sources_rows(
    weights: tuple[float, float], taken: tuple[int, int], write: Write, plain: Tokenizer
) -> None:
    paths = [write(f"{n}.jsonl", [letters(1, k + 1) for k in range(n)]) for n in (20, 10)]
    data = DataBlock(sources=[SourceBlock(path=p, weight=w) for p, w in zip(paths, weights, strict=True)])
    loaded, again, other = (load_examples(data, plain, "tokens", seed) for seed in (0, 0, 1))
    found = rows_of(loaded.train)
    assert (sum(row < 20 for row in found), sum(row >= 20 for row in found)) == taken
    assert found == rows_of(again.train) and len(set(found)) == len(found)
    if taken == (20, 5):
        assert found != rows_of(other.train)
    for source, (read, kept) in enumerate(zip((20, 10), taken, strict=True)):
        left_out = {LEFT_OUT: read - kept} if read > kept else {}
        assert counts(loaded, source) == (read, kept, left_out, {})


# --- the report, raw text, real data -------------------------------------------------------------------------------


def test_report_is_readable_and_json(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [letters(1, 1), letters(1, 0), letters(3, 1)])
    loaded = load_examples(DataBlock(path=path, eval_rows=1), plain, "tokens", 0)
    assert loaded.report.lines()[0] == (
        f"data: {path}: prompt_completion, 3 rows read, 2 kept, 1 dropped (empty answer)"
    )
    assert loaded.report.lines()[1].startswith("training: ") and loaded.report.lines()[2].startswith("held out: ")
    found = json.loads(json.dumps(loaded.report.as_dict()))
    assert found["sources"][0]["dropped"] == {"empty answer": 1}
    assert (found["train"]["rows"], found["eval"]["rows"]) == (1, 1)


def test_raw_texts_are_all_that_rows_say(write: Write) -> None:
    path = write("a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert list(raw_texts(DataBlock(path=path, system="s"), "pairs")) == ["s", "a", "b", "c"]
    assert list(raw_texts(DataBlock(path=write("b.jsonl", [{"text": "t"}])), "tokens")) == ["t"]


REAL = {
    "hh chosen": ("hh-harmless/pairs.jsonl", "tokens", {}, "dialogue_pairs", 1800),
    "hh pairs": ("hh-harmless/pairs.jsonl", "pairs", {}, "dialogue_pairs", 1800),
    "hh prompts": ("hh-harmless/pairs.jsonl", "prompts", {"limit": 300}, "dialogue_pairs", 300),
    "gsm8k": (
        "gsm8k/train.jsonl",
        "prompts",
        {"columns": {"prompt": "question", "completion": "answer"}, "limit": 500},
        "prompt_completion",
        500,
    ),
    "reviews": ("movie-reviews/reviews.jsonl", "tokens", {"limit": 500}, "text", 500),
    "review prompts": ("movie-reviews/reviews.jsonl", "prompts", {"limit": 500, "prompt_words": 4}, "text", 500),
    "review pairs": (
        "movie-reviews/reviews.jsonl",
        "pairs",
        {"limit": 500, "pair_labels": True, "templates": {"prompt": "Review:", "completion": " {text}"}},
        "labelled",
        500,
    ),
    "documents": ("pretrain/c4.jsonl", "tokens", {"on_long": "truncate_answer"}, "text", 300),
    "alpaca": ("formats/alpaca_en_demo.json", "tokens", {}, "alpaca", 999),
    "sharegpt pairs": ("formats/dpo_en_demo.json", "pairs", {}, "sharegpt_pairs", 300),
    "labelled": ("formats/kto_en_demo.json", "tokens", {}, "labelled", 300),
    "labelled answers": ("formats/kto_en_demo.json", "answers", {}, "labelled", 300),
    "lists of pairs": ("formats/dpo_en_demo.json", "lists", {}, "sharegpt_pairs", 300),
}


@pytest.mark.parametrize("case", REAL)
def test_real_data(case: str, shared: Any, chatml: Tokenizer) -> None:
    path, kind, options, found, read = REAL[case]
    data = DataBlock(path=str(shared / path), max_length=4096, eval_rows=10, **options)
    loaded = load_examples(data, chatml, kind, 0, max_new_tokens=64)  # type: ignore[arg-type]
    report = loaded.report.sources[0]
    assert (report.format, report.read) == (found, read)
    assert report.kept == len(loaded.train) + len(loaded.eval) > 100
    lost = sum(report.dropped.values())
    assert report.kept + lost == read or "pair_labels" in options
    chat = ChatTemplate(chatml)
    end = chatml.convert_tokens_to_ids(chat.end_token)
    if kind == "tokens" and found != "text":
        assert all(e.ids[-1] == end and e.mask[-1] for e in loaded.train)
    if kind == "pairs":
        assert all(p.chosen_ids[-1] == p.rejected_ids[-1] == end for p in loaded.train)
