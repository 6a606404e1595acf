"""Opening a stage, what it records about itself, and publishing its result."""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import (
    BusyError,
    CheckpointError,
    DataError,
    NumericsError,
    RecipeError,
    ServiceError,
    StoppedError,
    UnsafeError,
)
from rlhf.run import commit
from rlhf.run.lineage import Parent, content_hash
from rlhf.run.rundir import RunDir
from rlhf.run.stage import StageDir

ROOT = Path(__file__).parents[2]
INPUTS: dict[str, Any] = {
    "stage": "sft",
    "recipe": {"train": {"lr": 1e-6, "betas": (0.9, 0.95)}, "data": {"path": "x.jsonl"}},
    "parents": {},
    "data": {"x.jsonl": "f00d"},
}


def changed(**train: object) -> dict[str, Any]:
    return {**INPUTS, "recipe": {**INPUTS["recipe"], "train": {**INPUTS["recipe"]["train"], **train}}}


@pytest.fixture
def stage(tmp_path: Path) -> StageDir:
    return RunDir(tmp_path / "läufe 1" / "hh").stage("sft")


def publish(stage: StageDir, content: str = "weights") -> dict[str, Any]:
    folder = stage.export_dir("model")
    (folder / "config.json").write_text("{}")
    (folder / "weights.bin").write_text(content)
    return stage.publish("policy", {"eos": [2], "head": None}, 10)


def checkpoint(stage: StageDir, step: int) -> None:
    temporary = commit.fresh_temporary(stage.checkpoint(step))
    (temporary / "w").write_text(str(step))
    commit.commit_dir(temporary, stage.checkpoint(step), {"step": step})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_a_stage_is_new_then_resumed_then_finished(stage: StageDir) -> None:
    with stage.open(INPUTS) as opened:
        assert (opened.mode, opened.checkpoint) == ("new", None)
        assert stage.read_status()["state"] == "running"
        commit.append_jsonl(stage.metrics, {"step": 1})
        commit.append_jsonl(stage.samples, {"step": 0})
    with stage.open(INPUTS) as opened:
        assert (opened.mode, opened.checkpoint) == ("new", None)  # nothing was saved: the same work begins again
        opened.stage.cut_logs(0)
        assert commit.read_jsonl(stage.metrics) == [] == commit.read_jsonl(stage.samples)
        checkpoint(stage, 100)
        (stage.checkpoints / ".tmp-step-000200").mkdir()
    with stage.open(INPUTS) as opened:
        assert (opened.mode, opened.checkpoint) == ("resume", stage.checkpoints / "step-000100")
        assert [p.name for p in stage.checkpoints.iterdir()] == ["step-000100"]
        publish(stage)
    before = tree(stage.path)
    with stage.open(INPUTS) as opened:
        assert opened.mode == "finished"
    assert tree(stage.path) == before


def test_logs_are_cut_to_the_checkpoint(stage: StageDir) -> None:
    with stage.open(INPUTS):
        for step in range(5):
            commit.append_jsonl(stage.samples, {"step": step})
            commit.append_jsonl(stage.metrics, {"step": step + 1})
        stage.cut_logs(2)
        assert [row["step"] for row in commit.read_jsonl(stage.metrics)] == [1, 2]
        assert [row["step"] for row in commit.read_jsonl(stage.samples)] == [0, 1, 2]


@pytest.mark.parametrize("finished", [False, True])
def test_other_inputs_are_refused_with_both_values_and_a_way_out(stage: StageDir, finished: bool) -> None:
    with stage.open(INPUTS):
        if finished:
            publish(stage)
    before = tree(stage.path)
    with pytest.raises(RecipeError) as caught:
        stage.open(changed(lr=1e-5))
    text = str(caught.value)
    assert caught.value.exit_code == 2 and str(stage.path) in text
    assert "train.lr: 1e-06 before, 1e-05 now" in text and "--name" in text and "--restart" in text
    assert tree(stage.path) == before and stage.holder() is None


def test_many_differences_are_counted(stage: StageDir) -> None:
    stage.open(INPUTS).close()
    with pytest.raises(RecipeError, match="and 4 more"):
        stage.open(changed(**{f"key{i}": i for i in range(12)}))


def test_restart_sets_the_old_folder_aside(stage: StageDir) -> None:
    for attempt in (1, 2):
        with stage.open(changed(attempt=attempt), restart=True) as opened:
            assert opened.mode == "new"
            publish(stage, f"weights {attempt}")
    with stage.open(INPUTS, restart=True) as opened:
        assert opened.mode == "new" and not stage.is_finished()
    old = [stage.root / "sft.old-1", stage.root / "sft.old-2"]
    assert [(p / "model" / "weights.bin").read_text() for p in old] == ["weights 1", "weights 2"]
    assert [s.name for s in RunDir(stage.root).stages()] == ["sft"]


