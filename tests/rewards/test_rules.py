"""Rule rewards on answers that are right, wrong, and absurd."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest

from rlhf.data.demo import bayes_accuracy, demo_rows, gold_reward
from rlhf.errors import DataError, RecipeError
from rlhf.rewards import patterns, verdicts
from rlhf.rewards.rules import demo_gold, exact, format_found, length, numeric, parse_number

GSM8K = {"answer": "answer", "marker": "####", "tolerance": 1e-6}
GSM8K_FORMAT = r"#### ?-?\d[\d,]*(\.\d+)?\s*$"
MEGABYTE = 1_000_000

ABSURD = [
    "",
    "####",
    "#### ",
    "####\n\n",
    "#### 10**10**10",
    "#### 9**9**9**9",
    "#### nan",
    "#### inf",
    "#### -Infinity",
    "#### 1e999",
    "#### 1/0",
    "#### 0/0",
    "#### __import__('os').getcwd()",
    "#### ٧٢",  # Arabic-Indic digits
    "#### ７２",  # full-width digits
    "#### ²",
    "#### seventy-two",
    "#### 1,23",
    "#### 12,34,56",
    "#### 1.2.3",
    "#### 0x48",
    "#### 72abc",
    "#### --72",
    "#### $",
    "#### \x00\ud800",
    "#### " + "1" * MEGABYTE,
    "#### " + " " * MEGABYTE,
    "#### " + "1," * MEGABYTE,
    "#### " + "$" * MEGABYTE,
    "#### " + "*" * MEGABYTE + "72",
    "####" * (MEGABYTE // 4),
    "#" * MEGABYTE,
    "1" * MEGABYTE,
    "#### 1" * (MEGABYTE // 6) + "x",
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("72", 72),
        ("  72\n", 72),
        ("72.", 72),
        ("72 clips in April", 72),
        ("72!) and so on", 72),
        ("1,200", 1200),
        ("1,234,567.89", 1234567.89),
        ("0,001", 1),
        ("-5", -5),
        ("\u22125", -5),
        ("+5", 5),
        ("- 5", -5),
        ("$18", 18),
        ("$1,200.50", 1200.5),
        ("-$18", -18),
        ("$-18", -18),
        ("$ 18", 18),
        ("18$", 18),
        ("€7", 7),
        ("50%", 50),
        ("0.5 %", 0.5),
        ("12.5%", 12.5),
        ("1/2 %", 0.5),
        ("3/4", 0.75),
        ("-3/4", -0.75),
        (".5", 0.5),
        ("3.", 3),
        ("3.0", 3),
        ("**72**", 72),
        ("1e3", 1000),
        ("2.5E-1", 0.25),
        ("007", 7),
        ("-0", 0),
        ("9" * 40, 1e40),
    ],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    found = parse_number(text)
    assert found is not None and abs(found - value) <= 1e-12 * abs(value)


@pytest.mark.parametrize("text", ["", " ", "x72", "72x", "3pm", "10**10", "1_000", "1:30", "1-2", "nan", "½"])
def test_what_is_not_a_number(text: str) -> None:
    assert parse_number(text) is None


def test_numeric_takes_what_follows_the_last_marker() -> None:
    rows = [{"answer": "48/2 = <<48/2=24>>24 clips.\n#### 72"}] * 7
    answers = [
        "#### 72",
        "#### 71\nno: #### 72",
        "#### 72\nno: #### 71",
        "72",
        "#### $72.00",
        "####72 clips",
        "#### -72",
    ]
    assert numeric(rows, answers, **GSM8K) == [1, 1, 0, 0, 1, 1, 0]


def test_numeric_reference_may_be_bare_or_a_number() -> None:
    rows = [{"target": "1,200"}, {"target": 1200}, {"target": 1200.0}, {"target": "so it is #### 1200"}]
    assert numeric(rows, ["#### 1200"] * 4, answer="target", marker="####", tolerance=0.0) == [1] * 4


def test_numeric_without_a_marker_reads_the_beginning() -> None:
    rows = [{"answer": 5}] * 3
    assert numeric(rows, ["5 apples", "#### 5", "five"], answer="answer", marker="", tolerance=0.0) == [1, 0, 0]


def test_tolerance_is_relative() -> None:
    rows = [{"answer": 1000}] * 3 + [{"answer": 0}] * 2
    answers = ["#### 1000.9", "#### 1001.1", "#### 999.1", "#### 0.0", "#### 1e-9"]
    assert numeric(rows, answers, answer="answer", marker="####", tolerance=1e-3) == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("text", ABSURD, ids=range(len(ABSURD)))
def test_absurd_answers_score_0_in_no_time(text: str) -> None:
    start = time.monotonic()
    assert numeric([{"answer": "72"}], [text], **GSM8K) == [0]
    assert exact([{"answer": "72"}], [text], answer="answer") == [0]
    assert format_found([{}], [text], pattern=GSM8K_FORMAT)[0] in (0.0, 1.0)
    assert length([{}], [text], target=0, scale=1)[0] in (0.0, 1.0)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("reference", ["no number here", "#### ", "#### 1/0", "", "nan", True])
def test_an_unparsable_reference_is_an_error_that_names_the_row(reference: object) -> None:
    with pytest.raises(DataError, match="row 17: expected a number in column 'answer'") as caught:
        numeric([{"row": 4, "answer": "#### 3"}, {"row": 17, "answer": reference}], ["", ""], **GSM8K)
    assert caught.value.exit_code == 3


def test_a_missing_reference_names_the_row_and_its_columns() -> None:
    for rule in (lambda rows: numeric(rows, [""], **GSM8K), lambda rows: exact(rows, [""], answer="answer")):
        with pytest.raises(
            DataError, match="row 9: expected a reference answer in column 'answer', found columns row, q"
        ):
            rule([{"row": 9, "q": "?"}])
        with pytest.raises(DataError, match="row 0 of the batch: expected a reference answer"):
            rule([{"answer": None}])


def test_exact_ignores_white_space_and_case() -> None:
    rows = [{"gold": "New  York\n"}] * 4
    assert exact(rows, [" new york", "NEW\tYORK", "New York City", ""], answer="gold") == [1, 1, 0, 0]
    assert exact([{"gold": 7}], ["7"], answer="gold") == [1]


def test_format_by_hand() -> None:
    answers = ["so\n#### 72", "#### 1,200.5 ", "####72", "#### -3\n", "#### 72 clips", "72", "#### "]
    assert format_found([{}] * 7, answers, pattern=GSM8K_FORMAT) == [1, 1, 1, 1, 0, 0, 0]


def test_format_looks_at_the_end_of_a_long_answer_and_anchors_stay_honest() -> None:
    long = "y" * 20_000
    assert format_found([{}], [long + "#### 72"], pattern=GSM8K_FORMAT) == [1]
    assert format_found([{}], ["#### 72" + long], pattern="#### 72") == [0]
    assert format_found([{}], [long], pattern="^y") == [0]
    assert format_found([{}], ["yes"], pattern="^y") == [1]


def test_a_quadratic_pattern_is_bounded() -> None:
    start = time.monotonic()
    assert format_found([{}], ["a" * MEGABYTE], pattern="a+[bc]") == [0]
    assert time.monotonic() - start < 5


def test_a_broken_pattern_is_the_recipes_error() -> None:
    with pytest.raises(RecipeError, match="expected a regular expression"):
        format_found([{}], [""], pattern="(")


def test_the_demos_gold_reward_and_its_labeller() -> None:
    """With noise 1, comparisons agree with the gold reward as often as those of demo:pairs, which are Bradley-Terry."""
    pairs = demo_rows("pairs")
    prompts = [{"prompt": row["prompt"]} for row in pairs]
    sides = {side: [row[side] for row in pairs] for side in ("chosen", "rejected")}
    gold = {side: [gold_reward(row["prompt"], row[side]) for row in pairs] for side in sides}
    assert demo_gold(prompts, sides["chosen"], noise=0.0, seed=3) == gold["chosen"]
    noisy = {side: demo_gold(prompts, texts, noise=1.0, seed=3) for side, texts in sides.items()}
    assert noisy["chosen"] == demo_gold(prompts, sides["chosen"], noise=1.0, seed=3)
    assert noisy["chosen"] != demo_gold(prompts, sides["chosen"], noise=1.0, seed=4)
    apart = [i for i in range(len(pairs)) if gold["chosen"][i] != gold["rejected"][i]]
    agree = [(noisy["chosen"][i] > noisy["rejected"][i]) == (gold["chosen"][i] > gold["rejected"][i]) for i in apart]
    expected = bayes_accuracy(pairs[i] for i in apart)
    assert sum(agree) / len(agree) == pytest.approx(expected, abs=4 * 0.5 / len(apart) ** 0.5)
    noise = [a - b for a, b in zip(noisy["chosen"], gold["chosen"], strict=True)]
    mean = sum(noise) / len(noise)
    variance = sum((each - mean) ** 2 for each in noise) / len(noise)
    assert mean == pytest.approx(0.5772, abs=0.07) and variance == pytest.approx(math.pi**2 / 6, abs=0.2)
    with pytest.raises(DataError, match="expected a reference answer in column 'prompt'"):
        demo_gold([{"row": 1}], ["a"], noise=0.0, seed=0)


def test_length_by_hand() -> None:
    answers = ["one two three four", "one two", "", "one " * 8, "one " * 100]
    assert length([{}] * 5, answers, target=4, scale=4) == [1, 0.5, 0, 0, 0]


def test_rules_need_no_torch() -> None:
    code = "import sys, rlhf.rewards.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_pattern_that_does_not_come_to_an_end_is_told(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    started = time.monotonic()
    with pytest.raises(RecipeError, match=r"expected a pattern that is searched in 0.3 s, found '\(a\+\)\+\$'"):
        format_found([{}], ["a" * 40 + "!"], pattern="(a+)+$")
    with pytest.raises(RecipeError, match="judge.verdict: expected a pattern that is searched"):
        verdicts.points("a" * 40 + "!", "((a+)+)$")
    assert time.monotonic() - started < 3
