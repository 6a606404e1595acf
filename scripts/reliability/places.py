"""Runs in places that are hard to write to, that vanish, or whose names are unusual."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from scripts.reliability.kills import progress
from scripts.reliability.lab import Done, Lab, differing, digest
from scripts.reliability.mounts import apart, read_only
from scripts.reliability.row import Tally, row

STAGE = "dpo"


def works(lab: Lab, done: Done, root: Path, wanted: dict[str, str]) -> None:
    """It ended well, with the result of any other place.

    Files of torch are left out: their container is named otherwise below a folder whose name is not ASCII.
    """
    assert done.code == 0, f"exit {done.code}: {done.err[-1500:]}"
    different = [name for name in differing(digest(root / STAGE), wanted) if not name.endswith(".pt")]
    assert not different, different


def refuses(done: Done) -> None:
    """Exit 7 with one message."""
    assert done.code == 7, f"exit {done.code}: {done.err[-1500:]}"
    assert "error: " in done.err and "Traceback" not in done.err, done.err[-1500:]


def moved(lab: Lab, root: Path) -> Path:
    """A run directory with the parents at another place."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    for parent in ("sft", "rm"):
        shutil.copytree(lab.root / parent, root / parent)
    return root


def in_unusual_place(lab: Lab, draw: random.Random, wanted: dict[str, str]) -> None:
    """Spaces, UTF-8, quotes, a line break, a name as long as a file system takes."""
    names = ["läufe mit Leerzeichen/奖励 模型", "n" * 255, 'it\'s "quoted" $HOME {x}', "zwei\nZeilen", "é" * 127]
    root = moved(lab, lab.work / "places" / draw.choice(names))
    works(lab, lab.run(lab.command(STAGE, root=root)), root, wanted)


def without_home(lab: Lab, draw: random.Random, wanted: dict[str, str]) -> None:
    """No HOME, or one that is not there and cannot be made."""
    root = moved(lab, lab.work / "places" / "homeless")
    home = draw.choice([None, "/proc/none", "/"])

    def leave() -> None:
        os.environ.pop("HOME", None)
        if home is not None:
            os.environ["HOME"] = home

    works(lab, lab.run(lab.command(STAGE, root=root), before=leave), root, wanted)


def too_long_a_name(lab: Lab, draw: random.Random, wanted: dict[str, str]) -> None:
    """Longer than a file system takes, as a folder or as a whole path."""
    name = draw.choice(["n" * 256, "é" * 128, "/".join(["m" * 200] * 21)])
    refuses(lab.run(lab.command("sft", root=lab.work / "places" / name)))


def taken_away(lab: Lab, draw: random.Random, wanted: dict[str, str]) -> None:
    """The stage's folder, or the whole run directory, is deleted or renamed in the middle of the run."""
    root = moved(lab, lab.work / "places" / "vanishing")
    victim, elsewhere = draw.choice([root, root / STAGE]), lab.work / "places" / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    after, is_moved = draw.randrange(5), draw.random() < 0.5
    child = lab.start(lab.command(STAGE, root=root))
    child.until(lambda: progress(root / STAGE) >= after and (root / STAGE / "status.json").exists())
    if is_moved:
        victim.rename(elsewhere)
    else:
        while victim.exists():  # it goes on writing meanwhile
            shutil.rmtree(victim, ignore_errors=True)
    refuses(child.wait())
    assert not (root / STAGE / "model").exists()
    if is_moved:
        shutil.rmtree(victim, ignore_errors=True)
        elsewhere.rename(victim)
        works(lab, lab.run(lab.command(STAGE, root=root)), root, wanted)


def read_only_from_start(lab: Lab, draw: random.Random, wanted: dict[str, str]) -> None:
    """The run directory, or what is above it, cannot be written to."""
    place = lab.work / "places" / f"fixed-{draw.getrandbits(32):08x}"
    root = moved(lab, place / "run")
    read_only(place)
    try:
        name = draw.choice([root, place / "new" / "run"])
        refuses(lab.run(lab.command(STAGE if name == root else "sft", root=name)))
    finally:
        read_only(place, False)
    works(lab, lab.run(lab.command(STAGE, root=root)), root, wanted)


def read_only_after_a_while(lab: Lab, draw: random.Random, wanted: dict[str, str]) -> None:
    """The folder of checkpoints turns read-only in the middle, as after an error of its file system."""
    root, after = moved(lab, lab.work / "places" / f"turning-{draw.getrandbits(32):08x}"), draw.randrange(1, 4)
    checkpoints = root / STAGE / "checkpoints"
    child = lab.start(lab.command(STAGE, root=root))
    child.until(lambda: progress(root / STAGE) >= after and checkpoints.exists())
    while child.is_running():
        try:
            read_only(checkpoints)
            break
        except OSError:  # a file in it is open for writing at this moment
            continue
    try:
        refuses(child.wait())
    finally:
        read_only(checkpoints, False)
    works(lab, lab.run(lab.command(STAGE, root=root)), root, wanted)


Try = Callable[[Lab, random.Random, dict[str, str]], None]
ANYWHERE: tuple[Try, ...] = (in_unusual_place, taken_away, without_home, too_long_a_name)
WITH_MOUNTS: tuple[Try, ...] = (read_only_from_start, read_only_after_a_while)


@row(
    "R15",
    "folder read-only, removed or moved in the middle; no HOME; names with spaces, UTF-8, 255 bytes and more",
    expected="works, with the same bits as anywhere, or exit 7 and one message",
    asked="20",
    quick=3,
    full=24,
)
def hard_places(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: over six kinds of places."""
    draw = random.Random(seed)
    assert (done := lab.run(lab.command(STAGE))).code == 0, done.err
    wanted = digest(lab.root / STAGE)
    lab.clear(STAGE)

    def go(own: Tally, kinds: tuple[Try, ...], count: int) -> None:
        for number in range(count):
            kind = kinds[number % len(kinds)]
            with own.attempt(f"{kind.__name__}, try {number} of seed {seed}"):
                kind(lab, draw, wanted)

    apart(tally, lambda own: go(own, WITH_MOUNTS, tries // 3))
    go(tally, ANYWHERE, tries - tries // 3)
    shutil.rmtree(lab.work / "places", ignore_errors=True)