def test_names_with_a_meaning_of_their_own_are_not_opened(stage: StageDir) -> None:
    for name in ("report", "sft.old-1"):
        with pytest.raises(RecipeError, match="--name"):
            RunDir(stage.root).stage(name).open(INPUTS)
    assert not stage.root.exists()


def test_a_folder_of_somebody_else_is_not_touched(stage: StageDir) -> None:
    stage.path.mkdir(parents=True)
    (stage.path / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="thesis.tex"):
        stage.open(INPUTS)
    assert tree(stage.path) == {"thesis.tex": b"x"} and stage.holder() is None


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"inputs"'])
def test_without_recorded_inputs_nothing_is_guessed(stage: StageDir, content: str) -> None:
    stage.open(INPUTS).close()
    stage.provenance.write_text(content)
    with pytest.raises(CheckpointError, match="--restart"):
        stage.open(INPUTS)
    assert stage.open(INPUTS, restart=True).mode == "new"


def test_only_damaged_checkpoints_do_not_begin_again(stage: StageDir) -> None:
    with stage.open(INPUTS):
        checkpoint(stage, 100)
    (stage.checkpoints / "step-000100" / "w").unlink()
    with pytest.raises(CheckpointError, match="--restart"):
        stage.open(INPUTS)


def test_a_finished_stage_whose_files_changed_is_not_finished(stage: StageDir) -> None:
    with stage.open(INPUTS):
        publish(stage)
    (stage.model / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json"):
        stage.open(INPUTS)


# ---- one writer ------------------------------------------------------------------------------------------------------

OPEN = """
import json, os, sys, time
from rlhf.errors import UserError
from rlhf.run.rundir import RunDir
inputs, launcher = json.loads(sys.argv[2]), int(sys.argv[3]) or None
try:
    opened = RunDir(sys.argv[1]).stage("sft").open(inputs, launcher=launcher)
except UserError as error:
    print(error)
    sys.exit(error.exit_code)
print(opened.mode, flush=True)
time.sleep(60 if launcher else 0)
"""


def opener(stage: StageDir, launcher: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OPEN, str(stage.root), json.dumps(INPUTS), str(launcher)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_second_process_on_the_same_stage_exits_6(stage: StageDir) -> None:
    with stage.open(INPUTS):
        before = tree(stage.root)
        other = opener(stage)
        out, _ = other.communicate(timeout=20)
        assert other.returncode == 6
        assert f"process {os.getpid()} on " in out and " since " in out and "--name" in out
        assert tree(stage.root) == before
    other = opener(stage)
    out, _ = other.communicate(timeout=20)
    assert (other.returncode, out) == (0, "new\n")


def test_a_rank_works_under_its_launcher_and_outlives_it_visibly(stage: StageDir) -> None:
    opened = stage.open(INPUTS)
    with opener(stage, launcher=os.getpid()) as rank:
        assert rank.stdout is not None and rank.stdout.readline() == "new\n"
        opened.close()  # as if this process had been killed
        holder = stage.holder()
        assert holder is not None and holder["pid"] == rank.pid
        with pytest.raises(BusyError, match=f"process {rank.pid} .* still ending"):
            stage.open(INPUTS)
        rank.send_signal(signal.SIGKILL)
    stage.open(INPUTS).close()


def test_a_rank_is_refused_where_its_launcher_does_not_hold_the_stage(stage: StageDir) -> None:
    stage.open(INPUTS).close()
    with pytest.raises(BusyError, match="found nobody"):
        stage.open(INPUTS, launcher=os.getpid())
    with stage.open(INPUTS), pytest.raises(BusyError, match="expected to be held by process 1"):
        stage.open(INPUTS, launcher=1)


def test_a_rank_never_restarts_what_its_launcher_has_restarted(stage: StageDir) -> None:
    with stage.open(INPUTS, restart=True):
        stage.open(INPUTS, restart=True, launcher=os.getpid()).close()
    assert not (stage.root / "sft.old-1").exists()


# ---- how it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (NumericsError("loss is nan", where="step 3", fix="Lower it."), "failed", "step 3: loss is nan"),
        (StoppedError("stopped on request after step 3"), "stopped", "stopped on request after step 3"),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (ValueError(), "failed", "ValueError"),
        (SystemExit(10), "failed", "exit code 10"),
        (SystemExit(75), "stopped", "exit code 75"),
    ],
)
def test_an_error_is_recorded_as_the_end(stage: StageDir, error: BaseException, state: str, reason: str) -> None:
    with pytest.raises(type(error)), stage.open(INPUTS):
        stage.write_status(step=3)
        raise error
    status = stage.read_status()
    assert (status["state"], status["exit_reason"]) == (state, reason) and status["ended"] >= status["started"]
    with stage.open(INPUTS):
        status = stage.read_status()
        assert (status["state"], status["exit_reason"], status["ended"]) == ("running", None, None)


