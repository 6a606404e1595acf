"""A model of a disk that loses what was not forced to it.

Names and contents are seen after every operation on files. A folder's changes are durable once the folder is forced to
the disk, a file's content once the file is; of the rest a power cut leaves any part: some changes of names and not
others, whatever their order, and of a content the old one, the new one, a beginning, or a beginning and zeros.
"""

from __future__ import annotations

import os
import random
import stat
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
_recording: list[Callable[[], None]] = []  # the hook cannot be taken out again
_has_hook = False


@dataclass(frozen=True)
class Seen:
    """All below a folder at one moment, by inode."""

    names: dict[int, dict[str, int]]  # folder -> name -> inode
    contents: dict[int, bytes]  # file -> content

    @classmethod
    def now(cls, root: Path) -> Seen:
        seen = cls({}, {})
        folders = [root]
        while folders:
            folder = folders.pop()
            names = seen.names.setdefault(folder.stat().st_ino, {})
            for entry in folder.iterdir():
                found = entry.stat()
                names[entry.name] = found.st_ino
                if stat.S_ISDIR(found.st_mode):
                    folders.append(entry)
                else:
                    seen.contents[found.st_ino] = entry.read_bytes()
        return seen


@dataclass
class Journal:
    """Everything seen during an action, and which inode was forced to the disk when."""

    root: int
    start: Seen
    events: list[tuple[Seen, int | None]] = field(default_factory=list)  # what is seen; the inode that was forced

    @classmethod
    def recorded(cls, folder: Path, action: Callable[[], object]) -> Journal:
        """Run an action in this process. All that is there before counts as durable."""
        journal, real = cls(folder.stat().st_ino, Seen.now(folder)), os.fsync
        one_at_a_time, looking = threading.Lock(), [0]

        def look(forced: int | None = None) -> None:
            if looking[0] != threading.get_ident():  # looking opens files, too
                with one_at_a_time:
                    looking[0] = threading.get_ident()
                    journal.events.append((Seen.now(folder), forced))
                    looking[0] = 0

        def fsync(handle: int) -> None:
            real(handle)
            look(os.fstat(handle).st_ino)

        _hook()
        _recording.append(look)
        os.fsync = fsync  # type: ignore[assignment]
        try:
            action()
            look()
        finally:
            os.fsync = real
            _recording.clear()
        return journal

    def rebuild(self, target: Path, moment: int, draw: random.Random) -> None:
        """Write one of the states that a power cut after event `moment` may leave."""
        names = {inode: dict(entries) for inode, entries in self.start.names.items()}
        pending: dict[int, list[dict[str, int | None]]] = {}
        durable, latest, before = dict(self.start.contents), dict(self.start.contents), self.start
        for seen, forced in self.events[: moment + 1]:
            for folder in before.names.keys() | seen.names.keys():
                old, new = (each.names.get(folder, {}) for each in (before, seen))
                if change := {
                    name: new.get(name) for name in old.keys() | new.keys() if old.get(name) != new.get(name)
                }:
                    pending.setdefault(folder, []).append(change)
            latest |= seen.contents
            if forced in seen.names:
                for change in pending.pop(forced, []):
                    _apply(names.setdefault(forced, {}), change)
            elif forced in seen.contents:
                durable[forced] = seen.contents[forced]
            before = seen
        for folder, changes in pending.items():
            for change in changes:
                if draw.random() < 0.5:
                    _apply(names.setdefault(folder, {}), change)
        folders = set(self.start.names) | {folder for seen, _ in self.events for folder in seen.names}
        self._write(target, self.root, names, folders, lambda inode: _left(durable, latest, inode, draw))

    def _write(
        self,
        target: Path,
        inode: int,
        names: dict[int, dict[str, int]],
        folders: set[int],
        left: Callable[[int], bytes],
    ) -> None:
        target.mkdir()
        for name, child in names.get(inode, {}).items():
            if child in folders:
                self._write(target / name, child, names, folders, left)
            else:
                (target / name).write_bytes(left(child))


def _apply(entries: dict[str, int], change: dict[str, int | None]) -> None:
    for name, inode in change.items():
        if inode is None:
            entries.pop(name, None)
        else:
            entries[name] = inode


def _left(durable: dict[int, bytes], latest: dict[int, bytes], inode: int, draw: random.Random) -> bytes:
    """A file's content after a power cut."""
    new = latest[inode]
    if durable.get(inode) == new:
        return new
    cut = draw.randrange(len(new) + 1)
    return draw.choice([durable.get(inode, b""), new, new[:cut], new[:cut] + bytes(len(new) - cut)])


def _hook() -> None:
    global _has_hook
    if not _has_hook:
        sys.addaudithook(_heard)
        _has_hook = True


def _heard(event: str, _: object) -> None:
    if event in _WATCHED:
        for look in _recording:
            look()
