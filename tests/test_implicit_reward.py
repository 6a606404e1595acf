"""`rlhf eval implicit-reward` on the command line: stages as they are made, and what a user can get wrong."""

from __future__ import annotations

import json

import pytest

from rlhf.report.page import write_report

COMMAND = ("eval", "implicit-reward")


@pytest.fixture(scope="module")
def trained(cli, tiny):
    """The tiny run with a DPO stage, and another SFT stage with a tokenizer of its own."""
    for words in (
        tiny.command("dpo", "--name", "dpo-credit"),
        tiny.command("sft", "--name", "sft-other", "--set", "model.init.vocab=320"),
    ):
        done = cli(*words)
        assert done.code == 0, done.err
    return tiny


def test_a_dpo_stage_beside_a_reward_model(cli, trained):
    pairs = trained.data / "eval_pairs.jsonl"
    words = [*COMMAND, trained.root, "--policy", "dpo-credit", "--reward", "rm", "--data", pairs]
    done = cli(*words, "--data", trained.data / "pairs.jsonl", "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["policy"], record["reference"], record["reward"]) == ("dpo-credit", "sft", "rm")
    assert record["beta"] == 0.1, "the default of the loss"
    first, second = record["datasets"]
    assert (first["pairs"], second["pairs"]) == (8, 60) and first["data"] == str(pairs)
    assert 0 < abs(first["scores"]["implicit"]["margin"]["mean"]) < 0.1, "two steps from its reference"
    scaled = json.loads(cli(*words, "--beta", "1", "--json").out)["datasets"][0]["scores"]["implicit"]
    assert scaled["margin"]["mean"] == pytest.approx(10 * first["scores"]["implicit"]["margin"]["mean"], rel=1e-4)
    assert scaled["accuracy"] == first["scores"]["implicit"]["accuracy"]
    shown = cli(*words, "--tokens", "1")
    assert shown.code == 0 and "right alone" in shown.out and shown.out.count("rejected ") == 1
    page = write_report(trained.root).read_text()
    assert "DPO as a reward model" in page and "longer wins" in page


def test_any_policy_with_a_reference_and_a_beta_that_are_named(cli, trained):
    words = [*COMMAND, trained.root, "--policy", "sft", "--data", trained.data / "eval_pairs.jsonl"]
    done = cli(*words, "--reference", "dpo-credit", "--beta", "2", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["reference"] == "dpo-credit"


@pytest.mark.parametrize(
    ("words", "code", "texts"),
    [
        (["--policy", "sft"], 2, ["made by rlhf sft", "--reference STAGE --beta NUMBER"]),
        (["--policy", "sft", "--reference", "dpo-credit"], 2, ["which has a beta", "--beta NUMBER"]),
        (["--policy", "no-such"], 4, ["--policy: expected a finished stage with a policy", "no-such"]),
        (["--policy", "rm"], 4, ["--policy: expected a policy, found a reward model"]),
        (["--policy", "dpo-credit", "--reward", "no-such"], 4, ["--reward: expected a finished", "rlhf rm RECIPE"]),
        (["--policy", "dpo-credit", "--reward", "sft"], 4, ["expected a reward model, found a policy", "one of: rm"]),
        (["--policy", "dpo-credit", "--reference", "sft-other"], 4, ["--reference: expected the tokenizer of"]),
        (["--policy", "dpo-credit", "--beta", "0"], 2, ["--beta: expected a number above 0, found 0"]),
        (["--policy", "../dpo"], 4, ["--policy: expected a finished stage"]),
    ],
)
def test_what_cannot_be_compared(cli, trained, words, code, texts):
    done = cli(*COMMAND, trained.root, *words, "--data", trained.data / "eval_pairs.jsonl")
    assert done.code == code and done.out == "" and "Traceback" not in done.err, done.err
    for text in texts:
        assert text in done.err, done.err


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        ("no-such.jsonl", 3, "no-such.jsonl"),
        ("demo:shift_nothing", 3, "demo:shift_prompts"),
        ("prompts.jsonl", 3, "prompts"),
        ("broken.jsonl", 3, "broken.jsonl:1"),
    ],
)
def test_data_that_holds_no_pairs(cli, trained, tmp_path, data, code, text):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "broken.jsonl").write_text("{\n")
    path = data if data.startswith("demo:") else tmp_path / data
    done = cli(*COMMAND, trained.root, "--policy", "dpo-credit", "--data", path)
    assert done.code == code and done.out == "" and text in done.err and "Traceback" not in done.err, done.err
