"""Filters and weights of training rows: what each leaves out, that it is counted, and that held-out rows stay."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data.examples import LEFT_OUT, Loaded, load_examples
from rlhf.data.filters import (
    CONFLICT,
    DUPLICATE,
    HELD_OUT_PROMPT,
    HELD_OUT_ROW,
    HIGH_MARGIN,
    LENGTH_DIFFERENCE,
    LENGTH_RATIO,
    LOW_MARGIN,
    SAME_WORDS,
)
from rlhf.data.records import check_records
from rlhf.errors import DataError
from rlhf.recipe.schema import DataBlock, FilterBlock, ReweightBlock, SourceBlock

Write = Callable[[str, Any], str]
Tokenizer = PreTrainedTokenizerFast


def pair(prompt: str = "Q", chosen: str = "X", rejected: str = "Z", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def loaded(path: str, tokenizer: Tokenizer, kind: Any = "pairs", seed: int = 0, **options: Any) -> Loaded:
    return load_examples(DataBlock(path=path, **options), tokenizer, kind, seed)


def outcome(found: Loaded) -> tuple[list[int], dict[str, int]]:
    """(numbers of the rows that stay, counts of the others); every row that was read is in one of them."""
    report = found.report.sources[0]
    rows = [example.row for example in found.train]
    assert report.kept == len(rows) and report.kept + report.dropped.total() == report.read
    return rows, dict(report.dropped)


# --- margins ---------------------------------------------------------------------------------------------------------

SCORED = [
    pair("a", score_chosen=2.0, score_rejected=0.5),  # 1.5
    pair("b", score_margin=0.25, margin=9.0),  # its own column goes before margin
    pair("c", margin="-1"),
    pair("d", score_chosen=3, score_rejected=None, score_margin=3.0),
]


@pytest.mark.parametrize(
    ("options", "kept", "dropped"),
    [
        ({}, [0, 1, 2, 3], {}),
        ({"min_margin": 0.25}, [0, 1, 3], {LOW_MARGIN: 1}),
        ({"max_margin": 1.5}, [0, 1, 2], {HIGH_MARGIN: 1}),
        ({"min_margin": 0.3, "max_margin": 2.0}, [0], {LOW_MARGIN: 2, HIGH_MARGIN: 1}),
    ],
)
def test_score_margins(
    options: dict[str, float], kept: list[int], dropped: dict[str, int], write: Write, plain: Tokenizer
) -> None:
    found = loaded(write("a.jsonl", SCORED), plain, filter=FilterBlock(**options))
    assert outcome(found) == (kept, dropped)


@pytest.mark.parametrize("option", [{"filter": FilterBlock(max_margin=1.0)}, {"reweight": ReweightBlock()}])
def test_a_row_without_a_margin_is_refused_by_place(option: dict[str, Any], write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [*SCORED, pair("e", score_chosen=1.0)])
    data = DataBlock(path=path, **option)
    for read in (lambda: load_examples(data, plain, "pairs", 0), lambda: check_records(data, "pairs")):
        with pytest.raises(DataError) as caught:
            read()
        assert str(caught.value).startswith(
            f"{path}:5: expected a score margin, found none of the columns score_chosen"
        )
        assert "Add one of them" in str(caught.value)
    bad = write("b.jsonl", [*SCORED, pair("e", score_margin="high")])
    with pytest.raises(DataError, match="b.jsonl:5: score_margin: expected a number"):
        check_records(DataBlock(path=bad, **option), "pairs")


def test_held_out_rows_need_no_margin(write: Write, plain: Tokenizer) -> None:
    held_out = SourceBlock(path=write("eval.jsonl", [pair("f")]))
    data = DataBlock(path=write("a.jsonl", SCORED), eval=held_out, filter=FilterBlock(min_margin=1.0))
    check_records(data, "pairs")
    found = load_examples(data, plain, "pairs", 0)
    assert outcome(found) == ([0, 3], {LOW_MARGIN: 2}) and len(found.eval) == 1


# --- lengths ---------------------------------------------------------------------------------------------------------


def test_lengths_of_answers_are_counted_in_tokens(write: Write, plain: Tokenizer) -> None:
    """With the end token: 2 and 4, 4 and 2, 2 and 5."""
    path = write("a.jsonl", [pair(rejected="ZZZ"), pair(chosen="XXX"), pair(rejected="ZZZZ")])
    assert outcome(loaded(path, plain, filter=FilterBlock(max_length_ratio=2.0))) == ([0, 1], {LENGTH_RATIO: 1})
    assert outcome(loaded(path, plain, filter=FilterBlock(max_length_difference=2))) == ([0, 1], {LENGTH_DIFFERENCE: 1})
    assert outcome(loaded(path, plain, filter=FilterBlock(max_length_ratio=2.5))) == ([0, 1, 2], {})


# --- repetitions and contradictions ----------------------------------------------------------------------------------


def test_answers_that_differ_in_white_space_only(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair(chosen="X  Y\n", rejected=" X Y"), pair(chosen="XY", rejected="X Y")])
    assert outcome(loaded(path, plain)) == ([0, 1], {})
    assert outcome(loaded(path, plain, filter=FilterBlock(drop_equal=True))) == ([1], {SAME_WORDS: 1})


def test_all_rows_of_a_contradiction_are_left_out(write: Write, plain: Tokenizer) -> None:
    """The same answers to another prompt, or one of them with a third, contradict nothing."""
    rows = [pair(), pair(chosen="Z", rejected="X "), pair("R", "Z", "X"), pair(chosen="Z", rejected="Y"), pair()]
    found = loaded(write("a.jsonl", rows), plain, filter=FilterBlock(drop_conflicts=True))
    assert outcome(found) == ([2, 3], {CONFLICT: 3})


def test_of_equal_rows_the_first_stays_whatever_its_source(write: Write, plain: Tokenizer) -> None:
    rows = [pair(), pair("Q\n"), pair(chosen="Y"), pair(chosen="Z", rejected="X")]
    path = write("a.jsonl", rows)
    assert outcome(loaded(path, plain, filter=FilterBlock(drop_duplicates=True))) == ([0, 2, 3], {DUPLICATE: 1})
    sources = [SourceBlock(path=path), SourceBlock(path=write("b.jsonl", [pair(chosen="Y"), pair("R")]), weight=0.5)]
    data = DataBlock(sources=sources, filter=FilterBlock(drop_duplicates=True))
    found = load_examples(data, plain, "pairs", 0)
    assert [example.row for example in found.train] == [0, 2, 3, 5]
    assert [dict(report.dropped) for report in found.report.sources] == [{DUPLICATE: 1}, {DUPLICATE: 1}]
    assert LEFT_OUT not in found.report.sources[1].dropped  # half of the one row that is left is one row


def test_repeated_prompts_and_texts(write: Write, plain: Tokenizer) -> None:
    once = FilterBlock(drop_duplicates=True)
    prompts = write("a.jsonl", [pair(), pair(chosen="Y"), pair("R")])  # other answers are no other prompt
    assert outcome(loaded(prompts, plain, "prompts", filter=once)) == ([0, 2], {DUPLICATE: 1})
    assert outcome(loaded(prompts, plain, "pairs", filter=once)) == ([0, 1, 2], {})
    texts = write("b.jsonl", [{"text": "X Y"}, {"text": "X"}, {"text": "X\nY"}])
    assert outcome(loaded(texts, plain, "tokens", filter=once)) == ([0, 1], {DUPLICATE: 1})


# --- held-out rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overlap", "kept", "dropped"),
    [
        ("none", [0, 1, 2, 3], {}),
        ("rows", [2, 3], {HELD_OUT_ROW: 2}),
        ("prompts", [3], {HELD_OUT_PROMPT: 3}),
    ],
)
def test_rows_that_are_held_out_too(
    overlap: Any, kept: list[int], dropped: dict[str, int], write: Write, plain: Tokenizer
) -> None:
    """In either order, since the evaluation would be learned all the same."""
    held_out = SourceBlock(path=write("eval.jsonl", [pair("Q ")]))
    path = write("a.jsonl", [pair(), pair(chosen="Z", rejected="X"), pair(chosen="Y"), pair("R")])
    found = loaded(path, plain, eval=held_out, filter=FilterBlock(drop_eval_overlap=overlap))
    assert outcome(found) == (kept, dropped)
    assert len(found.eval) == 1


def test_texts_have_no_prompt_in_common(write: Write, plain: Tokenizer) -> None:
    held_out = SourceBlock(path=write("eval.jsonl", [{"text": "X"}]))
    path = write("a.jsonl", [{"text": "X"}, {"text": "Y"}])
    found = loaded(path, plain, "tokens", eval=held_out, filter=FilterBlock(drop_eval_overlap="prompts"))
    assert outcome(found) == ([1], {HELD_OUT_ROW: 1})


def test_the_same_rows_are_held_out_whatever_the_filter(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair("Q" * (1 + i % 7), margin=float(i)) for i in range(40)])
    filters_ = [FilterBlock(), FilterBlock(min_margin=20.0), FilterBlock(max_margin=5.0, drop_duplicates=True)]
    found = [loaded(path, plain, eval_rows=8, filter=each) for each in filters_]
    assert len({tuple(example.row for example in each.eval) for each in found}) == 1
    assert len(found[1].train) < len(found[0].train) == 32
    assert all(example.row >= 20 for example in found[1].train) and any(e.row < 20 for e in found[1].eval)


# --- together --------------------------------------------------------------------------------------------------------


def test_a_row_is_counted_under_its_first_reason_and_takes_no_further_part(write: Write, plain: Tokenizer) -> None:
    """The row with the low margin would contradict the first."""
    rows = [pair(margin=1.0), pair(chosen="Z", rejected="X", margin=0.0), pair(margin=1.0)]
    chosen = FilterBlock(min_margin=0.5, drop_conflicts=True, drop_duplicates=True)
    found = loaded(write("a.jsonl", rows), plain, filter=chosen)
    assert outcome(found) == ([0], {LOW_MARGIN: 1, DUPLICATE: 1})
    assert f"1 dropped ({LOW_MARGIN}), 1 dropped ({DUPLICATE})" in found.report.sources[0].line()


def test_a_filter_that_leaves_nothing_is_refused(write: Write, plain: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        loaded(write("a.jsonl", SCORED), plain, filter=FilterBlock(min_margin=100.0))
    assert str(caught.value).startswith("data.filter: expected rows to learn from, found that the filter leaves none")
    assert f"4 {LOW_MARGIN}" in str(caught.value) and caught.value.exit_code == 3


def test_every_reason_names_its_option_or_speaks_for_itself() -> None:
    named = re.findall(r"filter\.(\w+)", " ".join((LOW_MARGIN, HIGH_MARGIN, LENGTH_RATIO, LENGTH_DIFFERENCE)))
    assert set(named) <= set(FilterBlock.model_fields) and len(named) == 4


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_are_sigmoids_of_margins_with_mean_1(write: Write, plain: Tokenizer, caplog: Any) -> None:
    path = write("a.jsonl", [pair("a", margin=0.0), pair("b", margin=2.0), pair("c", margin=-4.0)])
    with caplog.at_level("INFO", logger="rlhf.data"):
        found = loaded(path, plain, reweight=ReweightBlock(temperature=2.0))
    raw = [0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))]
    mean = sum(raw) / 3
    assert [e.weight for e in found.train] == pytest.approx([value / mean for value in raw], rel=1e-12)
    assert "of 3 pairs that weigh alike" in caplog.text
    assert [e.weight for e in loaded(path, plain).train] == [1.0, 1.0, 1.0]


def test_held_out_pairs_weigh_1_and_weights_are_of_the_rows_that_stay(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair("Q" * (i + 1), margin=i / 10) for i in range(20)])
    found = loaded(path, plain, eval_rows=5, reweight=ReweightBlock(), filter=FilterBlock(min_margin=0.5))
    assert {example.weight for example in found.eval} == {1.0}
    weights = [example.weight for example in found.train]
    assert math.fsum(weights) == pytest.approx(len(weights)) and weights == sorted(weights) and len(set(weights)) > 1


def test_margins_out_of_all_proportion_are_refused(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair(margin=-800.0)])
    with pytest.raises(DataError, match="data.reweight.temperature: expected score margins of the size"):
        loaded(path, plain, reweight=ReweightBlock())
