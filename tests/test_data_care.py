"""`rlhf data`, and stages that learn from filtered and weighted pairs, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.data.filters import DUPLICATE, HELD_OUT_ROW, HIGH_MARGIN, LOW_MARGIN
from rlhf.recipe.schema import FilterBlock


@pytest.fixture(scope="module")
def scored(tiny) -> Path:
    """The tiny run's pairs with scores and a few faults: a repetition, a contradiction, equal words."""
    rows = [json.loads(line) for line in (tiny.data / "pairs.jsonl").read_text().splitlines()]
    rows += [rows[0], {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}]
    rows += [{**rows[2], "rejected": f"{rows[2]['chosen']} "}]
    rows = [{**row, "score_chosen": i / 10, "score_rejected": 0.0} for i, row in enumerate(rows)]
    path = tiny.data / "scored-pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EVERYTHING = {
    "min_margin": 0.5,
    "max_margin": 6.0,
    "max_length_ratio": 2.5,
    "max_length_difference": 30,
    "drop_equal": True,
    "drop_conflicts": True,
    "drop_duplicates": True,
    "drop_eval_overlap": "prompts",
}


def words(data: dict) -> list[str]:
    return ["--set", f"data={json.dumps({'max_length': 96, 'eval_rows': 8, **data})}"]


# --- the report ------------------------------------------------------------------------------------------------------


def test_the_report_on_pairs(cli, tiny, scored):
    before = tiny.files()
    done = cli("data", tiny.recipes / "rm.yaml", "--run", tiny.root, *words({"path": str(scored)}))
    assert done.code == 0 and done.err == "", done.err
    assert "training rows" in done.out and "the longer answer is chosen" in done.out and "score margin" in done.out
    assert "ranked both ways" in done.out and f"{scored}:63" in done.out, "the pair of equal words is named"
    assert tiny.files() == before


def test_the_report_for_machines_with_a_reward_model_and_a_filter(cli, tiny, scored):
    data = {"path": str(scored), "filter": {"drop_duplicates": True, "drop_eval_overlap": "rows"}}
    command = ["data", tiny.recipes / "rm.yaml", "--run", tiny.root, *words(data), "--json"]
    answers = [cli(*command, "--reward", name) for name in ("rm", tiny.root / "rm" / "model")]
    for done in answers:
        assert done.code == 0, done.err
    report = json.loads(answers[0].out)
    assert answers[1].out == answers[0].out and report["stage"] == "rm"
    everything, filtered = report["all"], report["filtered"]
    assert everything["kind"] == "pairs" and everything["held_out"] == filtered["held_out"] == 8
    counts = {finding["name"]: finding["count"] for finding in filtered["findings"]}
    names = {f"dropped: {reason}" for reason in (DUPLICATE, HELD_OUT_ROW)}
    dropped = sum(count for name, count in counts.items() if name in names)
    assert dropped > 0 and everything["train"] - filtered["train"] == dropped
    assert counts["rows equal to an earlier row"] == counts["rows that are held out too"] == 0
    training, held_out = everything["noise"]
    assert (training["rows"], training["noise"]["disagree"]["total"]) == ("training", everything["train"])
    assert held_out["noise"]["disagree"]["total"] == 8 and 0 <= training["noise"]["epsilon"] <= 1
    assert everything["bias"]["with_reward"] is not None


def test_every_stage_has_a_report(cli, tiny):
    for stage, kind in (("sft", "tokens"), ("grpo", "prompts"), ("label", "prompts")):
        done = cli("data", tiny.recipes / f"{stage}.yaml", "--run", tiny.root, "--json")
        assert done.code == 0, done.err
        report = json.loads(done.out)
        assert (report["all"]["kind"], report["filtered"], report["all"]["bias"]) == (kind, None, None)
        assert report["all"]["train"] > 0


def test_a_loss_of_single_answers_has_its_own_report_and_no_pair_filters(cli, tiny):
    words_ = ["--run", tiny.root, "--set", "loss={name: kto}"]
    done = cli("data", tiny.recipes / "dpo.yaml", *words_, "--json")
    assert done.code == 0 and json.loads(done.out)["all"]["kind"] == "answers", done.err
    done = cli("data", tiny.recipes / "dpo.yaml", *words_, "--set", "data.filter.drop_conflicts=true")
    assert done.code == 2 and "data.filter.drop_conflicts: expected nothing where no pairs" in done.err


