"""Names, the state of a run, and finding a parent."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.errors import CheckpointError, RecipeError, UnsafeError
from rlhf.run import commit
from rlhf.run.lineage import content_hash
from rlhf.run.rundir import RunDir, resolve_parent
from rlhf.run.stage import StageDir


def make(run: RunDir, name: str, kind: str = "policy", command: str = "sft", *parents: str) -> StageDir:
    """A published stage."""
    stage = run.stage(name)
    inputs: dict[str, Any] = {"stage": command, "recipe": {}, "parents": list(parents), "data": {}}
    with stage.open(inputs):
        found = [resolve_parent(parent, run, ("policy", "reward"), "model", "x.yaml") for parent in parents]
        stage.write_provenance(devices=["cpu"], seed=0, parents=found, data=[])
        (stage.export_dir("model") / "weights.bin").write_text(name)
        stage.write_status(step=5, total_steps=5, key_metric={"name": "train/loss", "value": 0.5})
        stage.publish(kind, {}, 5)
    return stage


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "läufe 1" / "hh")


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "ppo-kl0.02", "dpo_b0.05", "A", "7", "x" * 100])
def test_good_names(run: RunDir, name: str) -> None:
    stage = run.stage(name)
    assert stage.path == run.root / name and not run.root.exists()


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "/abs", "../x", "a\\b", "a b", "a\0b", "~", "ä", "a\n", "x" * 101, "*"]
)
def test_names_that_could_lead_elsewhere_are_refused(run: RunDir, name: str) -> None:
    with pytest.raises(UnsafeError) as caught:
        run.stage(name)
    assert caught.value.exit_code == 9 and "--name" in str(caught.value)


def test_a_linked_stage_folder_is_refused(run: RunDir, tmp_path: Path) -> None:
    run.root.mkdir(parents=True)
    (run.root / "sft").symlink_to(tmp_path)
    with pytest.raises(UnsafeError, match="symbolic link"):
        run.stage("sft")
    assert run.stages() == []


def test_a_linked_run_directory_is_refused(run: RunDir, tmp_path: Path) -> None:
    run.root.mkdir(parents=True)
    (tmp_path / "link").symlink_to(run.root)
    with pytest.raises(UnsafeError, match="expected a folder, found a symbolic link"):
        RunDir(tmp_path / "link")
    (tmp_path / "parent").symlink_to(run.root.parent)  # where a run directory lies is the user's to arrange
    RunDir(tmp_path / "parent" / run.root.name).stage("sft")


def test_a_hostile_manifest_of_a_parent_is_unsafe_not_just_damaged(run: RunDir) -> None:
    sft = make(run, "sft")
    found = json.loads(sft.manifest.read_text())
    found["files"]["../x"] = {"size": 1, "sha256": "0"}
    sft.manifest.write_text(json.dumps(found))
    with pytest.raises(UnsafeError, match="expected file names inside the folder") as caught:
        resolve_parent("sft", run, ("policy",), "model.from", "ppo.yaml")
    assert str(caught.value).startswith("ppo.yaml: model.from: ")


def test_a_run_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="--run"):
        RunDir(tmp_path / "file")


def test_every_path_of_a_stage_is_below_it(run: RunDir) -> None:
    stage = run.stage("sft")
    below = [stage.recipe, stage.resolved, stage.status, stage.provenance, stage.metrics, stage.samples, stage.log]
    below += [stage.checkpoints, stage.model, stage.critic, stage.manifest]
    assert all(path.parent == stage.path for path in below) and len(set(below)) == 11
    assert stage.checkpoint(100) == stage.checkpoints / "step-000100"
    assert stage.lock.parent == stage.writer_lock.parent == run.root


# ---- describe --------------------------------------------------------------------------------------------------------


def test_a_run_describes_its_stages(run: RunDir) -> None:
    assert run.stages() == [] and run.describe() == []
    make(run, "sft")
    make(run, "rm", "reward", "rm", "sft")
    (run.root / "report").mkdir()
    (run.root / "notes").mkdir()
    (run.root / "readme.txt").write_text("x")
    sft, rm = run.describe()
    assert (sft.name, sft.stage, sft.kind, sft.state, sft.parents) == ("sft", "sft", "policy", "finished", [])
    assert (sft.step, sft.total_steps, sft.key_metric) == (5, 5, ("train/loss", 0.5))
    assert (rm.name, rm.kind, rm.parents, rm.stale) == ("rm", "reward", ["sft"], [])


def test_states(run: RunDir) -> None:
    stage = run.stage("sft")
    with stage.open({"stage": "sft"}):
        assert stage.describe().state == "running"
    assert stage.describe().state == "interrupted"
    stage.write_status(state="failed", exit_reason="out of luck")
    assert (stage.describe().state, stage.describe().reason) == ("failed", "out of luck")
    stage.write_status(state="finished")
    assert stage.describe().state == "damaged"
    stage.status.unlink()
    assert stage.describe().state == "unknown"
    stage.manifest.write_text("{")
    assert stage.describe().state == "damaged"


def test_the_manifest_decides_not_the_status(run: RunDir) -> None:
    stage = make(run, "sft")
    stage.status.write_text("")
    assert stage.describe().state == "finished"
    (stage.model / "weights.bin").write_text("longer than before")
    summary = stage.describe()
    assert summary.state == "damaged" and "weights.bin" in str(summary.reason)


def test_a_parent_made_again_makes_its_children_stale(run: RunDir) -> None:
    make(run, "sft")
    child = make(run, "dpo", "policy", "dpo", "sft")
    with run.stage("sft").open({"stage": "sft"}, restart=True) as opened:
        assert child.describe().stale == ["sft"]
        (opened.stage.export_dir("model") / "weights.bin").write_text("other")
        opened.stage.publish("policy", {}, 5)
    assert child.describe().stale == ["sft"] and child.describe().state == "finished"


# ---- parents ---------------------------------------------------------------------------------------------------------


def refused(run: RunDir, ref: str, *kinds: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        resolve_parent(ref, run, kinds or ("policy",), "model.from", "ppo.yaml")
    text = str(caught.value)
    assert caught.value.exit_code == 4 and text.startswith("ppo.yaml: model.from: ")
    return text


def test_a_sibling_and_a_stage_of_another_run(run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft = make(run, "sft")
    for ref, home in (("sft", run), ("sft/", run), (str(sft.path), RunDir(tmp_path / "new"))):
        parent = resolve_parent(ref, home, ("policy",), "model.from", "ppo.yaml")
        assert parent.path == sft.path and parent.kind == "policy" and parent.model == sft.model
        assert parent.content_hash == content_hash(sft.read_manifest())
    monkeypatch.chdir(run.root.parent)
    assert resolve_parent("hh/sft", RunDir("new"), ("policy",), "model.from", "x").path == Path("hh/sft")


def test_a_missing_parent_names_the_command_that_makes_it(run: RunDir) -> None:
    text = refused(run, "sft")
    assert f"found no folder {run.root / 'sft'}" in text and f"rlhf sft RECIPE --run '{run.root}'" in text
    assert "rlhf rm RECIPE" in refused(run, "judge", "reward") and "--name judge" in refused(run, "judge", "reward")
    (run.root / "notes").mkdir(parents=True)
    assert "no stage folder" in refused(run, "notes")


def test_an_unfinished_parent_is_refused_with_its_state(run: RunDir) -> None:
    stage = run.stage("base")
    with stage.open({"stage": "sft"}):
        stage.write_status(step=3, total_steps=9)
        text = refused(run, "base")
        assert "running at step 3 of 9" in text and "rlhf sft RECIPE" in text and "--name base" in text
    assert "interrupted at step 3 of 9" in refused(run, "base")


def test_a_parent_of_the_wrong_kind_is_refused_with_those_that_fit(run: RunDir, tmp_path: Path) -> None:
    make(run, "rm", "reward", "rm")
    text = refused(run, "rm")
    assert "expected a policy, found a reward model in" in text and "rlhf sft RECIPE" in text
    make(run, "sft")
    make(run, "dpo", "policy", "dpo")
    assert "Name one of: sft, dpo." in refused(run, "rm")
    assert f"Name one of: {run.root / 'rm'}." in refused(RunDir(tmp_path / "new"), str(run.root / "sft"), "reward")


@pytest.mark.parametrize("change", ["cut", "same size", "gone", "extra", "manifest", "kind"])
def test_a_changed_parent_is_refused(run: RunDir, change: str) -> None:
    stage = make(run, "sft")
    weights = stage.model / "weights.bin"
    if change in ("cut", "same size"):
        weights.write_text("sf" if change == "cut" else "SFT")
    elif change == "gone":
        weights.unlink()
    elif change == "extra":
        (stage.model / "adapter_config.json").write_text("{}")
    elif change == "manifest":
        stage.manifest.write_text("{")
    else:
        commit.write_json(stage.manifest, {**commit.read_json(stage.manifest), "kind": None})
    text = refused(run, "sft")
    assert "as it was published" in text and "--restart" in text


@pytest.mark.parametrize("ref", ["..", ".", "runs/..", "", "a b", "runs/other/.hidden"])
def test_a_parent_name_that_leads_elsewhere_is_refused(run: RunDir, ref: str) -> None:
    with pytest.raises(UnsafeError):
        resolve_parent(ref, run, ("policy",), "model.from", "ppo.yaml")
