"""Files of torch.save by which somebody may try to run code: whatever the trick, nothing of it happens."""

from __future__ import annotations

import os

import pytest
import torch

from rlhf.engine.files import CheckpointFiles, refuse_code
from rlhf.errors import CheckpointError, UnsafeError
from scripts.reliability.evil import TRICKS

KNOWN_TO_WORK = ("plain", "legacy", "duplicate", "nested", "by_memo", "inst", "obj")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS)
def test_no_trick_runs_code(tmp_path, trick):
    file, mark = tmp_path / "model_states.pt", tmp_path / "mark"
    trick(file, mark)
    for read in (refuse_code, lambda path: CheckpointFiles().load(str(path))):
        with pytest.raises((UnsafeError, CheckpointError)):
            read(file)
        assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trick", [TRICKS[name] for name in KNOWN_TO_WORK], ids=KNOWN_TO_WORK)
def test_the_tricks_work_on_a_reader_that_trusts(tmp_path, trick):
    """Else the tests above would say nothing."""
    file, mark = tmp_path / "model_states.pt", tmp_path / "mark"
    trick(file, mark)
    try:
        torch.load(file, weights_only=False)
    except Exception:  # noqa: BLE001  what the archive is for comes later, if at all
        pass
    assert mark.exists()


@pytest.mark.parametrize("keep", [0, 1, 50, 0.5, 0.9])
def test_a_cut_file_is_no_traceback(tmp_path, keep):
    file = tmp_path / "a.pt"
    torch.save({"a": torch.ones(200)}, file)
    size = file.stat().st_size
    os.truncate(file, int(size * keep) if isinstance(keep, float) else keep)
    for read in (refuse_code, lambda path: CheckpointFiles().load(str(path))):
        with pytest.raises((UnsafeError, CheckpointError)):
            read(file)


def test_weights_come_back(tmp_path):
    file = tmp_path / "a.pt"
    CheckpointFiles().save({"a": torch.arange(3.0), "step": 7, "name": "x"}, str(file))
    refuse_code(file)
    found = CheckpointFiles().load(str(file))
    assert torch.equal(found["a"], torch.arange(3.0)) and (found["step"], found["name"]) == (7, "x")