@pytest.mark.parametrize(
    "error",
    [DataError("no rows"), ServiceError("no network"), StoppedError("asked"), SystemExit(3), KeyboardInterrupt()],
)
def test_a_false_start_leaves_nothing(stage: StageDir, error: BaseException) -> None:
    with pytest.raises(type(error)), stage.open(INPUTS):
        raise error
    assert not stage.path.exists()
    with stage.open({**INPUTS, "stage": "ppo"}) as opened:
        assert opened.mode == "new"


def test_a_mistake_under_restart_gives_the_old_folder_back(stage: StageDir) -> None:
    with pytest.raises(ValueError), stage.open(INPUTS):
        raise ValueError("the first try")
    before = stage.status.read_text()
    with pytest.raises(DataError), stage.open(INPUTS, restart=True):
        assert stage.read_status()["state"] == "running"
        raise DataError("no rows")
    assert stage.status.read_text() == before
    assert [path.name for path in stage.root.iterdir() if path.is_dir()] == [stage.name]


def test_a_mistake_after_the_first_step_or_on_resuming_keeps_the_folder(stage: StageDir) -> None:
    with pytest.raises(DataError), stage.open(INPUTS):
        stage.write_status(step=1)
        raise DataError("a bad row")
    assert stage.read_status()["state"] == "failed"
    with pytest.raises(DataError), stage.open(INPUTS):
        raise DataError("a bad row")
    assert stage.read_status()["state"] == "failed"


def test_a_stage_that_is_held_is_refused_without_opening_it(stage: StageDir) -> None:
    stage.refuse_if_held()
    with stage.open(INPUTS), pytest.raises(BusyError) as error:
        StageDir(stage.root, stage.name).refuse_if_held()
    assert f"process {os.getpid()}" in str(error.value) and "--name" in str(error.value)


def test_an_error_after_the_end_changes_nothing(stage: StageDir) -> None:
    with pytest.raises(ValueError), stage.open(INPUTS):
        publish(stage)
        raise ValueError("in the report")
    assert stage.read_status()["state"] == "finished"


# ---- records ---------------------------------------------------------------------------------------------------------


