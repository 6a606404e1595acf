"""Files and folders that land whole or not at all."""

import fcntl
import itertools
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.errors import BusyError, CheckpointError, ResourceError, UnsafeError
from rlhf.run import commit, content
from rlhf.run.lock import Lock

InChild = Callable[[Callable[[], object]], int]
DiesBefore = Callable[[int, Callable[[], object]], bool]
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "läufe mit Leerzeichen" / "奖励"
    path.mkdir(parents=True)
    return path


def save(folder: Path, step: int, content: str = "weights") -> Path:
    """A committed checkpoint with two files, one in a sub-folder."""
    final = folder / commit.step_name(step)
    temporary = commit.fresh_temporary(final)
    (temporary / "rank0").mkdir()
    (temporary / "rank0" / "optim.bin").write_text(f"{content} {step}" * 10)
    (temporary / "state.json").write_text(json.dumps({"step": step}))
    commit.commit_dir(temporary, final, {"step": step})
    return final


# ---- files -----------------------------------------------------------------------------------------------------------


def test_write_atomic_replaces_and_leaves_nothing_else(folder: Path) -> None:
    path = folder / "a.txt"
    commit.write_atomic(path, "old")
    commit.write_atomic(path, b"new \xff", durable=False)
    assert path.read_bytes() == b"new \xff"
    assert [p.name for p in folder.iterdir()] == ["a.txt"]


def test_write_atomic_replaces_a_link_instead_of_following_it(folder: Path) -> None:
    (folder / "elsewhere").write_text("untouched")
    (folder / "a").symlink_to(folder / "elsewhere")
    commit.write_atomic(folder / "a", "new")
    assert (folder / "elsewhere").read_text() == "untouched" and not (folder / "a").is_symlink()


def test_a_crash_at_any_moment_leaves_the_old_file_or_the_new_one(folder: Path, dies_before: DiesBefore) -> None:
    path, seen = folder / "status.json", set()
    for operation in itertools.count(1):
        commit.write_json(path, {"step": 1})
        died = dies_before(operation, lambda: commit.write_json(path, {"step": 2}))
        seen.add(commit.read_json(path)["step"])
        commit.remove_temporaries(folder)
        assert [p.name for p in folder.iterdir()] == ["status.json"]
        if not died:
            break
    assert seen == {1, 2} and operation > 2


def test_a_full_disk_keeps_the_old_file_and_says_so(folder: Path, in_child: InChild) -> None:
    path = folder / "a.txt"
    commit.write_atomic(path, "old")

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(ResourceError, match="1,000 bytes needed"):
            commit.write_atomic(path, "x" * 1000)

    assert in_child(fill) == 0
    assert path.read_text() == "old" and len(list(folder.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"\x00" * 9, b"[" * 100_000, b'{"a": 1}{'])
def test_damaged_json_names_the_file(folder: Path, content: bytes) -> None:
    path = folder / "status.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="status.json"):
        commit.read_json(path)


def test_a_missing_or_unreadable_file_is_a_checkpoint_error(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="found nothing"):
        commit.read_json(folder / "none.json")
    with pytest.raises(CheckpointError, match="cannot be read"):
        commit.read_json(folder)


def test_json_is_strict(folder: Path) -> None:
    commit.write_json(folder / "a.json", {"a": float("nan"), "b": [float("inf"), (1, 2.5)], "c": Path("x/y"), 3: None})
    text = (folder / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, [1, 2.5]], "c": "x/y", "3": None}


# ---- logs ------------------------------------------------------------------------------------------------------------


