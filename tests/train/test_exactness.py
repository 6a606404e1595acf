"""What a run becomes does not depend on where it was interrupted, nor on how many ranks it has.

For everything that on-policy stages keep beside weights: coefficients that controllers move, running statistics and
baselines, averages of the weights, supervised rows, refilled batches.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlhf.run.rundir import RunDir
from rlhf.train.signals import StopRequest

pytestmark = pytest.mark.pipeline
MEASURED = ("time", "speed/")
ADAPTIVE = {"coef": 0.1, "controller": {"name": "adaptive", "target": 2.0, "horizon": 100}}
SUPERVISED = {"coef": 0.5, "data": {"path": "DATA/sft.jsonl", "max_length": 96}}
EVERYTHING = {
    "kl": ADAPTIVE,
    "scores.normalise": "running",
    "ema": {"decay": 0.5},
    "pretraining": SUPERVISED,
    "train.lr": 2e-3,
    "critic.lr": 2e-3,
}
VOWELS = [{"kind": "format", "pattern": "[aeiou]{2}"}]
REFILLS = {"train.max_refills": 2, "train.answers": 2, "train.lr": 2e-3, "rewards": VOWELS}

RUNS = {
    "everything": ("ppo", EVERYTHING),
    "warm-up": ("ppo", {"critic.warmup_rollouts": 1, "train.target_kl": 1e-4, "train.lr": 2e-3, "guards": {
        "length_drift": {"threshold": 1.01}, "explained_variance": {"rollouts": 2}}}),
    "penalty": ("ppo", {"policy_loss": {"name": "ppo_penalty", "target": 1e-9}, "train.lr": 2e-3}),
    "baseline": ("grpo", {"advantage": {"name": "reinforce", "decay": 0.5}, "policy_loss": {"name": "ppo_clip"},
                          "train.answers": 1, "train.lr": 2e-3, "test_rewards": [{"kind": "length"}]}),
    "greedy": ("grpo", {"advantage": {"name": "remax"}, "train.answers": 2, "train.lr": 2e-3,
                        "train.prompts": 48, "train.minibatches": 1, "train.micro_batch": "auto"}),
    "refills": ("grpo", REFILLS),
}  # fmt: skip


def words(tiny, values: dict) -> list[str]:
    text = json.dumps(values).replace("DATA", str(tiny.data))
    return [word for key, value in json.loads(text).items() for word in ("--set", f"{key}={json.dumps(value)}")]


def comparable(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.startswith(MEASURED)} for row in rows]


def interrupted(finished: Path, folder: Path, step: int) -> None:
    """The stage as it was left by a machine that went down in the step after next: its logs go on, its checkpoint not.

    finished: the same run, with a checkpoint of every step.
    """
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("model", "critic", "ema", "MANIFEST.json"))
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    name = f"step-{step:06d}"
    shutil.copytree(finished / "checkpoints" / name, folder / "checkpoints" / name)
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps({**status, "state": "running", "step": step + 1}))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(cli, tiny, name):
    stage, values = RUNS[name]
    options = [*words(tiny, values), "--set", "train.rollouts=3", "--set", "checkpoint={every: 1, keep: 3}"]
    straight, resumed = f"exact-{name}", f"exact-{name}-resumed"
    done = cli(*tiny.command(stage, "--name", straight, *options))
    assert done.code == 0, done.err
    interrupted(tiny.root / straight, tiny.root / resumed, step=1)
    done = cli(*tiny.command(stage, "--name", resumed, *options))
    assert done.code == 0, done.err
    rows = tiny.rows(straight)
    assert comparable(tiny.rows(resumed)) == comparable(rows) and len(rows) == 3
    parts = ["model", *(["critic"] if stage == "ppo" else []), *(["ema"] if "ema" in values else [])]
    for part in parts:
        one, two = (tiny.root / run / part / "model.safetensors" for run in (straight, resumed))
        assert one.read_bytes() == two.read_bytes(), part
    states = [
        json.loads((tiny.root / straight / "checkpoints" / f"step-00000{i}" / "state.json").read_text()) for i in (1, 2)
    ]
    assert states[0] != states[1] or name in ("greedy", "refills"), "nothing to remember"


def test_dropout_is_drawn_again_as_it_was(cli, tiny):
    options = ["--set", "model.lora={rank: 4, dropout: 0.2}", "--set", "model.dropout=true", "--set", "train.steps=4"]
    options += ["--set", "checkpoint={every: 1, keep: 4}"]
    done = cli(*tiny.command("sft", "--name", "dropout", *options))
    assert done.code == 0, done.err
    for step in (1, 3):
        again = f"dropout-{step}"
        interrupted(tiny.root / "dropout", tiny.root / again, step)
        done = cli(*tiny.command("sft", "--name", again, *options))
        assert done.code == 0, done.err
        assert comparable(tiny.rows(again)) == comparable(tiny.rows("dropout")), step
        one, two = (tiny.root / run / "model" / "model.safetensors" for run in ("dropout", again))
        assert one.read_bytes() == two.read_bytes(), step


# --- on several ranks -------------------------------------------------------------------------------------------------


def on_two_ranks(two_ranks, tiny, stage: str, name: str, options: list[str]) -> None:
    """A stage on two ranks, without the launcher."""
    from rlhf.cli.prepare import prepare
    from rlhf.train.worker import run

    sets = [word for word in options if word != "--set"]

    def body(rank: int) -> bool:
        recipe = tiny.recipes / f"{stage}.yaml"
        job, _ = prepare(stage, recipe, RunDir(tiny.root), name=name, overrides=sets, world_size=2, allowed_code=[])
        return run(job, StopRequest())

    assert two_ranks(body) == [False, False]


def sharded(level: int) -> dict:
    """Every model of PPO or GRPO under ZeRO-`level`, the smallest parameter too."""
    block = {"stage": level, "persistence_threshold": 0, "bucket_size": 1000}
    return {"zero": block, "reference.zero": block}


@pytest.fixture(scope="module")
def alone(cli, tiny) -> dict[str, str]:
    """The stages that one rank has run, by name."""
    made = {}
    for name in ("everything", "refills"):
        stage, values = RUNS[name]
        made[name] = f"alone-{name}"
        done = cli(*tiny.command(stage, "--name", made[name], *words(tiny, values)))
        assert done.code == 0, done.err
    return made


@pytest.mark.distributed
@pytest.mark.parametrize("level", [0, 3])
@pytest.mark.parametrize("name", ["everything", "refills"])
def test_two_ranks_learn_what_one_rank_learns(tiny, alone, two_ranks, name, level):
    from safetensors.torch import load_file

    stage, values = RUNS[name]
    zero = sharded(level)
    more = {"critic.zero": zero["zero"], "rewards": [{"kind": "model", "from": "rm", "zero": zero["zero"]}]}
    folder = f"two-{name}-{level}"
    on_two_ranks(two_ranks, tiny, stage, folder, words(tiny, {**values, **zero, **(more if stage == "ppo" else {})}))
    one, two = tiny.rows(alone[name]), tiny.rows(folder)
    assert len(one) == len(two) == 2
    for expected, found in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        for metric, value in expected.items():
            if not metric.startswith(MEASURED):
                assert found[metric] == pytest.approx(value, rel=1e-4, abs=1e-5), (metric, expected["step"])
    for part in ("model", "critic", "ema") if stage == "ppo" else ("model",):
        weights = [load_file(tiny.root / run / part / "model.safetensors") for run in (alone[name], folder)]
        assert weights[0].keys() == weights[1].keys()
        for key, value in weights[0].items():
            assert (value - weights[1][key]).abs().max() < 1e-4, (part, key)
