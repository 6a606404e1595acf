"""Checkpoints of all trained engines of a stage: complete or not there, and only for the layout they were cut for."""

from __future__ import annotations

import errno
import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from rlhf.batch import Loss
from rlhf.engine.ema import Ema
from rlhf.engine.engine import Engine
from rlhf.errors import CheckpointError, NoRoomError, ResourceError
from rlhf.recipe.schema import OptimBlock, ZeroBlock
from rlhf.run import commit
from rlhf.run.disk import tree_bytes
from rlhf.run.rundir import RunDir
from rlhf.run.stage import StageDir
from rlhf.train.checkpoints import Checkpoints, Running, load_checkpoint
from rlhf.train.sound import check_published, sound_checkpoint


def engines(stage: int = 2, seed: int = 0) -> dict[str, Engine]:
    """A policy and a critic."""
    torch.manual_seed(seed)
    block = ZeroBlock(stage=stage, persistence_threshold=0)
    made = {}
    for name, width in (("policy", 4), ("critic", 1)):
        made[name] = Engine(nn.Linear(3, width), block, bf16=False, optim=OptimBlock(optimizer="adamw"))
    return made


def train(all_engines: dict[str, Engine], seed: int) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    for engine in all_engines.values():
        engine.backward(Loss({"square": (engine(inputs).pow(2).sum(), "rows", 1.0)}), {"rows": 5.0})
        engine.step(0.01)


def folder(root: Path) -> StageDir:
    stage = RunDir(root).stage("ppo")
    stage.path.mkdir(parents=True)
    return stage


def save(stage: StageDir, running: Running, step: int, keep: int) -> None:
    with Checkpoints(stage, running, keep) as checkpoints:
        checkpoints.save(step)
        checkpoints.settle()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_training_goes_on_from_a_checkpoint(forked, tmp_path, zero):
    def body():
        stage, first = folder(tmp_path), engines(zero)
        train(first, 1)
        save(stage, Running(first), 1, keep=2)
        train(first, 2)
        second = engines(zero, seed=9)
        assert load_checkpoint(commit.newest_checkpoint(stage.checkpoints), Running(second)) == 1
        train(second, 2)
        for name, engine in first.items():
            state = second[name].state_dict()
            for key, value in engine.state_dict().items():
                assert torch.equal(value, state[key]), (name, key)

    forked(body)


def test_a_checkpoint_is_sealed_and_old_ones_go(forked, tmp_path):
    def body():
        stage, both = folder(tmp_path), engines()
        for step in (3, 6, 9):
            save(stage, Running(both), step, keep=2)
        assert sorted(path.name for path in stage.checkpoints.iterdir()) == ["step-000006", "step-000009"]
        newest = commit.newest_checkpoint(stage.checkpoints)
        assert newest == stage.checkpoint(9)
        manifest = json.loads((newest / "MANIFEST.json").read_text())
        assert manifest["step"] == 9 and manifest["devices"] == 1
        assert manifest["zero_stages"] == {"policy": 2, "critic": 2}
        assert {name.split("/")[0] for name in manifest["files"]} == {"policy", "critic", "loop.json"}
        (newest / "policy" / "deepspeed" / "mp_rank_00_model_states.pt").write_bytes(b"cut short")
        assert commit.newest_checkpoint(stage.checkpoints) == stage.checkpoint(6)

    forked(body)


def test_training_goes_on_while_the_disk_takes_a_checkpoint_in(forked, tmp_path, monkeypatch):
    gate, complete = threading.Event(), commit.commit_dir

    def slow(*arguments):
        assert gate.wait(20)
        complete(*arguments)

    def body():
        stage, both = folder(tmp_path), engines()
        save(stage, Running(both), 1, keep=1)
        saved = both["policy"].state_dict()
        monkeypatch.setattr(commit, "commit_dir", slow)
        with Checkpoints(stage, Running(both), 1) as checkpoints:
            checkpoints.save(2)
            train(both, 1)  # changes the weights before they are sealed
            assert commit.newest_checkpoint(stage.checkpoints) == stage.checkpoint(1)
            gate.set()
            checkpoints.settle()
            assert commit.newest_checkpoint(stage.checkpoints, hash_limit=None) == stage.checkpoint(2)
        assert not stage.checkpoint(1).exists()
        again = engines(seed=9)
        load_checkpoint(stage.checkpoint(2), Running(again))
        for key, value in again["policy"].state_dict().items():
            assert torch.equal(value, saved[key]) and not torch.equal(value, both["policy"].state_dict()[key])

    forked(body)


