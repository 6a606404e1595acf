"""The command line as a promise: its commands and options, what goes to which stream, exit codes, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import rlhf
from rlhf import errors
from rlhf.cli.app import STAGES, app

STAGE = (
    "recipe --run --name --set --dry-run --gpus --num-nodes --hostfile --restart --allow-code --allow-foreign"
    " --trust-code --watchdog --rank-timeout"
)
COMMANDS = {
    "sft": STAGE,
    "rm": STAGE,
    "ppo": STAGE,
    "grpo": STAGE,
    "dpo": STAGE,
    "label": STAGE,
    "merge": STAGE,
    "reward-model": STAGE,
    "run": "pipeline --run --set --dry-run --gpus --num-nodes --hostfile --allow-code --allow-foreign"
    " --trust-code --watchdog --rank-timeout",
    "status": "run --json",
    "show": "recipe -n/--count --stage --run --set",
    "losses": "--json",
    "data": "recipe --stage --run --set --reward --json",
    "explain": "key --stage",
    "schema": "stage",
    "eval demo": "run",
    "eval implicit-reward": "run --data --policy --reference --reward --beta --tokens --json",
    "report": "run",
    "doctor": "--run --selftest --json",
}
EXIT_CODES = {
    "UserError": 1,
    "RecipeError": 2,
    "DataError": 3,
    "CheckpointError": 4,
    "NumericsError": 5,
    "NotFiniteError": 5,
    "BusyError": 6,
    "ResourceError": 7,
    "NoRoomError": 7,
    "FailingDiskError": 7,
    "ServiceError": 8,
    "UnsafeError": 9,
    "WorkerLostError": 10,
    "StoppedError": 75,
}


def words(command) -> str:
    """A command's arguments and options in order."""
    return " ".join(p.name if p.param_type_name == "argument" else "/".join(p.opts) for p in command.params)


def leaves(group, name: str = "") -> dict[str, str]:
    """Every command below a group, by all the words that call it."""
    found = {}
    for word, command in group.commands.items():
        below = leaves(command, f"{name}{word} ") if hasattr(command, "commands") else {f"{name}{word}": words(command)}
        found |= below
    return found


def test_commands_and_options_are_frozen():
    assert leaves(get_command(app)) == COMMANDS


def test_every_stage_has_identical_options():
    commands = get_command(app).commands
    helps = {name: [(p.name, p.opts, p.required, p.default) for p in commands[name].params] for name in STAGES}
    assert all(options == helps["sft"] for options in helps.values())


def test_exit_codes_are_frozen():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    assert {kind.__name__: kind.exit_code for kind in kinds} == EXIT_CODES


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_needs_no_torch(cold_cli, command):
    done = cold_cli(*command.split(), "--help")
    assert done.code == 0 and not done.torch and done.err == ""
    names = {name.split()[0] for name in COMMANDS} - {"reward-model"}
    for option in COMMANDS[command].split() if command else names:
        assert option.split("/")[-1] in done.out


def test_version(cold_cli):
    done = cold_cli("--version")
    assert (done.code, done.out, done.err, done.torch) == (0, f"rlhf {rlhf.__version__}\n", "", False)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ([], "Usage: rlhf"),
        (["nonsense"], "No such command 'nonsense'"),
        (["sft"], "Missing argument 'recipe'"),
        (["sft", "x.yaml"], "Missing option '--run'"),
        (["sft", "x.yaml", "--run", "x", "--lr", "1"], "No such option: --lr"),
        (["sft", "x.yaml", "--run", "x", "--gpus", "0"], "Invalid value for '--gpus'"),
        (
            ["sft", "no-such.yaml", "--run", "x"],
            "error: no-such.yaml: expected a YAML file, found nothing\n  it is looked",
        ),
        (["sft", "recipes/demo/stf.yaml", "--run", "x"], "did you mean recipes/demo/sft.yaml?"),
        (["sft", "recipes/demo", "--run", "x"], "expected a YAML file, found a folder"),
        (["run", "no-such.yaml", "--run", "x"], "expected a YAML file, found nothing"),
        (["show", "recipes/demo/pipeline.yaml"], "--stage sft | rm | ppo | grpo | dpo | label"),
        (["schema", "stf"], "expected one of sft, rm, ppo, grpo, dpo, label, merge, found 'stf'"),
        (["eval", "runs/demo"], "No such command 'runs/demo'"),
        (["eval", "implicit-reward", "x"], "Missing option '--data'"),
        (["eval", "implicit-reward", "x", "--data", "y", "--tokens", "-1"], "Invalid value for '--tokens'"),
        (["explain", "train.lrr"], "did you mean train.lr or train.l1?"),
        (["explain", "lr", "--stage", "stf"], "expected one of sft, rm, ppo, grpo, dpo, label, merge, found 'stf'"),
    ],
)
def test_what_cannot_be_understood_exits_2_and_says_why(cold_cli, command, text):
    done = cold_cli(*command)
    assert done.code == 2 and done.out == "" and not done.torch
    assert text in done.err and "Traceback" not in done.err
    assert not Path("x").exists()


@pytest.mark.parametrize("command", ["status", "report"])
def test_what_is_no_run_directory(cold_cli, tmp_path, command):
    for path, found in ((tmp_path / "nothing", "found nothing"), (Path(__file__), "found a file")):
        done = cold_cli(command, path)
        assert done.code == 4 and found in done.err and done.out == "" and "Traceback" not in done.err


