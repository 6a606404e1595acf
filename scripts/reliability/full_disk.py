"""A disk that is really full, at any moment of a run."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections import Counter
from pathlib import Path

from rlhf.run import commit
from rlhf.run.disk import free_bytes
from scripts.reliability.kills import progress
from scripts.reliability.lab import Lab, differing, digest
from scripts.reliability.mounts import apart, small_disk
from scripts.reliability.row import Tally, row

_CASES = (("dpo", 1), ("ppo", 1), ("sft", 1), ("sft", 2))  # stage, ranks
_DISK = 64 * 2**20
_AMOUNTS = re.compile(r"([\d,]+) bytes needed, ([\d,]+) free")
_SPARE = 200_000  # bytes that are left at most where a moment is chosen by what is free


def keep_all_tokens() -> None:
    """In a command: rows are few here, and kept all the same."""
    from rlhf.train import token_cache

    token_cache.LEAST_TOKENS = 1


def fill(disk: Path, left: int) -> Path:
    """Fill a disk up to some bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        amount = free_bytes(disk) - left
        try:
            while amount > 0:
                amount -= file.write(bytes(min(amount, 2**20)))
        except OSError:  # full to the last byte
            pass
    return filler


@row(
    "R8",
    "a disk that is full: from the start with a little left, or from a moment on, up to the export",
    expected="exit 7 with the bytes needed and free; older checkpoint valid; with room again bit-identical",
    asked="20",
    quick=2,
    full=20,
)
def full_disk(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: runs, over three stages and, where there are as many, two ranks."""
    straight = {}
    for case in _CASES[:tries]:
        words = lab.command(case[0], "--name", named(case))
        assert (done := lab.run(words, ranks=case[1], before=keep_all_tokens)).code == 0, done.err
        straight[case] = digest(lab.root / named(case))
    apart(tally, lambda own: fill_up(lab, own, tries, random.Random(seed), straight))
    for case in straight:
        lab.clear(named(case))


Case = tuple[str, int]


def named(case: Case) -> str:
    """The name of a case's stage folder."""
    return f"r8-{case[0]}{case[1]}"


def fill_up(lab: Lab, tally: Tally, tries: int, draw: random.Random, straight: dict[Case, dict[str, str]]) -> None:
    """Every try on an empty disk that holds a run directory with the parents."""
    disk = lab.work / "small"
    places: Counter[str] = Counter()
    for number in range(tries):
        case = list(straight)[number % len(straight)]
        small_disk(disk, _DISK)
        root = disk / "run"
        root.mkdir()
        for parent in ("sft", "rm"):
            shutil.copytree(lab.root / parent, root / parent)
        full_once(lab, tally, (case, number), root, draw, straight[case], places)
        os.system(f"umount -l '{disk}'")
    tally.remark("full at: " + ", ".join(f"{place} {count}" for place, count in sorted(places.items())))


def full_once(
    lab: Lab,
    tally: Tally,
    which: tuple[Case, int],
    root: Path,
    draw: random.Random,
    wanted: dict[str, str],
    places: Counter[str],
) -> None:
    """A disk that becomes full, the end of the command, and the same command with room again."""
    case, number = which
    (stage, ranks), name, disk = case, named(case), root.parent
    words = lab.command(stage, "--name", name, root=root)
    # At the start a little is left, so that tokens or the first files do not fit; or all is gone after some steps, the
    # last of them before the export.
    after = None if number // len(_CASES) % 2 else draw.choice([1, 2, 4, 6 if stage != "ppo" else 4])
    left = draw.randrange(_SPARE) if after is None else 0
    with tally.attempt(f"{name} with {left} bytes left, after step {after}"):
        filler = fill(disk, left) if after is None else disk / "filler"
        child = lab.start(words, ranks=ranks, before=keep_all_tokens)
        if after is not None and child.until(lambda: progress(root / name) >= after):
            fill(disk, left)
        done = child.wait()
        if done.code != 0:
            assert done.code == 7, f"exit {done.code}: {done.err[-1500:]}"
            last = done.err[done.err.index("error: ") :]
            assert _AMOUNTS.search(last) and "Traceback" not in done.err, done.err[-1500:]
            places[place(last)] += 1
        else:
            places["nothing that mattered"] += 1
        checkpoints = root / name / "checkpoints"
        if commit.checkpoint_dirs(checkpoints):
            assert commit.newest_checkpoint(checkpoints, hash_limit=None)
        filler.unlink(missing_ok=True)
        again = lab.run(words, ranks=ranks, before=keep_all_tokens)
        assert again.code == 0, again.err[-1500:]
        assert not (different := differing(digest(root / name), wanted)), different


def place(message: str) -> str:
    """Which write it was."""
    for word, name in (
        ("checkpoints", "checkpoint"),
        ("jsonl", "log"),
        (".tmp-", "export"),
        ("MANIFEST", "export"),
        ("status", "status"),
    ):
        if word in message.splitlines()[0]:
            return name
    return "opening"
