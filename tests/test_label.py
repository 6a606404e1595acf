"""`rlhf label` through the command line, and what is trained on its pairs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = ("answers.jsonl", "pairs.jsonl", "best.jsonl", "lists.jsonl")
WALL_CLOCK = ("time", "speed/")


@pytest.fixture(scope="module")
def labelled(cli, tiny):
    """A finished stage `label` of the tiny run."""
    done = cli(*tiny.command("label"))
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        f"label finished: {tiny.root}/label/pairs.jsonl",
        f"next: rlhf rm RECIPE --run {tiny.root} --set data.from=label",
    ]
    return tiny


def content(run, name: str) -> list[bytes]:
    return [(run.root / name / file).read_bytes() for file in FILES]


def comparable(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in rows]


def test_every_answer_is_kept_and_pairs_are_its_best_and_worst(labelled):
    answers, pairs, best, lists = (labelled.rows("label", file) for file in FILES)
    prompts = [json.loads(line)["prompt"] for line in (labelled.data / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in answers[::4]] == [[{"role": "user", "content": prompt}] for prompt in prompts]
    assert [row["row"] for row in answers] == [row for row in range(40) for _ in range(4)]
    mute = [row for row in answers if "\0" in row["answer"]]  # what an untrained model says now and then
    assert [row for row in answers if row["score"] is None] == mute
    assert all(row["scores"] == {"model": row["score"]} for row in answers if row not in mute)
    by_prompt = {row: [a for a in answers if a["row"] == row] for row in range(40)}
    assert len({a["answer"] for a in answers}) > 100, "answers to one prompt are drawn apart"
    for pair in pairs:
        group = [a for a in by_prompt[pair["row"]] if a not in mute]
        scores = {a["answer"]: a["score"] for a in group}
        assert pair["score_chosen"] == scores[pair["chosen"]] == max(scores.values())
        assert pair["score_rejected"] == scores[pair["rejected"]] == min(scores.values())
        assert pair["score_margin"] == pair["score_chosen"] - pair["score_rejected"] > 0
        assert pair["prompt"] == group[0]["prompt"]
        assert 1 > pair["win_rate_chosen"] > 0.5 > pair["win_rate_rejected"] > 0
    assert [row["row"] for row in best] == [row["row"] for row in lists] == list(range(40))
    for kept, listed in zip(best, lists, strict=True):
        scores = {a["answer"]: a["score"] for a in by_prompt[kept["row"]] if a not in mute}
        assert scores[kept["completion"]] == kept["score"] == max(scores.values())
        assert dict(zip(listed["answers"], listed["scores"], strict=True)) == scores


def test_a_label_stage_leaves_what_the_run_directory_promises(labelled, cold_cli):
    folder = labelled.root / "label"
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert manifest["kind"] == "data" and set(manifest["files"]) == set(FILES)
    pairs = len(labelled.rows("label", "pairs.jsonl"))
    facts = manifest["facts"]
    unscored = sum(row["score"] is None for row in labelled.rows("label", "answers.jsonl"))
    assert (facts["prompts"], facts["answers"], facts["unscored"], facts["pairs"]) == (40, 160, unscored, pairs)
    assert pairs + sum(facts["left_out"].values()) == 40
    assert (facts["best"], facts["lists"]) == (40, 40)
    curve = facts["best_of_n"]["curve"]
    assert [point["n"] for point in curve] == [1, 2, 4] and facts["best_of_n"]["prompts"] <= 40
    assert curve[0]["score"] < curve[1]["score"] < curve[2]["score"] and curve[0]["kl_bound"] == 0
    rows = labelled.rows("label")
    assert all(row["label/best_score"] > row["reward/score_mean"] for row in rows)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert sum(row["label/pairs"] for row in rows) == pairs
    assert sum(row["reward/unscored"] for row in rows) == unscored
    assert all(row["reward/model"] == pytest.approx(row["reward/score_mean"], abs=0.1) for row in rows)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert {parent["stage"] for parent in provenance["parents"]} == {"sft", "rm"}
    assert provenance["data"]["sources"][0]["read"] == 40
    stages = {stage["name"]: stage for stage in json.loads(cold_cli("status", labelled.root, "--json").out)}
    assert stages["label"]["kind"] == "data" and stages["label"]["key_metric"][0] == "reward/score_mean"
    again = cold_cli(*labelled.command("label"))
    assert again.code == 0 and not again.torch and "label was finished before" in again.out


def test_an_interrupted_label_stage_resumes_to_the_same_bytes(labelled, cli):
    """Killed in the middle of a step: the answers are cut back to whole steps."""
    words = [str(word) for word in labelled.command("label", "--name", "label-killed")]
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *words], cwd=ROOT, env=environment())
    folder = labelled.root / "label-killed"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").read_text():
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    assert process.wait(timeout=60) == -signal.SIGKILL
    answers = (folder / "answers.jsonl").read_bytes()
    first = content(labelled, "label")[0]
    assert first.startswith(answers) and len(answers) < len(first)
    (folder / "answers.jsonl").write_bytes(answers + b'{"row": 1, "ans')  # a line that the crash cut short
    done = cli(*labelled.command("label", "--name", "label-killed"))
    assert done.code == 0, done.err
    assert content(labelled, "label-killed") == content(labelled, "label")
    assert comparable(labelled.rows("label-killed")) == comparable(labelled.rows("label"))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


@pytest.mark.distributed
def test_two_ranks_write_the_same_bytes_as_one(labelled):
    """Also where the policy and the reward model are sharded, and in a last step that is not full."""
    sharded = ["--set", "zero.stage=3", "--set", "rewards.0.zero.stage=3"]
    done = labelled.launched("label", "--name", "label-two", *sharded)
    assert done.code == 0, done.err
    assert content(labelled, "label-two") == content(labelled, "label")
    assert comparable(labelled.rows("label-two")) == comparable(labelled.rows("label"))


# --- what is trained on it --------------------------------------------------------------------------------------------


def test_a_reward_model_goes_on_learning_from_pairs_with_replay(labelled, cli):
    old = {"path": str(labelled.data / "pairs.jsonl"), "weight": 0.1}
    recipe = {
        "model": {"from": "rm"},
        "data": {"sources": [{"from": "label"}, old], "max_length": 96},
        "train": {"steps": 2, "batch_size": 8, "lr": 1e-12},
    }
    file = labelled.recipes / "more.yaml"
    file.write_text(yaml.safe_dump(recipe))
    done = cli("rm", file, "--run", labelled.root, "--name", "rm-more")
    assert done.code == 0, done.err
    provenance = json.loads((labelled.root / "rm-more" / "provenance.json").read_text())
    new, replayed = provenance["data"]["sources"]
    assert new["path"] == str(labelled.root / "label" / "pairs.jsonl") and new["format"] == "pairs"
    assert new["read"] == new["kept"] == len(labelled.rows("label", "pairs.jsonl"))
    assert (replayed["read"], replayed["kept"]) == (60, 6), "a tenth of its own rows, whatever the other source has"
    assert {parent["stage"] for parent in provenance["parents"]} == {"rm", "label"}
    assert str(labelled.root) not in json.dumps(provenance["inputs"]["recipe"]["data"]["sources"][0])
    assert "path: null" in (labelled.root / "rm-more" / "resolved.yaml").read_text()

    from safetensors.torch import load_file

    before, after = (load_file(labelled.root / name / "model" / "model.safetensors") for name in ("rm", "rm-more"))
    for name, weight in before.items():  # with no learning rate to speak of, all is as it was: the head was kept
        assert after[name].allclose(weight, atol=1e-9), name
    assert any("score" in name for name in before)


def test_sft_learns_from_the_best_answers(labelled, cli):
    """Rejection sampling, then supervised learning: the rows are read as they were written."""
    words = ["data={from: label, output: best, max_length: 96}", "model={from: sft}", "train.steps=2", "eval.every=0"]
    done = cli(*labelled.command("sft", "--name", "sft-best", *(w for word in words for w in ("--set", word))))
    assert done.code == 0, done.err
    provenance = json.loads((labelled.root / "sft-best" / "provenance.json").read_text())
    (source,) = provenance["data"]["sources"]
    assert source["path"] == str(labelled.root / "label" / "best.jsonl") and source["format"] == "scored"
    assert source["read"] == source["kept"] == len(labelled.rows("label", "best.jsonl"))
    assert {parent["stage"] for parent in provenance["parents"]} == {"sft", "label"}


def test_rejection_sampling_pairs_what_it_accepts(labelled, cli):
    """A small beta accepts the best answers alone: pairs are made of them, the same ones in a second run."""
    words = ["label.pairs=rso", "label.answers=8", "label.rso={accept: 4, beta: 1.0e-6}", "data.limit=12"]
    command = labelled.command("label", "--name", "rso", *(w for word in words for w in ("--set", word)))
    done = cli(*command)
    assert done.code == 0, done.err
    answers, pairs = (labelled.rows("rso", file) for file in FILES[:2])
    assert 12 < len(pairs) <= 24
    for pair in pairs:
        scores = {a["answer"]: a["score"] for a in answers if a["row"] == pair["row"] and a["score"] is not None}
        top = sorted(scores.values(), reverse=True)[:4]
        assert pair["score_chosen"] in top and pair["score_rejected"] in top
    assert sum(row["label/pairs"] for row in labelled.rows("rso")) == len(pairs), "a step pairs as the end does"
    before = content(labelled, "rso")
    done = cli(*command, "--restart")
    assert done.code == 0 and content(labelled, "rso") == before, done.err


def test_pairs_made_again_are_noticed(labelled, cli, cold_cli):
    done = cli(*labelled.command("label", "--name", "short", "--set", "data.limit=12"))
    assert done.code == 0, done.err
    options = ["--name", "rm-short", "--set", "data.from=short", "--set", "data.eval_rows=2"]
    done = cli(*labelled.command("rm", *options))
    assert done.code == 0, done.err
    again = cold_cli(*labelled.command("rm", *options))
    assert "finished before" in again.out
    seeded = ["--set", "data.limit=12", "--set", "label.seed=1", "--restart"]
    done = cli(*labelled.command("label", "--name", "short", *seeded))
    assert done.code == 0, done.err
    stages = {stage["name"]: stage for stage in json.loads(cold_cli("status", labelled.root, "--json").out)}
    assert stages["rm-short"]["stale"] == ["short"]
    changed = cold_cli(*labelled.command("rm", *options))
    assert changed.code == 2 and "parents.data: " in changed.err and "made from other inputs" in changed.err
    dry = cold_cli(*labelled.command("dpo", "--set", "data.from=short", "--set", "data.eval_rows=2", "--dry-run"))
    assert dry.code == 0 and "from: short" in dry.out


def test_a_pipeline_goes_round_and_a_further_round_skips_what_is_finished(labelled, cli):
    file = labelled.recipes / "rounds.yaml"
    steps = [
        {"stage": "label", "recipe": "label.yaml", "name": "label-{round}", "set": {"data.limit": 12}},
        {
            "stage": "rm",
            "recipe": "rm.yaml",
            "name": "rm-{round}",
            "set": {"data.sources": [{"from": "label-{round}"}], "data.eval_rows": 2, "train.seed": "{round}"},
        },
    ]
    again = {"stage": "label", "recipe": "label.yaml", "name": "last", "set": {"data.limit": 12}}
    for rounds in (1, 2):
        file.write_text(yaml.safe_dump({"stages": [{"rounds": rounds, "stages": steps}, again]}))
        done = cli("run", file, "--run", labelled.root)
        assert done.code == 0, done.err
        assert done.out.count("was finished before") == (0 if rounds == 1 else 3)
    for number in (1, 2):
        provenance = json.loads((labelled.root / f"rm-{number}" / "provenance.json").read_text())
        assert [parent["stage"] for parent in provenance["parents"]] == ["sft", f"label-{number}"]
        assert provenance["seed"] == number
    assert content(labelled, "label-1") == content(labelled, "label-2") == content(labelled, "last")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "option", "code", "text"),
    [
        ("label", "label.answers=1", 2, "label.answers: expected a whole number >= 2, found 1"),
        (
            "label",
            "label.pairs=rso",
            2,
            "label.answers: expected more than label.rso.accept = 8 to select from, found 4",
        ),
        ("label", "label.rso.beta=1", 2, "label.rso: expected label.pairs rso beside it, found best_worst"),
        ("label", "label.rso.accept=3", 2, "label.rso.accept: expected an even number, found 3"),
        ("rm", "data.output=best", 2, "data.output: expected from: a label stage beside it, found best of none"),
        ("rm", "data={from: label, output: best}", 3, "expected a better and a worse answer (chosen, rejected), found"),
        ("label", "rewards=[]", 2, "rewards: expected one of rewards and judge, found neither"),
        ("label", "model={init: {}}", 2, "model.init: expected a trained policy, found one from scratch"),
        ("label", "model.lora.rank=4", 2, "model.lora: expected nothing that is for training"),
        ("label", "zero.stage=2", 2, "zero.stage: expected 0 or 3 for a frozen model"),
        ("label", "train.lr=1", 2, "train: expected a known key"),
        ("label", "model.from=rm", 4, "model.from: expected a policy, found a reward model"),
        ("label", "rewards.0.from=sft", 4, "rewards.0.from: expected a reward model, found a policy"),
        ("rm", "data.from=sft", 4, "data.from: expected a set of labelled pairs, found a policy"),
        (
            "rm",
            "data.from=none",
            4,
            "data.from: expected a finished stage with a set of labelled pairs, found no folder",
        ),
        ("rm", "model.from=label", 4, "model.from: expected a policy or reward model, found a set of labelled pairs"),
        ("rm", "data.sources=[{from: label, path: x.jsonl}]", 2, "data.sources.0: expected one of from and path"),
    ],
)
def test_refusals(labelled, cold_cli, stage, option, code, text):
    before = labelled.files()
    done = cold_cli(*labelled.command(stage, "--name", "refused", "--set", option))
    assert done.code == code and text in done.err and not done.torch, done.err
    assert labelled.files() == before


def test_a_missing_set_of_pairs_names_the_command_that_makes_it(labelled, cold_cli):
    done = cold_cli(*labelled.command("rm", "--name", "refused", "--set", "data.from=label-9"))
    assert f"Make it with: rlhf label RECIPE --run {labelled.root} --name label-9" in done.err


def test_a_label_recipe_without_rewards_is_refused(cold_cli, tmp_path):
    recipe = tmp_path / "label.yaml"
    recipe.write_text("model: {from: sft}\ndata: {path: demo:prompts}\n")
    done = cold_cli("label", recipe, "--run", tmp_path / "run")
    assert done.code == 2 and f"{recipe}:1:1: rewards: expected one of rewards and judge" in done.err and not done.torch


def test_answers_that_make_no_pair_are_refused(labelled, cli):
    done = cli(*labelled.command("label", "--name", "equal", "--set", "rewards=[{kind: exact, answer: prompt}]"))
    assert done.code == 3 and "expected answers to make pairs, found none among 160: ties" in done.err
    assert not (labelled.root / "equal" / "MANIFEST.json").exists()
