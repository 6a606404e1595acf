"""Process rewards: where steps end in text and tokens, and what becomes of the user's scores."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from rlhf.batch import Rollout
from rlhf.errors import RecipeError
from rlhf.models.tokenizer import decoder, train_tokenizer
from rlhf.rewards.steps import process_part, split_steps, step_tokens, summed, user_steps

TEXTS = ["so 3 + 4 is 7\nthen 7 x 2 is 14\n\n", "erst ä。 dann 雨。und 🌧️ weiter\n", "step one\nstep two\n#### 72"] * 9
NAN = float("nan")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320, None)


@pytest.mark.parametrize(
    ("answer", "separator", "steps"),
    [
        ("a\nb", "\n", ["a\n", "b"]),
        ("a\nb\n", "\n", ["a\n", "b\n"]),
        ("a\n\nb", "\n", ["a\n", "\n", "b"]),
        ("a\n\nb", "\n\n", ["a\n\n", "b"]),
        ("\n", "\n", ["\n"]),
        ("", "\n", [""]),
        ("a. b.c", ". ", ["a. ", "b.c"]),
        ("aaa", "aa", ["aa", "a"]),
    ],
)
def test_steps_by_hand(answer, separator, steps):
    assert split_steps(answer, separator) == steps and "".join(steps) == answer


def byte_ends(tokenizer, ids: list[int]) -> list[int]:
    """Bytes of text up to and including each token: every character of a byte-level token stands for one byte."""
    special, end, ends = set(tokenizer.all_special_ids), 0, []
    for index in ids:
        end += 0 if index in special else len(tokenizer.convert_ids_to_tokens(index))
        ends.append(end)
    return ends


def expected_places(tokenizer, ids: list[int], steps: list[str]) -> list[int]:
    """The second implementation, on bytes: the first token that reaches the step's last byte."""
    ends, at, places = byte_ends(tokenizer, ids), 0, []
    for step in steps[:-1]:
        at += len(step.encode())
        places.append(next(i for i, end in enumerate(ends) if end >= at))
    return [*places, len(ids) - 1]


def test_a_step_ends_in_the_token_that_completes_it(tokenizer):
    draw = random.Random(0)
    pieces = ["\n", "。", " ", "so 3", "ä", "雨", "🌧️", "x", "is 7", "step"]
    checked = 0
    for _ in range(200):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 12)))
        ids = tokenizer.encode(text, add_special_tokens=False)
        if draw.random() < 0.5:  # not as the tokenizer writes it: byte by byte
            single = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
            ids = [tokenizer.convert_tokens_to_ids(char) for word, _ in single for char in word]
        if draw.random() < 0.5:
            ids = [*ids, tokenizer.eos_token_id]
        for separator in ("\n", "。", " ", "雨。"):
            steps = split_steps(text, separator)
            places = step_tokens(ids, steps, decoder(tokenizer))
            assert places == expected_places(tokenizer, ids, steps), (text, separator)
            checked += len(steps) > 2
    assert checked > 50


def test_tokens_that_are_no_text_still_end_in_order(tokenizer):
    draw = torch.Generator().manual_seed(0)
    decode = decoder(tokenizer)
    for _ in range(200):
        ids = torch.randint(0, len(tokenizer), (12,), generator=draw).tolist()
        steps = split_steps(decode(ids), "\n")
        places = step_tokens(ids, steps, decode)
        assert places == sorted(places) and places[-1] == 11 and len(places) == len(steps)


