"""What a disk answers, in words; room; and whose a folder is."""

import errno
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import CheckpointError, FailingDiskError, NoRoomError, ResourceError, UnsafeError, UserError
from rlhf.run import commit
from rlhf.run.disk import disk, free_bytes, make_private, refuse_foreign, require_room, told, tree_bytes
from rlhf.run.lock import Lock
from rlhf.run.rundir import RunDir

ANSWERS = [
    (errno.ENOSPC, NoRoomError, "No space left on device; 1,234,567 bytes needed, [0-9,]+ free"),
    (errno.EDQUOT, NoRoomError, "Disk quota exceeded; 1,234,567 bytes needed"),
    (errno.EIO, FailingDiskError, "does not take it in: Input/output error; 1,234,567 bytes needed, [0-9,]+ free"),
    (errno.ENOENT, ResourceError, "the folder was removed meanwhile"),
    (errno.EACCES, ResourceError, "Permission denied"),
    (errno.EROFS, ResourceError, "Read-only file system"),
    (errno.ELOOP, UnsafeError, "symbolic link"),
]


@pytest.mark.parametrize(("number", "kind", "words"), ANSWERS)
def test_every_answer_has_its_words(tmp_path: Path, number: int, kind: type[UserError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught, disk(tmp_path / "a" / "b", 1_234_567):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is kind and caught.value.exit_code == (9 if kind is UnsafeError else 7)
    assert caught.value.fix is not None


def test_a_mistake_of_ours_is_no_answer_of_a_disk(tmp_path: Path) -> None:
    assert told(OSError(errno.EBADF, "x"), tmp_path) is None
    with pytest.raises(OSError), disk(tmp_path):
        raise OSError(errno.EBADF, "x")


def test_room_is_asked_for_where_the_path_will_be(tmp_path: Path) -> None:
    path = tmp_path / "not" / "there"
    free = free_bytes(path)
    require_room(path, 1)
    with pytest.raises(NoRoomError, match=f"{2 * free + 10**9:,} bytes needed") as caught:
        require_room(path, 2 * free + 10**9)
    assert caught.value.where == str(path)


def test_the_size_of_a_tree(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(bytes(1000))
    (tmp_path / "c").write_bytes(bytes(24))
    assert tree_bytes(tmp_path) == 1024 and tree_bytes(tmp_path / "none") == 0


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_all_that_is_written_is_its_owners(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        root = tmp_path / "runs" / "mine"
        Lock(root / ".sft.lock").acquire()
        stage = RunDir(root).stage("sft")
        make_private(stage.path)
        commit.write_atomic(stage.status, "{}")
        commit.append_jsonl(stage.metrics, {"step": 1})
        handler = stage.log_handler()
        temporary = commit.fresh_temporary(stage.checkpoint(1))
        handler.close()
    finally:
        os.umask(before)
    for folder in (root, stage.path, stage.checkpoints, temporary):
        assert mode(folder) == 0o700, folder
    for file in (root / ".sft.lock", stage.status, stage.metrics, stage.log):
        assert mode(file) == 0o600, file


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = RunDir(tmp_path).stage("sft")
    refuse_foreign(tmp_path / "none")
    stage.refuse_foreign()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(UnsafeError, match=f"of user {user}") as caught:
        stage.refuse_foreign()
    assert "--allow-foreign" in str(caught.value)


def test_the_log_is_not_written_through_a_link_and_a_refused_line_is_told_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = RunDir(tmp_path).stage("sft")
    stage.path.mkdir()
    (tmp_path / "elsewhere").write_text("")
    stage.log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeError, match="symbolic link"):
        stage.log_handler()
    stage.log.unlink()
    handler = stage.log_handler()
    assert handler.stream is not None
    os.close(handler.stream.fileno())
    os.open("/dev/full", os.O_WRONLY)  # takes the number that became free
    for _ in range(2):
        handler.handle(logging.LogRecord("rlhf", logging.INFO, "x", 1, "a line", (), None))
    handler.close()
    assert capsys.readouterr().err.count("takes no more lines: No space left on device") == 1


# ---- the commit layer on such a disk ---------------------------------------------------------------------------------


def save(folder: Path, step: int) -> Path:
    """A checkpoint of one file."""
    final = folder / commit.step_name(step)
    temporary = commit.fresh_temporary(final)
    (temporary / "weights").write_text(f"weights {step}")
    commit.commit_dir(temporary, final, {"step": step, "note": "a"})
    return final


def test_a_planted_link_is_removed_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("untouched")
    (tmp_path / ".tmp-step-000001").symlink_to(tmp_path / "elsewhere")
    save(tmp_path, 1)
    (tmp_path / ".tmp-x").symlink_to(tmp_path / "elsewhere")
    commit.remove_temporaries(tmp_path)
    assert (tmp_path / "elsewhere" / "file").read_text() == "untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "step-000001"]


@pytest.mark.parametrize("change", [("step", 2), ("note", "b"), ("more", 1)])
def test_a_manifest_that_says_something_else_is_found(tmp_path: Path, change: tuple[str, object]) -> None:
    final = save(tmp_path, 1)
    manifest = commit.read_json(final / commit.MANIFEST)
    commit.write_json(final / commit.MANIFEST, {**manifest, change[0]: change[1]})
    with pytest.raises(CheckpointError, match="MANIFEST.json: expected what was written"):
        commit.verify(final, hash_limit=0)


def test_rotation_spares_what_is_named_and_always_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in range(1, 6):
        save(tmp_path, step)
    commit.rotate(Path("."), 2, also=[tmp_path / commit.step_name(2), tmp_path / "other" / commit.step_name(1)])
    assert [commit.step_number(path) for path in commit.checkpoint_dirs(tmp_path)] == [2, 4, 5]
    commit.rotate(tmp_path, 0)
    assert [commit.step_number(path) for path in commit.checkpoint_dirs(tmp_path)] == [5]


def test_room_is_made_of_all_that_can_be_done_without(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step)
    commit.fresh_temporary(tmp_path / commit.step_name(9))
    (tmp_path / commit.step_name(4) / "weights").unlink()
    aside = commit.set_aside(tmp_path / commit.step_name(4))
    (tmp_path / "notes.txt").write_text("mine")
    gone = commit.make_room(tmp_path, also=[tmp_path / commit.step_name(1)])
    assert set(gone) == {".tmp-step-000009", aside.name, "step-000002"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step-000001", "step-000003"]
    assert commit.make_room(tmp_path / "none") == []


def refuse(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    real: Callable[..., object] = getattr(os, name)

    def call(path: object = ".", *rest: object, **options: object) -> object:
        if "step" in str(path) or "saves" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name", ["listdir", "scandir", "stat"])
def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "saves").mkdir()
    save(tmp_path / "saves", 1)
    refuse(monkeypatch, name)
    with pytest.raises(CheckpointError, match="Input/output error"):
        commit.newest_checkpoint(tmp_path / "saves")
