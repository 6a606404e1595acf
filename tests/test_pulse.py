"""Signs of life of ranks, and how the command that started them counts silence."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from rlhf import pulse
from rlhf.pulse import Pulses


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That of a job, in whose rank 1 the test runs."""
    private = tmp_path / "job"
    private.mkdir()
    monkeypatch.setenv(pulse.FOLDER, str(private))
    monkeypatch.setenv("RANK", "1")
    return private


def test_silence_ends_with_every_beat(folder: Path) -> None:
    pulses = Pulses(folder)
    assert pulses.silence(["0", "1"]) == {"0": 0, "1": 0}, "what was just found has not been silent yet"
    time.sleep(0.05)
    pulse.beat()
    silent = pulses.silence(["0", "1"])
    assert silent["1"] == 0 and 0.05 <= silent["0"] < 1
    time.sleep(0.05)
    assert 0.05 <= pulses.silence(["0", "1"])["1"] < silent["0"] + 0.1


def test_a_pause_of_the_watcher_is_not_held_against_the_ranks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    pulses = Pulses(folder)
    pulses.silence(["1"])
    clock[0] = 3600.0
    assert pulses.silence(["1"]) == {"1": pulse.BEAT_S}


def test_nobody_is_silent_where_the_folder_was_removed(folder: Path) -> None:
    pulses = Pulses(folder)
    pulses.silence(["1"])
    folder.rmdir()
    time.sleep(0.02)
    pulse.beat()
    assert pulses.silence(["1"]) == {"1": 0}


def test_what_a_rank_does_is_told_until_it_is_over_and_kept_where_it_fails(folder: Path) -> None:
    pulses = Pulses(folder)
    assert pulses.doing("1") == ""
    with pulse.doing("a step"):
        with pulse.doing("the update"):
            assert pulses.doing("1") == "the update"
        assert pulses.doing("1") == "a step"
        with pytest.raises(MemoryError), pulse.doing("sampling"):
            raise MemoryError
    # the step went on: somebody has taken the error
    assert pulses.doing("1") == ""
    with pytest.raises(MemoryError), pulse.doing("a step"), pulse.doing("sampling"):
        raise MemoryError
    assert pulses.doing("1") == "sampling" and pulses.doing("0") == ""


def test_outside_of_a_job_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pulse.FOLDER, raising=False)
    monkeypatch.chdir(tmp_path)
    with pulse.doing("something"):
        pulse.beat()
    pulse.clear()
    assert pulse.rendezvous() is None and not list(tmp_path.iterdir())


def test_the_last_rank_of_a_killed_job_removes_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pulse.rendezvous()
    assert found == folder / pulse.RENDEZVOUS
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        pulse.beat()
    found.touch()
    pulse.clear()
    assert folder.exists() and not found.exists()
    monkeypatch.setenv("RANK", "0")
    pulse.clear()
    assert not folder.exists()