def rollout(tokenizer, answers: list[str], finished: list[bool]) -> Rollout:
    """One prompt token, answers right-padded with a token that is text."""
    rows = [
        tokenizer.encode(text, add_special_tokens=False) + ([tokenizer.eos_token_id] if done else [])
        for text, done in zip(answers, finished, strict=True)
    ]
    width = max(map(len, rows)) + 2
    pad = tokenizer.convert_tokens_to_ids("x")
    ids = torch.tensor([[5, *row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    attention = torch.cat([torch.ones(len(rows), 1, dtype=torch.bool), mask], 1)
    fields = [{"row": i} for i in range(len(rows))]
    return Rollout(ids, attention, mask, torch.zeros(mask.shape), torch.tensor(finished), answers, fields)


def written(folder: Path, body: str) -> str:
    file = folder / "my_steps.py"
    file.write_text(f"def score(rows, steps):\n    {body}\n")
    return f"{file}:score"


def test_step_scores_stand_on_tokens_and_the_last_on_the_end_token(tokenizer, tmp_path):
    batch = rollout(tokenizer, ["a\nb\nc", "a\nb\n", "", "a\nb"], [True, True, True, False])
    spec = written(tmp_path, "return [[10 * r['row'] + i for i, _ in enumerate(s)] for r, s in zip(rows, steps)]")
    found = process_part(spec, "\n", 60.0, decoder(tokenizer))(batch)
    # tokens: a \n b \n c eos | a \n b \n eos | eos | a \n b
    assert batch.response_mask.sum(-1).tolist() == [6, 5, 1, 3]
    expected = torch.full((4, 8), NAN)
    expected[0, 1], expected[0, 3], expected[0, 5] = 0, 1, 2
    expected[1, 1], expected[1, 4] = 10, 11
    expected[2, 0] = 20
    expected[3, 1], expected[3, 2] = 30, 31
    torch.testing.assert_close(found, expected.double(), equal_nan=True, atol=0, rtol=0)
    assert summed(found) == [3.0, 21.0, 20.0, 61.0]


def test_steps_that_end_in_one_token_add_up(tokenizer, tmp_path):
    ids = tokenizer.encode("so\n\n x", add_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("ĊĊ") in ids, "the tokenizer has learned a double line break"
    spec = written(tmp_path, "return [[1.0, 10.0, 100.0]]")
    found = process_part(spec, "\n", 60.0, decoder(tokenizer))(rollout(tokenizer, ["so\n\n x"], [False]))
    place = ids.index(tokenizer.convert_tokens_to_ids("ĊĊ"))
    assert found[0, place] == 11.0 and found[0, len(ids) - 1] == 100.0 and (~found.isnan()).sum() == 2


def test_an_answer_with_none_is_unscored(tokenizer, tmp_path):
    spec = written(tmp_path, "return [None, [1.0] * len(steps[1])]")
    found = process_part(spec, "\n", 60.0, decoder(tokenizer))(rollout(tokenizer, ["a\nb", "a\nb"], [True, True]))
    assert found[0].isnan().all() and summed(found) == [None, 2.0]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 1.0", "expected a list of step scores per answer, found float 1.0"),
        ("return [[1.0, 2.0]]", "expected step scores of 2 answers, found 1"),
        ("return [[1.0, 2.0], 3.0]", "expected a list of step scores of answer 1, found float 3.0"),
        ("return [[1.0], [1.0]]", "expected 2 step scores of answer 0, found 1"),
        ("return [[1.0, float('nan')], [1.0]]", "expected a finite number or None as score 1, found float nan"),
        ("return [[1.0, None], [1.0]]", "expected a number for every step of answer 0, found list"),
        ("return 1 / 0", r"the reward function raised ZeroDivisionError: division by zero \(line 2\)"),
        ("import time; time.sleep(9)", "within 0.5 s, found none"),
        ("rows.clear(); steps[0].clear(); return [[1.0], [1.0]]", "expected 2 step scores of answer 0, found 1"),
    ],
)
def test_bad_step_scores_name_what_was_returned(tmp_path, body, words):
    spec = written(tmp_path, body)
    with pytest.raises(RecipeError, match=words) as caught:
        user_steps([{}, {}], [["a\n", "b"], ["c"]], spec, 0.5)
    assert spec in str(caught.value)
