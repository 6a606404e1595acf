"""Rules about rewards, learned from or watched: each broken once, with its place and its remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import RecipeError
from rlhf.recipe.load import LoadedRecipe
from rlhf.recipe.reward_rules import named_rewards
from rlhf.train.job import model_refs

BASE = "model: {from: sft}\ndata: {path: x}\n"

# (a reward, the key below it that is blamed, what the message holds, remedy)
BROKEN = [
    ("{kind: format, pattern: '('}", "pattern", "'(' (missing )", "quotes"),
    ("{kind: function, function: a.py}", "function", "file.py:name, found 'a.py'", "my_rewards.py"),
    ("{kind: process, function: 'a.txt:f'}", "function", "file.py:name, found 'a.txt:f'", "my_rewards.py"),
    ("{kind: process, function: 'a.py:f', separator: ''}", "separator", "expected", ""),
    ("{kind: function, function: 'a.py:f', timeout: 0}", "timeout", "a number > 0, found 0", ""),
    ("{kind: http, url: 'localhost:8000/score'}", "url", "found 'localhost:8000/score'", "http://127.0.0.1"),
    ("{kind: http, url: 'file:///etc/passwd'}", "url", "found 'file:///etc/passwd'", "http://"),
    ("{kind: http, url: 'ftp://a/b'}", "url", "https://..., found 'ftp://a/b'", "http://"),
    ("{kind: http, url: 'http://'}", "url", "found 'http://'", "http://"),
    ("{kind: http, url: 'http://a:x/'}", "url", "found 'http://a:x/'", "http://"),
    ("{kind: http, url: 'http://a:99999/'}", "url", "Port out of range", "http://"),
    ("{kind: http, url: 'http://a:0/'}", "url", "found 'http://a:0/'", "http://"),
    ("{kind: http, url: 'http://[::1/'}", "url", "Invalid IPv6 URL", "http://"),
    ("{kind: http, url: 'http://é/'}", "url", "found 'http://é/'", "http://"),
    ("{kind: http, url: 'http://a/b c'}", "url", "without spaces", "http://"),
    ("{kind: http, url: 'http://a/#b'}", "url", "without #", "http://"),
    ("{kind: http, url: 'http://me@a/'}", "url", "no user name and password", "run directory"),
    ("{kind: http, url: 'http://a/', retries: 11}", "retries", "<= 10, found 11", ""),
    ("{kind: model}", "", "found neither", "path: HUB_ID"),
    ("{kind: model, from: a, zero: {stage: 2}}", "zero.stage", "0 or 3 for a frozen model, found 2", "shard"),
    ("{kind: model, from: a, statistics: centre}", "statistics", "found 'centre'", "center"),
    ("{kind: model, path: a, from: a}", "", "found both", "remove one"),
]


@pytest.mark.parametrize(("reward", "key", "what", "fix"), BROKEN)
@pytest.mark.parametrize("name", ["rewards", "test_rewards"])
def test_a_broken_rule_is_told_with_its_place_and_remedy(
    name: str, reward: str, key: str, what: str, fix: str, refuse: Callable[..., list[str]]
) -> None:
    [problem] = refuse(f"{BASE}{name}:\n- {{kind: length}}\n- {reward}\n", "grpo")
    head, _, hint = problem.partition("\n  ")
    place, _, message = head.partition(f": {name}.1{'.' if key else ''}{key}: ")
    assert place.startswith("r.yaml:5:"), problem
    assert message.startswith("expected ") and what in message and fix in hint
    assert "secret" not in message


@pytest.mark.parametrize("name", ["rewards", "test_rewards"])
def test_a_reward_is_listed_once(name: str, refuse: Callable[..., list[str]]) -> None:
    text = f"{BASE}{name}: [{{kind: length}}, {{kind: format}}, {{kind: length, target: 50}}]\n"
    [problem] = refuse(text, "ppo")
    assert f"{name}.2: expected another reward than {name}.0, found the same" in problem and "`weight`" in problem


def test_what_is_allowed_stays_allowed(load: Callable[..., LoadedRecipe]) -> None:
    addresses = ("http://a", "https://a.b:8443/x/y?k=v", "http://[::1]:8000/score", "http://127.0.0.1:1/")
    kinds = ", ".join(f"{{kind: http, url: '{address}'}}" for address in addresses)
    lengths = "{kind: length}, {kind: length, weight: 2.0}"
    others = lengths.replace("length", "length, target: 9")
    load(f"{BASE}rewards: [{kinds}, {lengths}]\ntest_rewards: [{others}]\n", "grpo")
    load(f"{BASE}test_rewards: [{{kind: model, path: b, statistics: center}}]\n", "ppo")


def test_every_reward_has_its_place(load: Callable[..., LoadedRecipe]) -> None:
    text = f"{BASE}rewards: [{{kind: length}}, {{kind: model, from: rm}}]\ntest_rewards: [{{kind: model, path: b}}]\n"
    recipe = load(text, "grpo").recipe
    assert [(key, reward.kind) for key, reward in named_rewards(recipe)] == [
        ("rewards.0", "length"),
        ("rewards.1", "model"),
        ("test_rewards.0", "model"),
    ]
    named = {key: kinds for key, _, kinds in model_refs("grpo", recipe)}
    assert named["rewards.1"] == named["test_rewards.0"] == ("reward",) and "rewards.0" not in named
    assert list(named_rewards(load(BASE, "sft").recipe)) == []


def test_files_of_functions_and_processes_must_be_there(load: Callable[..., LoadedRecipe]) -> None:
    text = (
        f"{BASE}rewards:\n- {{kind: process, function: 'no_steps.py:f'}}\n"
        "test_rewards:\n- {kind: function, function: 'mine.py:f'}\n- {kind: function, function: 'no.py:f'}\n"
    )
    loaded = load(text, "grpo")
    Path("mine.py").write_text("")
    with pytest.raises(RecipeError) as caught:
        loaded.check_files()
    found = str(caught.value)
    assert "rewards.0.function: expected a file, found nothing at no_steps.py" in found
    assert "test_rewards.1.function: expected a file, found nothing at no.py" in found and "mine.py:f" not in found
