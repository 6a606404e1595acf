"""The stand-in judge: what it says of our templates, how it errs, and that it can be started."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from rlhf.data.demo import gold_reward, preference, score_of
from rlhf.recipe.judge_options import PAIRWISE, RUBRIC
from rlhf.rewards.verdicts import fill
from scripts.judge_server import Settings, judged, reply_of

ROOT = Path(__file__).parents[2]
PROMPT = "we saw this western at the club in may, and"
GOOD, BAD = " the cast was really sharp and warm.", " the cast was dull."


def compare(settings: Settings, first: str, second: str) -> tuple[str, float | None]:
    return judged(settings, fill(PAIRWISE, {"prompt": PROMPT, "first": first, "second": second}))


def test_it_prefers_what_the_gold_reward_does():
    settings = Settings()
    said, chance = compare(settings, GOOD, BAD)
    assert said == "Preferred=1"
    assert chance == pytest.approx(preference(gold_reward(PROMPT, GOOD), gold_reward(PROMPT, BAD)))
    assert compare(settings, BAD, GOOD)[0] == "Preferred=2"
    assert compare(settings, GOOD, GOOD)[0] == "Preferred=tie"
    assert compare(Settings(bias=100.0), BAD, GOOD)[0] == "Preferred=1"
    said, _ = judged(settings, fill(RUBRIC, {"prompt": PROMPT, "answer": GOOD}))
    assert said == f"Score: {score_of(gold_reward(PROMPT, GOOD))}"
    assert judged(settings, "What is this?")[1] is None


def test_with_noise_it_errs_as_often_as_bradley_terry_says_and_does_not_change_its_mind():
    expected = preference(gold_reward(PROMPT, GOOD), gold_reward(PROMPT, " the cast was sharp."))
    wins = 0
    for seed in range(2000):
        said, _ = compare(Settings(noise=1.0, seed=seed), GOOD, " the cast was sharp.")
        other, _ = compare(Settings(noise=1.0, seed=seed), " the cast was sharp.", GOOD)
        assert {said, other} == {"Preferred=1", "Preferred=2"}
        wins += said == "Preferred=1"
    assert wins / 2000 == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 2000) ** 0.5)


def test_probabilities_of_1_and_2_add_up_to_one():
    question = fill(PAIRWISE, {"prompt": PROMPT, "first": GOOD, "second": BAD})
    posted = {"model": "m", "logprobs": True, "messages": [{"role": "user", "content": question}]}
    (choice,) = reply_of(Settings(), posted)["choices"]
    tokens = choice["logprobs"]["content"]
    assert "".join(each["token"] for each in tokens) == choice["message"]["content"]
    chances = {each["token"]: math.exp(each["logprob"]) for each in tokens[-1]["top_logprobs"]}
    assert chances["1"] + chances["2"] == pytest.approx(1) and chances["1"] > 0.9


def test_it_can_be_started():
    command = [sys.executable, "-m", "scripts.judge_server", "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        question = fill(RUBRIC, {"prompt": PROMPT, "answer": BAD})
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": question}]}).encode()
        with urllib.request.urlopen(f"{url}/chat/completions", body, timeout=30) as answer:
            assert json.loads(answer.read())["choices"][0]["message"]["content"] == "Score: 1"
    finally:
        process.terminate()
        process.wait(timeout=30)