def test_an_empty_run_directory(cold_cli, tmp_path):
    done = cold_cli("status", tmp_path)
    assert done.code == 0 and done.err == ""
    assert "no stages yet" in done.out and f"next: rlhf sft RECIPE --run {tmp_path}" in done.out
    assert cold_cli("status", tmp_path, "--json").out == "[]\n"
    assert list(tmp_path.iterdir()) == []


def test_schema_and_explain_print_to_stdout(cold_cli):
    for stage in STAGES:
        done = cold_cli("schema", stage)
        assert done.code == 0 and json.loads(done.out)["title"] == f"rlhf {stage} recipe" and not done.torch
    assert "peak learning rate" in cold_cli("explain", "train.lr", "--stage", "sft").out


# --- streams, dry runs ------------------------------------------------------------------------------------------------


def test_the_result_is_on_stdout_and_the_log_on_stderr(cli, tiny):
    done = cli(*tiny.command("dpo", "--name", "streams"))
    assert done.code == 0, done.err
    folder = tiny.root / "streams"
    assert done.out.splitlines() == [f"dpo finished: {folder}/model", f"next: rlhf report {tiny.root}"]
    log = (folder / "log.txt").read_text()
    for line in done.err.splitlines():
        assert line.startswith("  > ") or line.partition(" ")[2] in log, line
    assert "parameters" in done.err and "\x1b" not in done.err


def test_a_finished_stage_answers_without_torch(cold_cli, tiny):
    before = tiny.files()
    done = cold_cli(*tiny.command("sft"))
    assert done.code == 0 and not done.torch and done.err == ""
    assert "sft was finished before with the same inputs" in done.out and "next: rlhf rm" in done.out
    assert tiny.files() == before
    alias = cold_cli("reward-model", *tiny.command("rm")[1:])
    assert alias.code == 0 and "rm was finished before" in alias.out


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "merge"])  # tests/test_merge.py
def test_a_dry_run_shows_every_default_and_writes_nothing(cold_cli, tiny, stage):
    before = tiny.files()
    change = "label.min_margin=3e-5" if stage == "label" else "train.lr=3e-5"
    done = cold_cli(*tiny.command(stage, "--name", "dry", "--set", change, "--gpus", "2", "--dry-run"))
    assert done.code == 0 and not done.torch, done.err
    assert tiny.files() == before and not (tiny.root / ".dry.lock").exists()
    resolved = yaml.safe_load(done.out)
    if stage == "label":
        assert float(resolved["label"]["min_margin"]) == 3e-5 and resolved["label"]["pairs"] == "best_worst"
    else:
        assert float(resolved["train"]["lr"]) == 3e-5 and resolved["train"]["weight_decay"] == 0.0
    assert "of 2 devices" in done.out.splitlines()[-2] + done.out.splitlines()[-1]


def test_a_dry_run_finds_what_a_run_would_find(cold_cli, tiny, tmp_path):
    broken = tmp_path / "rows.jsonl"
    broken.write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    done = cold_cli(*tiny.command("sft", "--dry-run", "--set", f"data.path={broken}"))
    assert done.code == 3 and "rows.jsonl:2" in done.err and done.out == ""


def test_a_dry_run_of_a_pipeline_needs_no_parents(cold_cli, tiny, tmp_path):
    pipeline = tmp_path / "pipeline.yaml"
    steps = [{"stage": stage, "recipe": str(tiny.recipes / f"{stage}.yaml")} for stage in ("sft", "rm", "ppo")]
    pipeline.write_text(yaml.safe_dump({"stages": steps}))
    done = cold_cli("run", pipeline, "--run", tmp_path / "run", "--dry-run")
    assert done.code == 0 and not done.torch, done.err
    assert done.out.count("sampling:") == 2 and done.err.count("$ rlhf ") == 3
    assert not (tmp_path / "run").exists()


def test_status_shows_a_reason_with_brackets_as_it_is(cold_cli, tmp_path):
    (tmp_path / "run" / "sft").mkdir(parents=True)
    reason = "rank 1: [/builder/gloo/pair.cc:537] Connection closed"
    status = {"stage": "sft", "state": "failed", "step": 1, "total_steps": 2, "exit_reason": reason}
    (tmp_path / "run" / "sft" / "status.json").write_text(json.dumps(status))
    done = cold_cli("status", tmp_path / "run")
    assert done.code == 0 and "[/builder/gloo/pair.cc:537]" in "".join(done.out.split("\n")), done.err


def test_status_of_a_run_directory(cold_cli, tiny):
    table = cold_cli("status", tiny.root)
    assert table.code == 0 and not table.torch
    assert "sft" in table.out and "finished" in table.out and "2/2" in table.out
    stages = {stage["name"]: stage for stage in json.loads(cold_cli("status", tiny.root, "--json").out)}
    assert stages["rm"]["parents"] == ["sft"] and stages["rm"]["kind"] == "reward"


def test_the_doctor_examines_without_torch_of_its_own(cold_cli, tmp_path):
    done = cold_cli("doctor", "--json", "--run", tmp_path / "run")
    found = {finding["check"]: finding for finding in json.loads(done.out)}
    assert {"packages", "devices", "launcher", "shared memory", "ports", "commit", "locks"} <= found.keys()
    assert done.code == int(any(finding["state"] == "failed" for finding in found.values())), done.out
    assert not done.torch and not any(tmp_path.iterdir())
    assert all(finding["fix"] for finding in found.values() if finding["state"] != "ok")
    assert cold_cli("doctor", "--run", Path(__file__)).code == 1