def refusing(times: int, number: int = errno.ENOSPC):
    """An fsync that the disk refuses so often."""
    left, real = [times], os.fsync

    def fsync(handle):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        real(handle)

    return fsync


@pytest.mark.parametrize("when", ["settle", "save", "leave"])
def test_a_checkpoint_that_does_not_fit_is_told_and_the_older_one_stays(forked, tmp_path, monkeypatch, caplog, when):
    def body():
        stage, both = folder(tmp_path), engines()
        save(stage, Running(both), 1, keep=1)
        monkeypatch.setattr(os, "fsync", refusing(1000))
        with Checkpoints(stage, Running(both), 1) as checkpoints:
            checkpoints.save(2)
            if when == "save":
                checkpoints.save(3)
            if when != "leave":
                with pytest.raises(NoRoomError, match="No space left.* bytes needed, .* free"):
                    checkpoints.settle()
                checkpoints.settle()  # a failure is told once
        assert ("was not written" in caplog.text) == (when == "leave")
        assert ("tried once more" in caplog.text) == (when != "leave")
        assert commit.newest_checkpoint(stage.checkpoints, hash_limit=None) == stage.checkpoint(1)

    forked(body)


@pytest.mark.parametrize(("number", "left"), [(errno.ENOSPC, [4, 5]), (errno.EIO, [3, 4, 5])])
@pytest.mark.parametrize("moved", [False, True])
def test_a_refused_checkpoint_is_tried_again_where_room_was_made(forked, tmp_path, monkeypatch, moved, number, left):
    """On a disk that fails no older checkpoint is given up for it."""

    def body():
        stage, both = folder(tmp_path), engines()
        for step in (3, 4):
            save(stage, Running(both), step, keep=9)
        with Checkpoints(stage, Running(both), 9) as checkpoints:
            monkeypatch.setattr(os, "fsync", refusing(1, number))
            checkpoints.save(5)
            if moved:
                train(both, 1)
                with pytest.raises(ResourceError, match="bytes needed"):
                    checkpoints.settle()
                return
            checkpoints.settle()
        assert [commit.step_number(path) for path in commit.checkpoint_dirs(stage.checkpoints)] == left
        assert commit.newest_checkpoint(stage.checkpoints, hash_limit=None) == stage.checkpoint(5)

    forked(body)