def test_logs_are_cut_back_to_a_step(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    commit.cut_jsonl(path, 3)
    assert not path.exists() and commit.read_jsonl(path) == []
    for step in range(1, 6):
        commit.append_jsonl(path, {"step": step, "loss": float("nan") if step == 2 else step / 7, "text": "ü\u2028\n"})
    before = commit.read_jsonl(path)
    commit.cut_jsonl(path, 3)
    assert commit.read_jsonl(path) == before[:3]
    assert before[1]["loss"] is None and before[0] == {"step": 1, "loss": 1 / 7, "text": "ü\u2028\n"}
    commit.append_jsonl(path, {"step": 4})
    assert [row["step"] for row in commit.read_jsonl(path)] == [1, 2, 3, 4]


def test_a_line_cut_short_by_a_crash_is_dropped(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "los')
    assert commit.read_jsonl(path) == [{"step": 1}]
    commit.cut_jsonl(path, 5)
    assert path.read_text() == '{"step": 1}\n'


@pytest.mark.parametrize("line", ["{", "[1]", "", '{"loss": 1}', '{"step": "1"}'])
def test_a_damaged_line_is_named(folder: Path, line: str) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(CheckpointError, match="metrics.jsonl:2"):
        commit.cut_jsonl(path, 5)


def test_a_full_disk_leaves_the_log_as_it_was(folder: Path, in_child: InChild) -> None:
    path = folder / "metrics.jsonl"
    commit.append_jsonl(path, {"step": 1, "text": "x" * 60})

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        with pytest.raises(ResourceError):
            commit.append_jsonl(path, {"step": 2, "text": "x" * 60})

    assert in_child(fill) == 0
    assert [row["step"] for row in commit.read_jsonl(path)] == [1]


def test_logs_are_not_written_through_links(folder: Path) -> None:
    (folder / "elsewhere").write_text("")
    (folder / "metrics.jsonl").symlink_to(folder / "elsewhere")
    with pytest.raises(UnsafeError, match="symbolic link"):
        commit.append_jsonl(folder / "metrics.jsonl", {"step": 1})
    assert (folder / "elsewhere").read_text() == ""


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_a_committed_folder_verifies(folder: Path) -> None:
    final = save(folder, 100)
    manifest = commit.verify(final, hash_limit=None)
    assert manifest["step"] == 100
    assert set(manifest["files"]) == {"rank0/optim.bin", "state.json"}
    assert manifest["files"]["state.json"] == {
        "size": (final / "state.json").stat().st_size,
        "sha256": content.hash_file(final / "state.json"),
    }
    assert [p.name for p in folder.iterdir()] == ["step-000100"]


def damage(path: Path, how: str) -> None:
    """Change one committed folder in the way that the name says."""
    file = path / "rank0" / "optim.bin"
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[:-1])
    elif how == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "gone":
        file.unlink()
    elif how == "extra":
        (path / "rank0" / "other.bin").write_text("x")
    elif how == "no manifest":
        (path / commit.MANIFEST).unlink()
    elif how == "cut manifest":
        (path / commit.MANIFEST).write_bytes((path / commit.MANIFEST).read_bytes()[:40])
    elif how == "no table":
        commit.write_json(path / commit.MANIFEST, {"step": 100})
    else:
        commit.write_json(path / commit.MANIFEST, {"files": {"state.json": {"size": "1", "sha256": 2}}})


DAMAGES = ["cut", "flip", "gone", "extra", "no manifest", "cut manifest", "no table", "bad entry"]


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_is_found(folder: Path, how: str) -> None:
    final = save(folder, 100)
    damage(final, how)
    with pytest.raises(CheckpointError, match="step-000100"):
        commit.verify(final)


def test_a_quick_check_of_a_big_file_compares_sizes_only(folder: Path) -> None:
    final = save(folder, 100)
    damage(final, "flip")
    commit.verify(final, hash_limit=10)
    with pytest.raises(CheckpointError):
        commit.verify(final, hash_limit=None)


@pytest.mark.parametrize("name", ["../state.json", "/etc/hostname", "rank0/../../x"])
def test_a_manifest_cannot_lead_elsewhere(folder: Path, name: str) -> None:
    final = save(folder, 100)
    commit.write_json(final / commit.MANIFEST, {"files": {name: {"size": 1, "sha256": "0"}}})
    with pytest.raises(UnsafeError, match="inside the folder"):
        commit.verify(final)


def test_links_and_special_files_are_refused(folder: Path) -> None:
    final = save(folder, 100)
    (final / "link").symlink_to("/etc")
    with pytest.raises(UnsafeError, match="link or special"):
        commit.verify(final)
    (final / "link").unlink()
    os.mkfifo(final / "pipe")
    with pytest.raises(UnsafeError, match="link or special"):
        commit.verify(final)


def test_a_crash_at_any_moment_of_a_save_leaves_a_valid_checkpoint(folder: Path, dies_before: DiesBefore) -> None:
    def next_save() -> None:
        save(folder, 200)
        commit.rotate(folder, keep=1)

    newest = set()
    for operation in itertools.count(1):
        save(folder, 100)
        died = dies_before(operation, next_save)
        found = commit.newest_checkpoint(folder, hash_limit=None)
        assert found is not None
        newest.add(found.name)
        for path in commit.checkpoint_dirs(folder):
            commit.verify(path, hash_limit=None)
        commit.remove_temporaries(folder)
        next_save()
        assert [p.name for p in folder.iterdir()] == ["step-000200"]
        commit.remove_dir(folder / "step-000200")
        if not died:
            break
    assert newest == {"step-000100", "step-000200"} and operation > 15


def test_a_complete_folder_of_the_same_name_stays_and_a_damaged_one_is_replaced(folder: Path) -> None:
    final = save(folder, 100, "first")
    save(folder, 100, "second")
    assert (final / "rank0" / "optim.bin").read_text().startswith("first")
    damage(final, "flip")
    save(folder, 100, "second")
    assert (final / "rank0" / "optim.bin").read_text().startswith("second")
    assert [p.name for p in folder.iterdir()] == ["step-000100"]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_newest_checkpoint_is_the_highest_number(folder: Path) -> None:
    assert commit.newest_checkpoint(folder / "none") is None and commit.newest_checkpoint(folder) is None
    for step in (999_999, 1_000_000, 5):
        save(folder, step)
    (folder / "step-9").mkdir()
    (folder / ".tmp-step-2000000").mkdir()
    newest = commit.newest_checkpoint(folder)
    assert newest is not None and commit.step_number(newest) == 1_000_000


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(folder: Path, how: str) -> None:
    older, newer = save(folder, 100), save(folder, 200)
    damage(newer, how)
    assert commit.newest_checkpoint(folder) == older
    damage(older, how)
    with pytest.raises(CheckpointError, match="2 damaged") as caught:
        commit.newest_checkpoint(folder)
    assert "--restart" in str(caught.value)


def test_rotation_keeps_the_newest_complete_ones(folder: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(folder, step)
    damage(folder / commit.step_name(5), "no manifest")
    damage(folder / commit.step_name(2), "cut")
    commit.rotate(folder, keep=2)
    assert [commit.step_number(p) for p in commit.checkpoint_dirs(folder)] == [3, 4, 5]
    for path in commit.checkpoint_dirs(folder):
        if (path / commit.MANIFEST).exists():
            damage(path, "no manifest")
    commit.rotate(folder, keep=1)
    assert len(commit.checkpoint_dirs(folder)) == 3  # nothing complete: nothing is deleted


def test_some_checkpoints_stay_however_old(folder: Path) -> None:
    for step in (1, 2, 3, 4):
        save(folder, step)
    commit.rotate(folder, keep=1, also=[folder / commit.step_name(2), folder / commit.step_name(9)])
    assert [commit.step_number(path) for path in commit.checkpoint_dirs(folder)] == [2, 4]


# ---- lock ------------------------------------------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from rlhf.run.lock import Lock
Lock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_at_once_and_a_dead_one_is_forgotten(folder: Path) -> None:
    lock = Lock(folder / "new" / ".sft.lock")
    assert lock.holder() is None
    command = [sys.executable, "-c", HOLD, str(lock.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(BusyError, match=f"held by process {other.pid} on .* since 2"):
            lock.acquire()
        holder = lock.holder()
        assert holder is not None and holder["pid"] == other.pid
        other.send_signal(signal.SIGKILL)
    assert lock.holder() is None
    lock.acquire()
    again = Lock(lock.path)
    with pytest.raises(BusyError, match=f"process {os.getpid()}"):
        again.acquire()
    lock.release()
    again.acquire()
    again.release()
    again.release()


def test_a_lock_file_with_anything_in_it_is_no_obstacle(folder: Path) -> None:
    path = folder / ".sft.lock"
    path.write_text("garbage")
    lock = Lock(path)
    lock.acquire()
    path.write_text("[")
    with pytest.raises(BusyError, match="process None"):
        Lock(path).acquire()
    lock.release()


def test_nobody_is_told_of_a_process_that_is_gone(folder: Path) -> None:
    path = folder / ".sft.lock"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    note = {"pid": gone.pid, "host": socket.gethostname(), "since": "earlier"}
    path.write_text(json.dumps(note))
    with path.open() as file:  # somebody has the lock, whose note comes later
        fcntl.flock(file, fcntl.LOCK_EX)
        later = threading.Timer(0.3, lambda: path.write_text(json.dumps({**note, "pid": os.getpid()})))
        later.start()
        with pytest.raises(BusyError, match=f"held by process {os.getpid()} "):
            Lock(path).acquire()
        holder = Lock(path).holder()
        assert holder is not None and holder["pid"] == os.getpid()
        later.join()


def test_who_only_looks_is_nobody(folder: Path) -> None:
    path = folder / ".sft.lock"
    path.write_text(json.dumps({"pid": 2**30, "host": socket.gethostname(), "since": "earlier"}))
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.3, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        lock = Lock(path)
        lock.acquire()
    lock.release()


def test_a_lock_is_not_taken_through_a_link(folder: Path) -> None:
    (folder / ".sft.lock").symlink_to(folder / "elsewhere")
    with pytest.raises(UnsafeError):
        Lock(folder / ".sft.lock").acquire()
    assert not (folder / "elsewhere").exists()


def test_a_linked_folder_does_not_verify(folder: Path) -> None:
    final = save(folder, 100)
    (folder / "elsewhere").mkdir()
    final.rename(folder / "elsewhere" / final.name)
    final.symlink_to(folder / "elsewhere" / final.name)
    with pytest.raises(UnsafeError, match="symbolic link"):
        commit.verify(final)
