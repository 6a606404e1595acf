"""Rows of the reliability sheet on what a disk may do: a few tries each, none of which may lose anything."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace

import pytest

from rlhf.run import commit
from scripts.reliability.crashes import SIZES, begin, can_trace, check_state
from scripts.reliability.kills import progress
from scripts.reliability.lab import differing, digest
from scripts.reliability.lost import Journal
from scripts.reliability.mounts import can_mount
from scripts.reliability.row import ROWS
from scripts.reliability.saver import NEW, save
from scripts.reliability.sheet import ROWS as ALL


@pytest.mark.parametrize("id", ["R1", "R2", "R3"])
def test_a_save_survives(tmp_path, id):
    """Kills and refusals at every call, and power cuts. No model is needed."""
    if id != "R3" and not can_trace():
        pytest.skip("strace does not work here")
    tally, _ = ROWS[id].run(SimpleNamespace(work=tmp_path), tries=ALL[id].quick, seed=0)
    assert not tally.violations and tally.tried >= 50


def test_a_power_cut_is_seen_where_nothing_is_forced_to_the_disk(tmp_path, monkeypatch):
    """The model of the disk finds what it is there for."""
    monkeypatch.setattr(commit, "fsync_path", lambda path: None)
    begin(tmp_path / "saves", SIZES[1])
    journal = Journal.recorded(tmp_path / "saves", lambda: save(tmp_path / "saves", NEW, SIZES[1]))
    lost = 0
    for number in range(20):
        draw = random.Random(number)
        journal.rebuild(tmp_path / f"{number}", draw.randrange(len(journal.events)), draw)
        try:
            check_state(tmp_path / f"{number}", SIZES[1], {})
        except Exception:  # noqa: BLE001  whatever is lost
            lost += 1
    assert lost > 2


@pytest.mark.pipeline
@pytest.mark.parametrize("id", ["R8", "R9", "R15"])
def test_a_run_survives(lab, id):
    """Full disks, damaged files, hard places."""
    if id == "R8" and not can_mount():
        pytest.skip("no mounts of one's own here")
    tally, _ = ROWS[id].run(lab, tries=ALL[id].quick, seed=0)
    assert not tally.violations and tally.tried


def stranger() -> None:
    """Become somebody else, as far as the command can see."""
    user = os.geteuid()
    os.geteuid = lambda: user + 1


@pytest.mark.pipeline
def test_a_run_of_another_user_is_touched_only_where_that_is_allowed(lab):
    words = lab.command("sft")
    refused = lab.run(words, before=stranger)
    assert refused.code == 9 and "--allow-foreign" in refused.err
    allowed = lab.run([*words, "--allow-foreign"], before=stranger)
    assert allowed.code == 0, allowed.err
    written = [lab.root, *(lab.root / "sft").rglob("*")]
    assert not [path for path in written if path.stat().st_mode & 0o77], "somebody else can read it"


@pytest.mark.pipeline
@pytest.mark.parametrize("how", ["cut", "half a folder"])
def test_a_tokenizer_that_was_cut_off_or_damaged_is_made_anew(lab, how):
    """It is trained on the stage's data: a resumed stage must not go on with half of it."""
    words = lab.command("sft", "--name", "words")
    straight = lab.run(words)
    assert straight.code == 0, straight.err
    wanted, stage = digest(lab.root / "words"), lab.root / "words"
    lab.clear("words")
    child = lab.start(words)
    child.until(lambda: progress(stage) >= 2)
    child.kill()
    child.wait()
    file = stage / "tokenizer" / "tokenizer.json"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        for path in (file, stage / "tokenizer" / commit.MANIFEST):
            path.unlink()
    done = lab.run(words)
    assert done.code == 0 and "tokenizer" in done.err and "made anew" in done.err, done.err
    assert not (different := differing(digest(stage), wanted)), different
    lab.clear("words")