def test_provenance_keeps_inputs_and_earlier_invocations(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    parent = Parent(stage.root / "base", {"kind": "policy", "files": {}}, "beef")
    data = [{"path": "https://u:p@host/x.jsonl", "fingerprint": "f00d", "rows": 3}]
    with stage.open(INPUTS):
        stage.write_provenance(devices=["cpu"], seed=1, parents=[parent], data=data)
        stage.write_provenance(devices=["cpu", "cpu"], seed=1, parents=[parent], data=data)
    facts = commit.read_json(stage.provenance)
    assert facts["inputs"]["recipe"]["train"] == {"lr": 1e-6, "betas": [0.9, 0.95]}
    assert facts["devices"] == ["cpu", "cpu"] and [e["devices"] for e in facts["earlier"]] == [["cpu"]]
    assert facts["parents"] == [{"stage": "base", "path": "base", "kind": "policy", "content_hash": "beef"}]
    assert facts["data"][0]["path"] == "https://***@host/x.jsonl" and facts["seed"] == 1
    assert "hf_canary" not in stage.provenance.read_text()
    assert stage.open(INPUTS).mode == "new"


def test_recipe_files(stage: StageDir) -> None:
    with stage.open(INPUTS):
        stage.write_recipe("train: {}  # ü\n", "train: {lr: 1}\n")
    assert stage.recipe.read_text(encoding="utf-8") == "train: {}  # ü\n"
    assert stage.resolved.read_text() == "train: {lr: 1}\n"


def test_status_is_merged_and_strict(stage: StageDir) -> None:
    with stage.open(INPUTS):
        stage.write_status(step=3, total_steps=9, key_metric={"name": "train/loss", "value": float("nan")})
        status = stage.read_status()
        assert (status["state"], status["stage"], status["step"], status["total_steps"]) == ("running", "sft", 3, 9)
        assert status["key_metric"] == {"name": "train/loss", "value": None} and status["heartbeat"] > 1e9
        with pytest.raises(AssertionError):
            stage.write_status(stat="running")
        with pytest.raises(AssertionError):
            stage.write_status(state="dancing")


@pytest.mark.parametrize(
    "content",
    ["", "[1]", "{}", '{"state": 7, "step": "x", "key_metric": {"name": 1}, "started": "now"}', '{"state": "odd"}'],
)
def test_a_damaged_status_reads_as_unknown_and_is_written_anew(stage: StageDir, content: str) -> None:
    with stage.open(INPUTS):
        stage.status.write_text(content)
        status = stage.read_status()
        assert (status["state"], status["step"], status["key_metric"], status["started"]) == ("unknown", 0, None, None)
        assert RunDir(stage.root).describe()[0].state == "unknown"
        stage.write_status(state="running", step=4)
        assert stage.read_status()["step"] == 4


def test_the_log_is_appended_with_tracebacks(stage: StageDir) -> None:
    logger = logging.Logger("rlhf.test")
    with stage.open(INPUTS):
        for number in (1, 2):
            handler = stage.log_handler()
            logger.addHandler(handler)
            try:
                raise ValueError(f"number {number} \udcff")
            except ValueError:
                logger.exception("it failed")
            logger.removeHandler(handler)
            handler.close()
    text = stage.log.read_text(encoding="utf-8")
    assert text.count("Traceback") == 2 and "number 2" in text and "ERROR rlhf.test: it failed" in text


# ---- publishing ------------------------------------------------------------------------------------------------------


def test_a_published_stage_lists_every_file(stage: StageDir) -> None:
    with stage.open(INPUTS):
        (stage.export_dir("critic") / "critic.bin").write_text("c")
        manifest = publish(stage)
    assert manifest == stage.read_manifest(hash_limit=None)
    assert (manifest["kind"], manifest["stage"], manifest["name"], manifest["log_end"]) == ("policy", "sft", "sft", 10)
    assert manifest["facts"] == {"eos": [2], "head": None}
    assert set(manifest["files"]) == {"model/config.json", "model/weights.bin", "critic/critic.bin"}
    assert stage.read_status()["state"] == "finished" and stage.is_finished()
    assert not list(stage.path.glob(".tmp-*"))


def test_plain_files_of_the_folder_can_be_the_result(stage: StageDir) -> None:
    with stage.open(INPUTS):
        stage.pairs.write_text("{}\n")
        manifest = stage.publish("data", {"pairs": 1}, 3, plain_files=[stage.pairs])
    digest = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    assert manifest["files"] == {"pairs.jsonl": {"size": 3, "sha256": digest}}
    assert stage.describe().kind == "data" and not stage.model.exists()
    stage.pairs.write_text("[]\n")
    with pytest.raises(CheckpointError, match=r"pairs.jsonl: expected the content that was written"):
        stage.read_manifest()


def test_equal_results_have_equal_content_hashes(tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        with RunDir(tmp_path).stage(name).open(INPUTS) as opened:
            manifests.append(publish(opened.stage))
    assert content_hash(manifests[0]) == content_hash(manifests[1])


def test_nothing_is_published_twice_or_empty(stage: StageDir) -> None:
    with stage.open(INPUTS):
        with pytest.raises(AssertionError):
            stage.publish("policy", {}, 1)
        publish(stage)
        with pytest.raises(AssertionError):
            publish(stage)


def test_a_crash_at_any_moment_of_publishing_leaves_all_or_nothing(
    tmp_path: Path, dies_before: Callable[[int, Callable[[], object]], bool]
) -> None:
    finished = set()
    for operation in itertools.count(1):
        stage = RunDir(tmp_path).stage(f"sft-{operation}")

        def action(stage: StageDir = stage) -> None:
            with stage.open(INPUTS) as opened:
                if opened.mode != "finished":
                    publish(stage)

        died = dies_before(operation, action)
        finished.add(stage.is_finished())
        if stage.is_finished():
            stage.read_manifest(hash_limit=None)
        action()
        stage.read_manifest(hash_limit=None)
        assert stage.describe().state == "finished" and not list(stage.path.glob(".tmp-*"))
        if not died:
            break
    assert finished == {False, True} and operation > 20


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "checkpoints", "model", "status.json", ".tmp-model"])
def test_nothing_of_a_stage_lies_elsewhere(tmp_path: Path, name: str) -> None:
    run = RunDir(tmp_path / "run")
    with run.stage("sft").open(INPUTS):
        pass
    path = run.stage("sft").path / name
    path.unlink(missing_ok=True)
    path.symlink_to(tmp_path)
    with pytest.raises(UnsafeError, match="found a symbolic link"):
        run.stage("sft").open(INPUTS)
    assert run.stage("sft").holder() is None
