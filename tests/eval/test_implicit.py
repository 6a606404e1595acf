"""The implicit reward of published policies: against plain transformers, on made-up pairs, and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.demo import demo_rows
from rlhf.data.examples import PairExample, load_examples
from rlhf.errors import CheckpointError
from rlhf.eval.implicit import (
    EXPLICIT,
    IMPLICIT,
    LONGER,
    PER_TOKEN,
    Question,
    Side,
    compare,
    data_block,
    evaluate_implicit,
    find_judges,
    rate,
)
from rlhf.eval.implicit_text import CreditedRow, credited
from rlhf.eval.policy import load_policy, score_pairs
from rlhf.eval.reference import Scale
from rlhf.models.tokenizer import load_tokenizer
from rlhf.recipe.schema import DataBlock
from rlhf.recipe.stages import PreferenceRecipe
from rlhf.run.lineage import content_hash
from rlhf.run.rundir import RunDir

SUMS = Scale(0.5, is_average=False)


def recipe(**data: Any) -> dict[str, Any]:
    given = {"model": {"from": "sft"}, "data": {"path": "demo:pairs", **data}, "loss": {"name": "dpo", "beta": 0.5}}
    return PreferenceRecipe.model_validate(given).model_dump(mode="json", by_alias=True)


@pytest.fixture(scope="module")
def run(publish, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("implicit")
    publish(folder, "sft", "sft", 0)
    publish(folder, "rm", "rm", 1)
    base = content_hash(RunDir(folder).stage("sft").read_manifest())
    publish(folder, "dpo", "dpo", 2, recipe=recipe(max_length=96), parents={"model": base})
    publish(folder, "short", "dpo", 2, recipe=recipe(max_length=40), parents={"model": base})
    return folder


def question(run: Path, **changes: Any) -> Question:
    given: dict[str, Any] = {"policy": "dpo", "data": ["demo:eval_pairs"], "reference": None, "reward": None}
    return Question(run, **{**given, "beta": None, "tokens": 0, "as_json": False, **changes})


# --- scores ----------------------------------------------------------------------------------------------------------


def test_rewards_are_those_of_plain_transformers(run):
    stages = [RunDir(run).stage(name) for name in ("dpo", "sft")]
    tokenizer = AutoTokenizer.from_pretrained(stages[0].model)
    examples = load_examples(DataBlock(path="demo:eval_pairs"), tokenizer, "pairs", seed=0).train[:40]
    rated = rate(*map(load_policy, stages), examples, tokenizer.pad_token_id, 0.5)
    models = [AutoModelForCausalLM.from_pretrained(stage.model).eval() for stage in stages]
    for row, (_, *sides) in zip(demo_rows("eval_pairs"), rated, strict=False):
        for name, side in zip(("chosen", "rejected"), sides, strict=True):
            parts = [tokenizer.encode(row[key], add_special_tokens=False) for key in ("prompt", name)]
            ids = torch.tensor([[tokenizer.bos_token_id, *parts[0], *parts[1], tokenizer.eos_token_id]])
            start = 1 + len(parts[0])
            with torch.no_grad():
                ours, theirs = (model(ids).logits.double().log_softmax(-1)[0] for model in models)
            expected = [0.5 * (ours - theirs)[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])]
            assert side.ids == ids[0, start:].tolist()
            assert side.credits == pytest.approx(expected, abs=1e-5)
            assert side.reward == pytest.approx(sum(expected), abs=1e-4)
            assert side.mean == pytest.approx(sum(expected) / len(expected), abs=1e-5)
    assert len({side.reward for _, *sides in rated for side in sides}) > 70, "untrained, but not equal"


def test_a_policy_says_nothing_beside_itself(run):
    stage = RunDir(run).stage("sft")
    tokenizer = load_tokenizer(str(stage.model), None)
    examples = load_examples(DataBlock(path="demo:eval_pairs"), tokenizer, "pairs", seed=0).train[:40]
    rated = rate(load_policy(stage), load_policy(stage), examples, tokenizer.pad_token_id, 0.5)
    found = compare(rated, None, SUMS)
    assert found["scores"][IMPLICIT]["accuracy"]["mean"] == 0.5 and found["scores"][IMPLICIT]["ece"] == 0.0
    assert found["scores"][IMPLICIT]["nll"] == pytest.approx(0.693147, abs=1e-6)


# --- the comparison --------------------------------------------------------------------------------------------------


def rated_pair(row: int, prompt: int, chosen: list[float], rejected: list[float]) -> tuple[PairExample, Side, Side]:
    ids, mask = np.zeros(1, np.int32), np.ones(1, np.bool_)
    example = PairExample(np.array([prompt], np.int32), ids, mask, ids, mask, 0.0, row)
    return example, *(Side(list(range(len(side))), side, sum(side)) for side in (chosen, rejected))


PAIRS = [
    rated_pair(0, 0, [1.0, 1.0], [1.5]),  # the sum is for the chosen side, the mean against it
    rated_pair(1, 0, [0.5], [0.5, -1.0]),
    rated_pair(3, 1, [-2.0], [-1.0]),
    rated_pair(7, 2, [0.0, 0.0], [0.0, 0.0]),
]


def test_every_score_by_hand():
    explicit = {0: (1.0, 3.0), 1: (2.0, 1.0), 3: (1.0, 0.0), 7: (-1.0, 0.0), 8: (0.0, 0.0)}
    found = compare(PAIRS, explicit, SUMS)
    assert (found["pairs"], found["prompts"]) == (4, 3)
    accuracies = {name: score["accuracy"]["mean"] for name, score in found["scores"].items()}
    assert accuracies == {IMPLICIT: 2.5 / 4, PER_TOKEN: 1.5 / 4, EXPLICIT: 2 / 4, LONGER: (1 + 0.5 + 0.5) / 4}
    margins = {name: score["margin"]["mean"] for name, score in found["scores"].items()}
    assert margins[IMPLICIT] == pytest.approx((0.5 + 1.0 - 1.0) / 4, abs=1e-12)
    assert margins[PER_TOKEN] == pytest.approx((-0.5 + 0.75 - 1.0) / 4, abs=1e-12)
    assert margins[EXPLICIT] == pytest.approx((-2 + 1 + 1 - 1) / 4, abs=1e-12) and margins[LONGER] == 0.0
    first = found["differences"][0]
    assert (first["first"], first["second"], first["only_first"], first["only_second"]) == (EXPLICIT, IMPLICIT, 1, 1)
    assert first["mean"] == pytest.approx((2 - 2.5) / 4, abs=1e-12)
    assert [each["second"] for each in found["differences"]] == [IMPLICIT, PER_TOKEN, LONGER]


def test_only_pairs_that_every_score_rates_are_compared():
    found = compare(PAIRS, {0: (1.0, 0.0), 3: (1.0, 0.0)}, SUMS)
    assert found["pairs"] == 2 and found["scores"][IMPLICIT]["accuracy"]["mean"] == 0.5


def test_log_odds_are_those_of_the_loss():
    sums, means = (compare(PAIRS, None, Scale(0.5, is_average=average))["scores"] for average in (False, True))
    assert sums[IMPLICIT]["nll"] is not None and sums[PER_TOKEN]["nll"] is None and sums[LONGER]["nll"] is None
    assert means[IMPLICIT]["nll"] is None and means[PER_TOKEN]["nll"] is not None
    assert EXPLICIT not in sums


def test_drop_is_against_the_first_dataset():
    first = compare(PAIRS, None, SUMS)["scores"]
    assert all(score["drop"] is None for score in first.values())
    second = compare(PAIRS[:2], None, SUMS, first)["scores"]
    assert second[IMPLICIT]["drop"] == pytest.approx(2.5 / 4 - 1.0, abs=1e-12)


def test_length_bins_hold_every_pair_once():
    pairs = [rated_pair(i, i, [1.0] * (1 + i % 9), [0.5] * 5) for i in range(90)]
    bins = compare(pairs, None, SUMS)["bins"]
    assert sum(each["pairs"] for each in bins) == 90 and len(bins) == 5
    assert bins[0]["longer_from"] == -4 and bins[-1]["longer_to"] == 4
    assert all(a["longer_to"] < b["longer_from"] for a, b in zip(bins, bins[1:], strict=False))
    assert bins[0]["accuracy"][LONGER] == 0.0 and bins[-1]["accuracy"][LONGER] == 1.0
    assert bins[0]["accuracy"][IMPLICIT] < bins[-1]["accuracy"][IMPLICIT] == 1.0


# --- the command -----------------------------------------------------------------------------------------------------


def test_whole_evaluation_of_untrained_stages(run, capsys):
    asked = question(run, reward="rm", data=["demo:eval_pairs", "demo:shift_both"], tokens=2)
    evaluate_implicit(asked)
    text = capsys.readouterr().out
    assert "Implicit reward of dpo: 0.5 log(dpo / sft); reward model: rm" in text
    for part in ("demo:eval_pairs", "demo:shift_both", "longer wins", "reward model against implicit:", "McNemar p"):
        assert part in text, part
    assert "…" not in text, "nothing is cut"
    record = json.loads((run / "report" / "implicit.json").read_text())
    assert (record["policy"], record["reference"], record["reward"], record["beta"]) == ("dpo", "sft", "rm", 0.5)
    for dataset in record["datasets"]:
        assert dataset["pairs"] == dataset["read"] == 1000 and dataset["left_out"] == {}
        assert set(dataset["scores"]) == {IMPLICIT, PER_TOKEN, EXPLICIT, LONGER}
        assert 0.4 < dataset["scores"][IMPLICIT]["accuracy"]["mean"] < 0.6, "nothing was learned"
    chosen, rejected = score_pairs(RunDir(run).stage("rm"), "demo:eval_pairs")
    right = sum(c > r for c, r in zip(chosen, rejected, strict=True)) / 1000
    assert record["datasets"][0]["scores"][EXPLICIT]["accuracy"]["mean"] == pytest.approx(right, abs=1e-12)
    row, source = record["datasets"][0]["rows"][1], demo_rows("eval_pairs")[1]
    assert row["prompt"] == source["prompt"] and len(record["datasets"][0]["rows"]) == 2
    for side in ("chosen", "rejected"):
        tokens = row[side]["tokens"]
        assert "".join(word for word, _ in tokens) == source[side] + "<|eos|>"
        assert sum(credit for _, credit in tokens) == pytest.approx(row[side]["reward"], abs=1e-5)


def test_json_is_all_that_is_printed(run, capsys):
    evaluate_implicit(question(run, as_json=True))
    printed = capsys.readouterr().out
    assert json.loads(printed) == json.loads((run / "report" / "implicit.json").read_text())


def test_rows_are_cut_as_the_policy_learned_them(run, capsys):
    evaluate_implicit(question(run, policy="short"))
    (dataset,) = json.loads((run / "report" / "implicit.json").read_text())["datasets"]
    assert 0 < dataset["pairs"] < 1000 and dataset["pairs"] + sum(dataset["left_out"].values()) == 1000
    assert f"left out of 1000 rows: {1000 - dataset['pairs']} longer than max_length" in capsys.readouterr().out
    policy = find_judges(question(run, policy="short")).policy
    assert data_block(policy, "demo:eval_pairs").max_length == 40


def test_another_tokenizer_is_refused(publish, run, tmp_path):
    publish(tmp_path, "other", "sft", 0, texts=("entirely other words", "than those of the task"))
    with pytest.raises(CheckpointError, match="expected the tokenizer of"):
        evaluate_implicit(question(run, reference=str(tmp_path / "other")))


def test_a_reward_model_may_read_in_its_own_way(publish, run, tmp_path, capsys):
    publish(
        tmp_path, "letters", "rm", 3, texts=("ab", "cd")
    )  # nearly a token per letter, so that most rows are too long
    evaluate_implicit(question(run, reward=str(tmp_path / "letters"), policy="dpo"))
    (dataset,) = json.loads((run / "report" / "implicit.json").read_text())["datasets"]
    assert 0 < dataset["pairs"] < 1000
    assert dataset["left_out"] == {"does not fit the reward model": 1000 - dataset["pairs"]}


# --- credit as text --------------------------------------------------------------------------------------------------


def test_credit_is_a_colour_or_a_number():
    assert credited(" dull", -1.0, 2.0, coloured=False).plain == " dull(-1.00)"
    assert credited(" dull", -2.0, 2.0, coloured=True).style == "not bold #000000 on #ff0000"
    assert credited(" fine", 1.0, 2.0, coloured=True).style == "not bold #000000 on #80ff80"
    assert credited("the", 0.0, 0.0, coloured=True).style == "not bold #000000 on #ffffff"


def test_a_row_on_both_kinds_of_console():
    side = {"reward": -0.5, "tokens": [[" dull", -0.75], [".", 0.25]]}
    row = CreditedRow({"row": 4, "prompt": "the plot was", "chosen": side, "rejected": side})
    found = []
    for colours in (None, "truecolor"):
        console = Console(width=200, color_system=colours, force_terminal=colours is not None)
        with console.capture() as capture:
            console.print(row)
        found.append(capture.get())
    assert "row 4: the plot was" in found[0]
    assert "chosen -0.50:  dull(-0.75).(+0.25)\n" in found[0] and "\x1b" not in found[0]
    assert "48;2;255;0;0m dull" in found[1] and "(-0.75)" not in found[1]
