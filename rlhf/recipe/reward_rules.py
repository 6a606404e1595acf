"""Rules about rewards, those that are learned from and those that are only watched."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from rlhf.recipe.problems import Problem
from rlhf.recipe.reward_options import FormatReward, FunctionReward, HttpReward, ProcessReward, Reward
from rlhf.recipe.stages import AnyRecipe, OnlineRecipe, ScoringRecipe


def named_rewards(recipe: AnyRecipe) -> Iterator[tuple[str, Reward]]:
    """(recipe key, reward) of every reward of a recipe: rewards.0, rewards.1, test_rewards.0, ..."""
    for key, rewards in _lists(recipe):
        for i, reward in enumerate(rewards):
            yield f"{key}.{i}", reward


def _lists(recipe: AnyRecipe) -> Iterator[tuple[str, list[Reward]]]:
    if isinstance(recipe, ScoringRecipe):
        yield "rewards", recipe.rewards
    if isinstance(recipe, OnlineRecipe):
        yield "test_rewards", recipe.test_rewards


def reward_options(recipe: ScoringRecipe) -> Iterator[Problem]:
    """Patterns compile, functions are named as file.py:name, addresses are http or https, no reward is listed twice."""
    for key, reward in named_rewards(recipe):
        if isinstance(reward, FormatReward):
            yield from pattern(f"{key}.pattern", reward.pattern)
        elif isinstance(reward, (FunctionReward, ProcessReward)):
            yield from _function(f"{key}.function", reward.function)
        elif isinstance(reward, HttpReward):
            yield from address(f"{key}.url", reward.url)
            yield from variable(f"{key}.api_key_env", reward.api_key_env)
    for name, rewards in _lists(recipe):
        yield from _twice(name, rewards)
    if isinstance(recipe, OnlineRecipe):
        learned = [_nameless(reward) for reward in recipe.rewards]
        for i, reward in enumerate(recipe.test_rewards):
            if _nameless(reward) in learned:
                what = f"expected a reward that is not learned from, found rewards.{learned.index(_nameless(reward))}"
                fix = "its gap would be 0 whatever happens: train a second model on other rows (data.part)"
                yield Problem(f"test_rewards.{i}", what, fix, (f"rewards.{learned.index(_nameless(reward))}",))


def _nameless(reward: Reward) -> dict[str, object]:
    return reward.model_dump(exclude={"weight", "zero", "dtype", "statistics"})


def pattern(key: str, text: str) -> Iterator[Problem]:
    """A regular expression that compiles."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        what = f"expected a regular expression, found {text!r} ({error})"
        yield Problem(key, what, "in YAML, write patterns in single quotes")


def _function(key: str, function: str) -> Iterator[Problem]:
    file, _, name = function.rpartition(":")
    if not (file.endswith(".py") and name.isidentifier()):
        what = f"expected file.py:name, found {function!r}"
        yield Problem(key, what, "for example my_rewards.py:score")


def address(key: str, url: str) -> Iterator[Problem]:
    """An address that can be asked, without a password: recipes are copied into the run directory."""
    example = "for example http://127.0.0.1:8000/score"
    try:
        parts = urlsplit(url)
        host, port, user = parts.hostname, parts.port, parts.username
    except ValueError as error:
        yield Problem(key, f"expected http://HOST[:PORT]/PATH, found {url!r} ({error})", example)
        return
    if parts.scheme not in ("http", "https") or not host or port == 0 or not url.isascii() or not url.isprintable():
        yield Problem(key, f"expected http://HOST[:PORT]/PATH or https://..., found {url!r}", example)
    elif user is not None:
        what = "expected no user name and password in the address, found some"
        yield Problem(key, what, "a recipe is copied into the run directory, where passwords have no place")
    elif parts.fragment or " " in url:
        yield Problem(key, f"expected an address without spaces and without #, found {url!r}", example)


def variable(key: str, name: str | None) -> Iterator[Problem]:
    """The name of an environment variable that holds a key."""
    if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        what = "expected the name of an environment variable, found something else"
        yield Problem(key, what, "the key itself must not stand in a recipe")


def _twice(key: str, rewards: list[Reward]) -> Iterator[Problem]:
    """A reward listed twice counts twice; a weight says that better."""
    for i, reward in enumerate(rewards):
        if reward in rewards[:i]:
            what = f"expected another reward than {key}.{rewards.index(reward)}, found the same"
            yield Problem(f"{key}.{i}", what, "remove it; `weight` makes a reward count for more")
