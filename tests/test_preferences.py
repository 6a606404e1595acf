"""Every loss of `rlhf dpo` and `rlhf rm` through the command line: a few steps on rows that can feed it."""

from __future__ import annotations

import json
import math
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
