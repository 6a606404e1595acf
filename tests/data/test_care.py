"""The report on data: every figure against rows that are written for it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from rlhf.data.care import Care, Finding, Observer, take_care
from rlhf.data.care_table import tables
from rlhf.data.examples import load_examples
from rlhf.data.filters import DUPLICATE
from rlhf.data.limits import ANSWER_CUT
from rlhf.recipe.schema import DataBlock, FilterBlock, SourceBlock

Write = Callable[[str, Any], str]
Tokenizer = PreTrainedTokenizerFast
LONG = " ".join(f"word{i}" for i in range(40))


def pair(prompt: str = "Q", chosen: str = "X", rejected: str = "Z", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def care(tokenizer: Tokenizer, path: str, kind: Any = "pairs", scores: Any = None, **options: Any) -> Care:
    seen = Observer(kind)
    loaded = load_examples(DataBlock(path=path, **options), tokenizer, kind, 0, see=(seen.see,))
    return take_care(loaded, seen, scores)


def found(report: Care, words: str) -> Finding:
    (finding,) = [each for each in report.findings if words in each.name]
    return finding


def facts(report: Care, words: str) -> tuple[int, int, tuple[str, ...]]:
    finding = found(report, words)
    return finding.count, finding.total, finding.examples


# --- length ----------------------------------------------------------------------------------------------------------


def test_length_bias(write: Write, plain: Tokenizer) -> None:
    """Differences in tokens, the end token on both sides: +3, -1, 0, +1."""
    answers = [("XXXX", "Z", 2.0), ("X", "ZZ", -0.5), ("X", "Z", 0.5), ("XX", "Z", 0.0)]
    path = write("a.jsonl", [pair("Q" * (i + 1), c, r, margin=m) for i, (c, r, m) in enumerate(answers)])
    scores = {0: (1.0, 3.0), 1: (2.0, 0.0), 2: (0.0, 0.0), 3: (-1.0, 0.0)}
    report = care(plain, path, scores=scores)
    differences = np.array([3.0, -1.0, 0.0, 1.0])
    bias = report.bias
    assert bias is not None
    assert (bias.mean, bias.median, bias.equally_long) == (0.75, 0.5, 1)
    assert (bias.longer_chosen.count, bias.longer_chosen.total) == (2, 3)
    assert bias.longer_chosen.low < 2 / 3 < bias.longer_chosen.high
    both_orders = np.concatenate([differences, -differences]), np.repeat([1.0, -1.0], 4)
    assert bias.correlation == pytest.approx(np.corrcoef(*both_orders)[0, 1])
    assert bias.with_margin == pytest.approx(np.corrcoef(differences, [2.0, -0.5, 0.5, 0.0])[0, 1])
    assert bias.with_reward == pytest.approx(np.corrcoef(differences, [-2.0, 2.0, 0.0, -1.0])[0, 1])
    assert bias.examples == (f"{path}:1 (+3)", f"{path}:4 (+1)")
    assert (report.lengths["chosen answer"].median, report.lengths["chosen answer"].longest) == (2.5, 5)
    assert report.lengths["prompt"].p95 == pytest.approx(np.percentile([2, 3, 4, 5], 95))


def test_without_margins_and_with_equal_lengths_there_is_nothing_to_correlate(write: Write, plain: Tokenizer) -> None:
    bias = care(plain, write("a.jsonl", [pair("Q" * i) for i in (1, 2, 3)])).bias
    assert bias is not None and (bias.with_margin, bias.with_reward, bias.correlation) == (None, None, 0.0)
    assert (bias.longer_chosen.total, bias.equally_long, bias.examples) == (0, 3, ())


# --- repetition ------------------------------------------------------------------------------------------------------


def test_repeated_rows_and_prompts(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair(), pair("R"), pair("Q "), pair(chosen="Y"), pair("R"), pair()])
    report = care(plain, path)
    assert facts(report, "rows equal to an earlier row") == (3, 6, (f"{path}:1 (3 times)", f"{path}:2 (2 times)"))
    assert facts(report, "rows to an earlier row's prompt") == (4, 6, (f"{path}:1 (4 times)", f"{path}:2 (2 times)"))


def test_rows_and_prompts_that_are_nearly_the_same(write: Write, plain: Tokenizer) -> None:
    other = LONG.replace("word39", "WORD39!") + " more"
    rows = [pair(LONG), pair("Q"), pair(other, chosen="Y"), pair(other)]
    path = write("a.jsonl", rows)
    report = care(plain, path)
    alike = (f"{path}:3 like {path}:1", f"{path}:4 like {path}:1")
    assert facts(report, "nearly the same prompt") == (2, 4, alike)
    assert found(report, "nearly the same as an earlier row").examples[-1].startswith(f"{path}:4 like ")
    assert found(report, "rows equal to an earlier row").count == 0


# --- contradiction ---------------------------------------------------------------------------------------------------


def test_contradictions_and_pairs_of_one_answer(write: Write, plain: Tokenizer) -> None:
    rows = [
        pair(),
        pair(chosen="Z", rejected="X"),
        pair("R"),
        pair(chosen="X Y", rejected=" X  Y"),
        pair("S", "X", "X"),
    ]
    path = write("a.jsonl", rows)
    report = care(plain, path)
    assert facts(report, "ranked both ways") == (2, 4, (f"{path}:1 and {path}:2",))
    assert facts(report, "chosen equals rejected up to") == (2, 5, (f"{path}:4", f"{path}:5"))
    assert facts(report, "dropped: chosen equals rejected") == (1, 5, (f"{path}:5",))


# --- held-out rows ---------------------------------------------------------------------------------------------------


def test_overlap_with_held_out_rows(write: Write, plain: Tokenizer) -> None:
    held_out = write("eval.jsonl", [pair("Q"), pair(LONG, LONG, "no")])
    rows = [pair("Q ", "Z", "X"), pair("Q", "Y"), pair(LONG + " more", LONG, "no"), pair("R")]
    path = write("a.jsonl", rows)
    report = care(plain, path, eval=SourceBlock(path=held_out))
    assert report.held_out == 2
    assert facts(report, "rows that are held out too") == (1, 4, (f"{path}:1 like {held_out}:1",))
    same_prompt = (f"{path}:1 like {held_out}:1", f"{path}:2 like {held_out}:1")
    assert facts(report, "rows whose prompt is held out too") == (2, 4, same_prompt)
    nearly = (1, 4, (f"{path}:3 like {held_out}:2",))
    assert facts(report, "rows that are nearly the same as one held out") == nearly
    assert facts(report, "rows whose prompt is nearly the same as one held out") == nearly


def test_held_out_rows_that_are_taken_from_the_sources(write: Write, plain: Tokenizer) -> None:
    """Every row comes twice, so that most of those held out are in the training rows too."""
    path = write("a.jsonl", [pair(prompt) for prompt in "abcdefghij"] * 2)
    report = care(plain, path, eval_rows=5)
    assert (report.train, report.held_out) == (15, 5)
    overlap = found(report, "rows that are held out too").count
    assert 0 < overlap <= 5
    assert not [each for each in care(plain, path).findings if "held out" in each.name]


# --- other kinds of rows ---------------------------------------------------------------------------------------------


def test_completions_texts_and_prompts(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [{"prompt": "Q", "completion": c} for c in ("X", "X", "YY")])
    report = care(plain, path, "tokens")
    assert (report.bias, report.noise, list(report.lengths)) == (None, [], ["row"])
    assert (found(report, "rows equal to an earlier row").count, found(report, "earlier row's prompt").count) == (1, 2)
    texts = write("b.jsonl", [{"text": "X"}, {"text": "X\n"}, {"text": "Y"}])
    report = care(plain, texts, "tokens", eval=SourceBlock(path=write("c.jsonl", [{"text": "Y"}])))
    assert found(report, "rows equal to an earlier row").count == 1
    assert facts(report, "rows that are held out too")[:2] == (1, 3)
    assert not [each for each in report.findings if "prompt" in each.name]
    report = care(plain, path, "prompts")
    assert list(report.lengths) == ["prompt"] and {each.name for each in report.findings} == {
        "rows to an earlier row's prompt",
        "rows to nearly the same prompt as an earlier row's",
    }
    assert found(report, "earlier row's prompt").count == 2


def test_single_answers_and_lists(write: Write, plain: Tokenizer) -> None:
    """Equal are rows with the same answers and the same verdict on them."""
    rows = [{"prompt": "Q", "completion": "X", "label": label} for label in (True, True, False)]
    report = care(plain, write("a.jsonl", rows), "answers")
    assert found(report, "rows equal to an earlier row").count == 1 and report.bias is None
    lists = [{"prompt": "Q", "answers": [a, "Z"], "scores": [1, 0]} for a in ("X", "Y", "X")]
    path = write("b.jsonl", lists)
    report = care(plain, path, "lists")
    assert facts(report, "rows equal to an earlier row") == (1, 3, (f"{path}:1 (2 times)",))
    assert care(plain, path, "lists", filter=FilterBlock(drop_duplicates=True)).train == 2


# --- limits, filters -------------------------------------------------------------------------------------------------


def test_what_limits_take_is_named_with_places(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair(), pair(rejected="Z" * 20), pair(rejected="")])
    report = care(plain, path, max_length=12, on_long="truncate_answer")
    assert facts(report, f"changed: {ANSWER_CUT}") == (1, 3, (f"{path}:2",))
    assert facts(report, "dropped: empty answer") == (1, 3, (f"{path}:3",))


def test_rows_that_a_filter_takes_are_counted_and_gone_from_the_figures(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair(), pair(), pair("R")])
    report = care(plain, path, filter=FilterBlock(drop_duplicates=True))
    assert (report.train, found(report, "rows equal to an earlier row").count) == (2, 0)
    assert facts(report, f"dropped: {DUPLICATE}")[:2] == (1, 3)


# --- label noise -----------------------------------------------------------------------------------------------------


def test_a_reward_model_judges_training_and_held_out_labels_apart(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair("a"), pair("b"), pair("c"), pair("d")])
    held_out = write("eval.jsonl", [pair("e")])
    scores = {0: (1.0, 0.0), 1: (0.0, 4.0), 3: (0.0, 0.5), 4: (2.0, 1.0)}  # the third was too long for it
    report = care(plain, path, eval=SourceBlock(path=held_out), scores=scores)
    training, other = report.noise
    assert (training.rows, training.noise.disagree.count, training.noise.disagree.total) == ("training", 2, 3)
    assert training.examples == (f"{path}:2 (-4)", f"{path}:4 (-0.5)")
    assert (other.rows, other.noise.disagree.count, other.noise.epsilon) == ("held out", 0, 0.0)
    assert care(plain, path).noise == []


# --- as text ---------------------------------------------------------------------------------------------------------


def printed(cares: list[Care]) -> str:
    out = io.StringIO()
    for table in tables("rm.yaml: pairs", cares):
        Console(file=out, width=220, color_system=None).print(table)
    return out.getvalue()


def test_the_tables_hold_every_figure_and_both_columns(write: Write, plain: Tokenizer) -> None:
    path = write("a.jsonl", [pair(chosen="XXX"), pair(chosen="XXX"), pair("R", "X", "ZZ")])
    scores = {row: (1.0, 0.0) for row in range(3)}
    before = care(plain, path, scores=scores)
    after = care(plain, path, scores=scores, filter=FilterBlock(drop_duplicates=True))
    text = printed([before])
    assert "training rows" in text and "after the filter" not in text
    assert "mean +1.00, median +2" in text and "66.7 % of 3, 95 % interval 20.8 to 93.9; 0 are equally long" in text
    assert "1 (33.3 %)" in text and f"{path}:1 (2 times)" in text
    assert "flipped labels, training" in text and "0.0 % +- " in text
    for finding in before.findings:
        assert finding.name in text
    both = printed([before, after])
    assert "after the filter" in both and f"dropped: {DUPLICATE}" in both
    assert json.loads(json.dumps(asdict(after), allow_nan=False))["train"] == 2


# --- real data -------------------------------------------------------------------------------------------------------


def test_real_preferences(shared: Any, plain: Tokenizer) -> None:
    report = care(plain, str(shared / "hh-harmless" / "pairs.jsonl"), eval_rows=200, max_length=4096)
    assert report.train + report.held_out > 1700 and report.bias is not None
    assert report.bias.longer_chosen.high < 0.5, "refusals are short"
    assert found(report, "ranked both ways").count == 0