def test_no_room_is_told_before_a_byte_is_written(forked, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.run.disk.free_bytes", lambda path: 10)

    def body():
        stage, both = folder(tmp_path), engines()
        with Checkpoints(stage, Running(both), 9) as checkpoints, pytest.raises(NoRoomError, match="needed, 10 free"):
            checkpoints.save(1)
        assert not stage.checkpoints.exists()

    forked(body)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_the_size_of_the_first_checkpoint_is_known_before(forked, tmp_path, zero):
    def body():
        stage = folder(tmp_path)
        torch.manual_seed(0)
        block = ZeroBlock(stage=zero, persistence_threshold=0)
        engine = Engine(nn.Linear(300, 400), block, bf16=False, optim=OptimBlock(optimizer="adamw"))
        loss = engine(torch.randn(5, 300)).pow(2).sum()
        engine.backward(Loss({"square": (loss, "rows", 1.0)}), {"rows": 5.0})
        engine.step(0.01)
        save(stage, Running({"policy": engine}), 1, keep=1)
        assert tree_bytes(stage.checkpoint(1)) == pytest.approx(engine.bytes_to_save(), rel=0.05)

    forked(body)


@pytest.mark.parametrize("damaged", [[], [3], [2, 3], [1, 2, 3]])
def test_only_a_checkpoint_that_is_whole_to_the_last_bit_is_used(forked, tmp_path, caplog, damaged):
    """A flipped bit does not change a size: the quick look at the start does not see it."""

    def body():
        stage, both = folder(tmp_path), engines()
        for step in (1, 2, 3):
            save(stage, Running(both), step, keep=9)
        for step in damaged:
            file = stage.checkpoint(step) / "policy" / "deepspeed" / "mp_rank_00_model_states.pt"
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 4
            file.write_bytes(content)
        newest = commit.newest_checkpoint(stage.checkpoints, hash_limit=0)
        assert newest == stage.checkpoint(3)
        if len(damaged) == 3:
            with pytest.raises(CheckpointError, match="3 damaged.*mp_rank_00_model_states"):
                sound_checkpoint(stage.checkpoints, newest)
            assert len(commit.checkpoint_dirs(stage.checkpoints)) == 3
            return
        assert sound_checkpoint(stage.checkpoints, newest) == stage.checkpoint(3 - len(damaged))
        assert caplog.text.count("mp_rank_00_model_states") == len(damaged)
        save(stage, Running(both), 4, keep=1)
        assert [path.name for path in commit.checkpoint_dirs(stage.checkpoints)] == ["step-000004"]

    forked(body)


def test_a_bit_of_a_big_file_of_a_parent_is_found_before_its_weights_are_used(forked, tmp_path):
    """The look at a parent before anything is imported reads small files only."""

    def body():
        stage = RunDir(tmp_path).stage("sft")
        stage.path.mkdir()
        commit.write_json(stage.provenance, {})
        big = stage.export_dir("model") / "model.safetensors"
        with big.open("wb") as file:
            file.truncate(commit.SMALL_FILE + 1)
        stage.publish("policy", {}, 1)
        check_published(stage.path)
        with (stage.model / big.name).open("r+b") as file:
            file.seek(commit.SMALL_FILE // 2)
            file.write(b"\x01")
        stage.read_manifest()
        with pytest.raises(CheckpointError, match="model.safetensors: expected the content that was written"):
            check_published(stage.path)

    forked(body)


@pytest.mark.parametrize(
    ("change", "words"), [({"devices": 8}, "devices 8, found 1"), ({"zero_stages": {}}, "zero_st")]
)
def test_another_layout_is_refused_with_a_remedy(forked, tmp_path, change, words):
    def body():
        stage, both = folder(tmp_path), engines()
        save(stage, Running(both), 1, keep=1)
        path = stage.checkpoint(1) / "MANIFEST.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(CheckpointError, match=f"expected {words}") as error:
            load_checkpoint(stage.checkpoint(1), Running(both))
        assert "same number of devices" in str(error.value) and "--restart" in str(error.value)

    forked(body)


@dataclass
class Remembered:
    """Numbers that a stage goes on from."""

    kl_coef: float

    def as_json(self) -> dict[str, float]:
        return {"kl_coef": self.kl_coef}

    def restore(self, saved: dict[str, float]) -> None:
        self.kl_coef = saved["kl_coef"]


@pytest.mark.parametrize("zero", [0, 3])
def test_averages_and_numbers_travel_with_the_engines(forked, tmp_path, zero):
    def running(seed: int, coef: float) -> Running:
        made = engines(zero, seed)
        return Running(made, {"ema": Ema(made["policy"], 0.5)}, Remembered(coef))

    def body():
        stage, first = folder(tmp_path), running(0, 0.125)
        start = first.others["ema"].average["weight"].clone()
        train(first.engines, 1)
        first.others["ema"].update()
        save(stage, first, 1, keep=1)
        files = json.loads((stage.checkpoint(1) / "MANIFEST.json").read_text())["files"]
        assert {name.split("/")[0] for name in files} == {"policy", "critic", "ema", "loop.json", "state.json"}
        second = running(9, 1.0)
        assert load_checkpoint(stage.checkpoint(1), second) == 1
        assert second.state.kl_coef == 0.125
        found = second.others["ema"].average["weight"]
        assert torch.equal(found, first.others["ema"].average["weight"]) and not torch.equal(found, start)

    forked(body)
