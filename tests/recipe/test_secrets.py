"""What looks like a key or a password is refused wherever it stands in a recipe, and is not said again."""

from __future__ import annotations

import pytest

from rlhf.recipe.fields import walk
from rlhf.recipe.secrets import _KEYS
from rlhf.recipe.stages import RECIPES

MINIMAL = "model: {from: sft}\ndata: {path: rows.jsonl}\n"
CANARY = "cAnArY0123456789cAnArY0123456789abcd"
SHAPES = [
    f"hf_{CANARY}",
    f"sk-{CANARY}",
    f"ghp_{CANARY}",
    f"glpat-{CANARY}",
    f"xoxb-{CANARY}",
    "AKIACANARYCANARY1234",
    f"eyJ{CANARY}.eyJ{CANARY}.{CANARY}",
    "-----BEGIN RSA PRIVATE KEY-----",
    f"https://me:{CANARY}@example.com/x",
    f"https://example.com/x?api_key={CANARY}",
    f"https://example.com/x?a=b&token={CANARY}",
]


def told(problems: list[str], place: str) -> None:
    text = "\n".join(problems)
    assert "expected no secret, found what looks like one" in text and "come from the environment" in text
    assert place in text
    assert "canary" not in text.lower() and "PRIVATE" not in text


@pytest.mark.parametrize("secret", SHAPES)
def test_in_a_value(refuse, secret):
    told(refuse(f"{MINIMAL}log: {{wandb: '{secret}'}}\n"), "r.yaml:3:")


@pytest.mark.parametrize("secret", SHAPES)
def test_in_a_comment(refuse, secret):
    told(refuse(f"{MINIMAL}# {secret}\n"), "r.yaml:3:")


@pytest.mark.parametrize("secret", SHAPES)
def test_on_the_command_line(refuse, secret):
    told(refuse(MINIMAL, "sft", f"log.wandb={secret}"), "--set log.wandb=...")
    told(refuse(MINIMAL, "sft", f"log={{wandb: '{secret}'}}"), "--set log")


@pytest.mark.parametrize(
    "key",
    ["api_key", "apiKey", "hf_token", "token", "password", "log.wandb_api_key", "secret", "my-secret", "credentials"],
)
def test_in_a_key_of_that_name(refuse, key):
    told(refuse(MINIMAL, "sft", f"{key}=canary"), f"--set {key}=...: {key}: ")
    if "." not in key:
        told(refuse(f"{MINIMAL}{key}: canary\n"), f"r.yaml:3:{len(key) + 3}: {key}: ")


def test_no_option_of_ours_has_such_a_name():
    for model in RECIPES.values():
        for key, _, _ in walk(model):
            assert not _KEYS.fullmatch(key.rpartition(".")[2]), key


@pytest.mark.parametrize(
    "text",
    [
        "log: {wandb: hf_project}",
        "model: {path: owner/sk-model}",
        f"model: {{path: a/b, revision: {'0123456789abcdef' * 2}01234567}}",
        "rewards: [{kind: http, url: 'https://a.b:8443/x/y?k=v', api_key_env: MY_KEY}]",
    ],
)
def test_what_is_no_secret_passes(load, text):
    stage = "grpo" if text.startswith("rewards") else "sft"
    head = "data: {path: rows.jsonl}\n" if text.startswith("model") else MINIMAL
    load(f"{head}{text}\n", stage)


def test_the_name_of_a_variable_is_one(refuse):
    text = MINIMAL + "rewards: [{kind: http, url: 'http://a/', api_key_env: 'not a name'}]\n"
    assert "rewards.0.api_key_env: expected the name of an environment variable" in refuse(text, "grpo")[0]


def test_a_misspelt_key_with_a_number_is_no_secret(refuse):
    (told,) = refuse(f"{MINIMAL}train: {{micro_token: 512}}\n")
    assert "train.micro_tokens" in told and "secret" not in told


def test_what_is_found_twice_on_a_line_is_told_once_with_its_key(refuse):
    (told,) = refuse(f"{MINIMAL}log: {{wandb: 'https://me:{CANARY}@example.com/x'}}\n")
    assert told.startswith("r.yaml:3:14: log.wandb: expected no secret")
