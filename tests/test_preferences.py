"""Every loss of `rlhf dpo` and `rlhf rm` through the command line: a few steps on rows that can feed it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.algo.reward_model import REWARD_LOSSES
from rlhf.recipe.fields import shape_of
from rlhf.recipe.options import PreferenceLoss, RewardLoss

pytestmark = pytest.mark.pipeline
BLOCKS = {block.model_fields["name"].default: block for block in shape_of(PreferenceLoss).blocks}
REWARD_BLOCKS = {block.model_fields["name"].default: block for block in shape_of(RewardLoss).blocks}
LORA = ("dpo", "tdpo2", "kto", "dro_v", "pairwise_cringe", "pl_dpo")  # one of every kind of input


@pytest.fixture(scope="module")
def rows(tiny) -> dict[str, str]:
    """A dataset of each kind, as an override."""
    pairs = [json.loads(line) for line in (tiny.data / "pairs.jsonl").read_text().splitlines()]
    for i, row in enumerate(pairs):
        row |= {"score_chosen": 1.0 + i % 3, "score_rejected": 0.5}
        row |= {"win_rate_chosen": 0.9 - i % 3 / 10, "win_rate_rejected": 0.2}
    write(tiny.data / "scored.jsonl", pairs)
    lists = [
        {
            "prompt": row["prompt"],
            "answers": [row["chosen"], row["rejected"], other["chosen"]][: 3 - i % 2],
            "scores": [0.9, 0.1, 0.4][: 3 - i % 2],
        }
        for i, (row, other) in enumerate(zip(pairs, pairs[1:] + pairs[:1], strict=True))
    ]
    write(tiny.data / "lists.jsonl", lists)
    return {name: str(tiny.data / f"{name}.jsonl") for name in ("scored", "lists")}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(rows: dict[str, str], name: str, loss: str = "") -> list[str]:
    block = BLOCKS[name]
    file = rows["lists" if block.rows == "lists" else "scored"]
    return ["--set", f"loss={{name: {name}{loss}}}", "--set", f"data.path={file}"]


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "full") for name in PREFERENCE_LOSSES.names()), *((name, "lora") for name in LORA)]
)
def test_every_loss_trains(cli, tiny, rows, name, kind):
    lora = ["--set", "model.lora={rank: 4}"] if kind == "lora" else []
    folder = f"loss-{name}-{kind}"
    done = cli(*tiny.command("dpo", "--name", folder, *words(rows, name), *lora))
    assert done.code == 0, done.err
    found = tiny.rows(folder)
    assert [row["step"] for row in found] == [1, 2]
    for row in found:
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values()), row
        assert row["train/grad_norm"] > 0 and math.isfinite(row["train/loss"])
    log = (tiny.root / folder / "log.txt").read_text()
    assert ("rlhf.roles: reference" in log or "reference log-probs" in log) is BLOCKS[name].reference
    assert AutoModelForCausalLM.from_pretrained(tiny.root / folder / "model") is not None
    assert (tiny.root / folder / "critic").exists() is (name == "dro_v")
    before = load_file(tiny.root / "sft" / "model" / "model.safetensors")
    after = load_file(tiny.root / folder / "model" / "model.safetensors")
    assert any(not before[key].equal(after[key]) for key in before)


@pytest.mark.parametrize("name", REWARD_LOSSES.names())
def test_every_reward_loss_trains(cli, tiny, rows, name):
    file = rows["lists" if REWARD_BLOCKS[name].rows == "lists" else "scored"]
    given = ["--set", f"loss={{name: {name}}}", "--set", f"data.path={file}"]
    done = cli(*tiny.command("rm", "--name", f"rm-{name}", *given))
    assert done.code == 0, done.err
    assert all(math.isfinite(row["train/loss"]) and row["train/grad_norm"] > 0 for row in tiny.rows(f"rm-{name}"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny.root / f"rm-{name}" / "model")
    assert math.isfinite(model.config.score_mean)


def test_losses_add_up(cli, tiny, rows):
    more = ["--set", "further_losses=[{name: preferred_ft, weight: 0.5}]"]
    done = cli(*tiny.command("dpo", "--name", "loss-sum", *words(rows, "dpo"), *more))
    assert done.code == 0, done.err
    for row in tiny.rows("loss-sum"):
        for group in ("train", "eval"):
            if f"{group}/loss" in row:
                parts = row[f"{group}/loss_dpo"] + 0.5 * row[f"{group}/loss_preferred_ft_per_chosen_tokens"]
                assert row[f"{group}/loss"] == pytest.approx(parts)


@pytest.mark.parametrize("name", ["bco", "beta_dpo", "dro_v"])
def test_an_interrupted_stage_with_running_numbers_resumes_exactly(cli, tiny, rows, name):
    """A stage of 4 steps that starts from the checkpoint after 2 ends as one that went through."""
    given = [*words(rows, name), "--set", "train.steps=4", "--set", "checkpoint={every: 2}"]
    done = cli(*tiny.command("dpo", "--name", f"whole-{name}", *given))
    assert done.code == 0, done.err
    whole = tiny.root / f"whole-{name}"
    cut = tiny.root / f"cut-{name}"
    shutil.copytree(whole, cut)
    for path in (cut / "model", cut / "critic"):
        shutil.rmtree(path, ignore_errors=True)
    (cut / "MANIFEST.json").unlink()
    status = json.loads((cut / "status.json").read_text())
    (cut / "status.json").write_text(json.dumps({**status, "state": "stopped", "step": 2}))
    done = cli(*tiny.command("dpo", "--name", f"cut-{name}", *given))
    assert done.code == 0, done.err
    for path in ("model/model.safetensors", *(["critic/model.safetensors"] if name == "dro_v" else [])):
        assert (whole / path).read_bytes() == (cut / path).read_bytes()

    def numbers(folder: str) -> list[dict]:
        return [
            {key: value for key, value in row.items() if key != "time" and not key.startswith("speed/")}
            for row in tiny.rows(folder)
        ]

    assert numbers(f"whole-{name}") == numbers(f"cut-{name}")


def test_scores_outside_of_0_to_1_become_win_rates_for_losses_that_want_such(cli, tiny, tmp_path):
    lists = [
        {"prompt": f"the plot {n}", "answers": ["was fine", "was odd", "was"], "scores": [3.0 + n, -1.0, 0.5]}
        for n in range(12)
    ]
    write(tmp_path / "lists.jsonl", lists)
    data = f"data={{path: {tmp_path / 'lists.jsonl'}, max_length: 96}}"
    for name in ("lipo_lambda", "listnet_softmax"):
        done = cli(*tiny.command("dpo", "--name", f"raw-{name}", "--set", data, "--set", f"loss={{name: {name}}}"))
        assert done.code == 0, done.err
        assert "taken as win rates" in (tiny.root / f"raw-{name}" / "log.txt").read_text()
        assert all(0 < row["train/loss"] < 10 for row in tiny.rows(f"raw-{name}"))


# --- what cannot work -------------------------------------------------------------------------------------------------


PAIR = {"prompt": "a b", "chosen": "c d", "rejected": "e f"}


@pytest.mark.parametrize(
    ("data", "loss", "code", "said"),
    [
        ([{"prompt": "a", "completion": "b", "label": True}], "dpo", 3, "kto"),
        (
            [{"prompt": "a b", "chosen": "c d", "rejected": "e f"}] * 9,
            "sppo",
            3,
            "win_rate_chosen and win_rate_rejected",
        ),
        ([{"prompt": "a b", "chosen": "c d", "rejected": "e f"}] * 9, "dno", 3, "score_chosen and score_rejected"),
        ([{"prompt": "a b", "chosen": "c d", "rejected": "e f"}] * 9, "kto", 3, "answers to different prompts"),
        ([{"prompt": "a b", "answers": ["c d"], "scores": [1]}] * 9, "pl_dpo", 3, "answers"),
        ([{"prompt": "a b", "answers": ["c d", "e"], "scores": [1]}] * 9, "pl_dpo", 3, "scores"),
        ([{"prompt": "a b", "answers": ["c d", "e"], "scores": [1, 2]}] * 9, "dpo", 3, "chosen, rejected"),
        ([{"prompt": "a b", "completion": "c", "score": 1.5}] * 9, "dro_v", 3, "rewards that differ"),
    ],
)
def test_a_loss_that_the_data_cannot_feed_is_refused_with_the_reason(cli, tiny, tmp_path, data, loss, code, said):
    write(tmp_path / "rows.jsonl", data)
    before = tiny.files()
    given = ["--set", f"loss={{name: {loss}}}", "--set", f"data={{path: {tmp_path / 'rows.jsonl'}, max_length: 96}}"]
    done = cli(*tiny.command("dpo", "--name", "refused", *given))
    assert done.code == code and said in done.err and "Traceback" not in done.err, done.err
    assert done.err.count("error: ") == 1 and tiny.files() == before


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"loss": {"name": "simpo"}, "reference": {"from": "sft"}}, "reference: expected none for simpo"),
        ({"loss": {"name": "dpo"}, "critic": {"lr": 1e-4}}, "critic: expected none for dpo"),
        (
            {"further_losses": [{"name": "kto"}]},
            "further_losses.0.name: expected a loss on pairs, as dpo is, found kto",
        ),
        ({"further_losses": [{"name": "dpo"}]}, "further_losses.0.name: expected a loss that is not there yet"),
        ({"loss": {"name": "robust_dpo", "label_smoothing": 0.5}}, "loss.label_smoothing: expected a number"),
        ({"loss": {"name": "robust"}}, "did you mean"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_in_a_blink(cold_cli, tiny, recipe, said):
    given = [word for key, value in recipe.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    done = cold_cli(*tiny.command("dpo", "--name", "refused", *given))
    assert done.code == 2 and said in done.err and not done.torch, done.err


def test_the_losses_are_listed(cli):
    done = cli("losses")
    assert done.code == 0 and all(name in done.out for name in (*PREFERENCE_LOSSES.names(), *REWARD_LOSSES.names()))
    found = json.loads(cli("losses", "--json").out)
    assert [each["name"] for each in found if each["stage"] == "dpo"] == PREFERENCE_LOSSES.names()
    kto = next(each for each in found if each["name"] == "kto")
    assert kto["rows"] == "answers" and kto["whole_batch"] and kto["options"]["beta"] == 0.1