def test_rows_that_training_would_refuse_are_counted(cli, tiny):
    data = {"path": str(tiny.data / "pairs.jsonl"), "on_long": "error", "max_length": 56}
    done = cli("data", tiny.recipes / "rm.yaml", "--run", tiny.root, *words(data))
    assert done.code == 0 and "dropped: longer than max_length" in done.out, done.err


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["no.yaml", "--stage", "rm"], 2, "expected a YAML file, found nothing"),
        (["RECIPES/rm.yaml", "--stage", "rmm"], 2, "Say which it is: --stage sft | rm"),
        (["RECIPES/rm.yaml"], 4, "model.from: expected a finished stage"),
        (["RECIPES/rm.yaml", "--run", "RUN", "--set", "data.filter.min_margn=1"], 2, "did you mean"),
        (
            ["RECIPES/rm.yaml", "--run", "RUN", "--set", "data.filter.min_margin=1"],
            3,
            "pairs.jsonl:1: expected a score",
        ),
        (["RECIPES/rm.yaml", "--run", "RUN", "--set", "data.path=no.jsonl"], 3, "data.path: expected a file"),
        (
            ["RECIPES/rm.yaml", "--run", "RUN", "--reward", "sft"],
            4,
            "--reward: expected a reward model, found a policy",
        ),
        (["RECIPES/rm.yaml", "--run", "RUN", "--reward", "rm-9"], 4, "found no folder RUN/rm-9"),
        (["RECIPES/sft.yaml", "--run", "RUN", "--reward", "rm"], 2, "expected a recipe that learns from pairs"),
        (["RECIPES/init.yaml", "--stage", "rm", "--reward", "rm"], 2, "expected a run directory for the stage rm"),
    ],
)
def test_what_cannot_be_reported_on(cold_cli, tiny, tmp_path, options, code, said):
    (tiny.recipes / "init.yaml").write_text(f"model: {{init: {{}}}}\ndata: {{path: {tiny.data}/pairs.jsonl}}\n")
    before = tiny.files()
    named = [each.replace("RECIPES", str(tiny.recipes)).replace("RUN", str(tiny.root)) for each in options]
    done = cold_cli("data", *named)
    assert done.code == code and said.replace("RUN", str(tiny.root)) in done.err and not done.torch, done.err
    assert done.out == "" and done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert tiny.files() == before and not Path("runs/data").exists()


def test_a_policy_folder_is_no_reward_model(cli, tiny):
    done = cli("data", tiny.recipes / "rm.yaml", "--run", tiny.root, "--reward", tiny.root / "sft" / "model")
    assert done.code == 4 and "expected a reward model, found a model without a score head" in done.err
    assert "Traceback" not in done.err


# --- learning from what is left --------------------------------------------------------------------------------------


@pytest.mark.pipeline
@pytest.mark.parametrize("stage", ["rm", "dpo"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_stage_learns_from_filtered_and_weighted_pairs(cli, tiny, scored, stage, lora):
    assert set(EVERYTHING) == set(FilterBlock.model_fields), "an option without a case"
    name = f"{stage}-filtered-{lora}"
    data = {"path": str(scored), "filter": EVERYTHING, "reweight": {"temperature": 2.0}}
    adapter = ["--set", "model.lora={rank: 4}"] if lora else []
    done = cli(*tiny.command(stage, "--name", name, *words(data), *adapter))
    assert done.code == 0, done.err
    assert [row["step"] for row in tiny.rows(name)] == [1, 2]
    report = json.loads((tiny.root / name / "provenance.json").read_text())["data"]
    (source,) = report["sources"]
    assert source["read"] == 63 == source["kept"] + sum(source["dropped"].values()) and report["train"]["rows"] > 8
    assert report["eval"]["rows"] == 8 and source["kept"] == report["train"]["rows"] + 8
    assert source["dropped"][LOW_MARGIN] + source["dropped"][HIGH_MARGIN] > 2
    assert f"dropped ({LOW_MARGIN})" in done.err and "that weigh alike" in done.err


@pytest.mark.pipeline
def test_weights_change_the_update_and_equal_ones_do_not(cli, tiny, scored):
    losses = {}
    for name, temperature in (("plain", None), ("alike", 1e9), ("sharp", 0.5)):
        given = {} if temperature is None else {"reweight": {"temperature": temperature}}
        done = cli(*tiny.command("rm", "--name", f"weights-{name}", *words({"path": str(scored), **given})))
        assert done.code == 0, done.err
        losses[name] = [row["train/loss"] for row in tiny.rows(f"weights-{name}")]
    assert losses["alike"] == pytest.approx(losses["plain"], rel=1e-5)
    assert abs(losses["sharp"][0] - losses["plain"][0]) > 1e-4


@pytest.mark.pipeline
def test_a_pair_without_a_margin_stops_the_stage_before_anything_is_written(cold_cli, tiny):
    before = tiny.files()
    done = cold_cli(*tiny.command("dpo", "--name", "unscored", "--set", "data.reweight={}"))
    assert done.code == 3 and "pairs.jsonl:1: expected a score margin" in done.err and not done.torch
    assert tiny.files() == before
