"""Files that are not as they were written: of a stopped stage's checkpoints, and of a published parent."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from rlhf.errors import CheckpointError, UnsafeError
from rlhf.run import commit
from rlhf.run.rundir import RunDir
from scripts.reliability.kills import progress
from scripts.reliability.lab import Lab, differing, digest
from scripts.reliability.row import Tally, row

NAME = "r9"
COMMANDS = 40  # tries of a full run that go through the whole command; the others look at the files in this process


# ---- damages ---------------------------------------------------------------------------------------------------------


def files(folder: Path) -> list[Path]:
    """All files of a checkpoint, or of a stage's result, its manifest too."""
    listed = json.loads((folder / commit.MANIFEST).read_bytes())["files"]
    return [folder / name for name in sorted(listed)] + [folder / commit.MANIFEST]


def cut(folder: Path, other: Path, draw: random.Random) -> list[str]:
    """Cut a file at any offset."""
    file = draw.choice(files(folder))
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])
    return [file.name]


def flip(folder: Path, other: Path, draw: random.Random) -> list[str]:
    """Turn one bit of a file over."""
    file = draw.choice(files(folder))
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return [file.name]


def drop(folder: Path, other: Path, draw: random.Random) -> list[str]:
    """Delete a file."""
    file = draw.choice(files(folder))
    file.unlink()
    return [file.name]


def swap(folder: Path, other: Path, draw: random.Random) -> list[str]:
    """Exchange two files' contents."""
    while True:
        one, two = draw.sample(files(folder)[:-1], 2)
        contents = one.read_bytes(), two.read_bytes()
        if contents[0] != contents[1]:
            two.write_bytes(contents[0])
            one.write_bytes(contents[1])
            return [one.name, two.name]


def mix(folder: Path, other: Path, draw: random.Random) -> list[str]:
    """Take a file from another step or stage, whose content differs."""
    while True:
        file = draw.choice(files(folder))
        stranger = other / file.relative_to(folder)
        if stranger.is_file() and stranger.read_bytes() != file.read_bytes():
            shutil.copyfile(stranger, file)
            return [file.name, commit.MANIFEST, *([] if file.name != commit.MANIFEST else _names(folder))]


def edit(folder: Path, other: Path, draw: random.Random) -> list[str]:
    """Let the manifest say something else: another number, another hash, a file more or less."""
    path = folder / commit.MANIFEST
    manifest = json.loads(path.read_bytes())
    name = draw.choice(sorted(manifest["files"]))
    change = draw.choice(["number", "hash", "size", "less", "more"])
    if change == "number":
        key = "step" if "step" in manifest else "log_end"
        manifest[key] += draw.choice([-1, 1])
    elif change == "hash":
        manifest["files"][name]["sha256"] = f"{draw.getrandbits(256):064x}"
    elif change == "size":
        manifest["files"][name]["size"] += draw.choice([-1, 1])
    elif change == "less":
        del manifest["files"][name]
    else:
        manifest["files"]["another.bin"] = {"size": 3, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    return [Path(name).name, commit.MANIFEST, "another.bin"]


def configure(folder: Path, other: Path, draw: random.Random) -> list[str]:
    """Another shape or seed in a JSON file that belongs to the content, e.g. the model's config."""
    found = [file for file in files(folder)[:-1] if file.suffix == ".json"]
    found = [file for file in found if any(map(str.isdigit, file.read_text()))]
    file = draw.choice([each for each in found if each.name == "config.json"] or found)
    content = file.read_text()
    digits = [index for index, char in enumerate(content) if char.isdigit()]
    index = draw.choice(digits)
    file.write_text(content[:index] + str((int(content[index]) + draw.randrange(1, 10)) % 10) + content[index + 1 :])
    return [file.name]


DAMAGES: tuple[Callable[[Path, Path, random.Random], list[str]], ...] = (cut, flip, drop, swap, mix, edit, configure)


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def is_harmless(folder: Path, before: dict[str, object]) -> bool:
    """Whether a damaged manifest still says the same: the name of the key of its own hash was hit, nothing else."""
    try:
        now = json.loads((folder / commit.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(now, dict) and all(key == "seal" or now.get(key) == value for key, value in before.items())


# ---- tries -----------------------------------------------------------------------------------------------------------


@row(
    "R9",
    "a file of a checkpoint or of a published parent cut, with a flipped bit, gone, swapped, of another step, edited",
    expected="found before a weight is used, the file named; an older checkpoint is used, bit-identical end, or exit 4",
    asked="500",
    quick=24,
    full=600,
)
def damaged(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: damages; one in fifteen goes through the whole command."""
    draw = random.Random(seed)
    words = lab.command("ppo", "--name", NAME, "--set", "checkpoint.keep=9")
    assert (done := lab.run(words)).code == 0, done.err
    wanted = digest(lab.root / NAME)
    lab.clear(NAME)
    child = lab.start(words)
    child.until(lambda: progress(lab.root / NAME) >= 2)
    child.kill(signal.SIGTERM)
    assert (done := child.wait()).code == 75, done.err
    saved = lab.work / "saved"
    shutil.copytree(lab.root, saved, ignore=shutil.ignore_patterns("cache"))
    whole = max(tries // (600 // COMMANDS), 3)
    counts: Counter[str] = Counter()
    for number in range(tries):
        damage = DAMAGES[number % len(DAMAGES)]
        if number < whole:
            through_command(lab, tally, (words, saved, number), wanted, draw)
        elif number % 2:
            in_checkpoint(lab, tally, saved, damage, draw)
        else:
            in_parent(lab, tally, saved, damage, draw)
        counts[damage.__name__] += 1
    tally.remark(f"{whole} through the command; " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    shutil.rmtree(saved)
    lab.clear(NAME)


def in_checkpoint(lab: Lab, tally: Tally, saved: Path, damage: Callable[..., list[str]], draw: random.Random) -> None:
    """The newest checkpoint damaged: found by the look that a start takes, the older one is chosen."""
    folder = lab.work / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved / NAME / "checkpoints", folder)
    older, newest = commit.checkpoint_dirs(folder)[-2:]
    before = json.loads((newest / commit.MANIFEST).read_bytes())
    names = damage(newest, older, draw)
    with tally.attempt(f"{damage.__name__} in {newest.name}: {names}"):
        found_out(lambda: commit.verify(newest, hash_limit=None), names, newest, before)
        if not is_harmless(newest, before):
            try:
                assert commit.newest_checkpoint(folder, hash_limit=None) in (older, newest)
            except UnsafeError:
                assert commit.MANIFEST in names


def in_parent(lab: Lab, tally: Tally, saved: Path, damage: Callable[..., list[str]], draw: random.Random) -> None:
    """A published stage damaged: found by the look that its children take."""
    root = lab.work / "parents"
    shutil.rmtree(root, ignore_errors=True)
    name, other = draw.sample(["sft", "rm"], 2)
    shutil.copytree(saved / name, root / name)
    before = json.loads((root / name / commit.MANIFEST).read_bytes())
    names = damage(root / name, saved / other, draw)
    with tally.attempt(f"{damage.__name__} in {name}: {names}"):
        stage = RunDir(root).stage(name)
        found_out(lambda: stage.read_manifest(hash_limit=None), names, root / name, before)


def found_out(look: Callable[[], object], names: list[str], folder: Path, before: dict[str, object]) -> None:
    """A look must refuse and name a file that was touched."""
    try:
        look()
    except (CheckpointError, UnsafeError) as error:
        assert any(name in str(error) for name in names), f"{error} does not name {names}"
    else:
        assert commit.MANIFEST in names and is_harmless(folder, before), "not found"


def through_command(
    lab: Lab,
    tally: Tally,
    case: tuple[list[str], Path, int],
    wanted: dict[str, str],
    draw: random.Random,
) -> None:
    """The whole command on a damaged newest checkpoint, on three damaged ones, or with a damaged parent."""
    words, saved, number = case
    damage, place = DAMAGES[number // 3 % len(DAMAGES)], ("newest", "all", "parent")[number % 3]
    shutil.rmtree(lab.root)
    shutil.copytree(saved, lab.root)
    steps = commit.checkpoint_dirs(lab.root / NAME / "checkpoints")
    parent, other = draw.sample(["sft", "rm"], 2)
    hit = {"newest": steps[-1:], "all": steps, "parent": [lab.root / parent]}[place]
    strangers = dict(zip(steps, [*steps[1:], steps[0]], strict=True)) | {lab.root / parent: saved / other}
    names: list[str] = []
    with tally.attempt(f"command, {place}: {damage.__name__}"):
        for folder in hit:
            names += damage(folder, strangers[folder], draw)
        rows = progress(lab.root / NAME)
        done = lab.run(words)
        assert any(name in done.err for name in names), f"{names} not named: {done.err[-1500:]}"
        if place == "newest" and done.code == 0:
            assert not (different := differing(digest(lab.root / NAME), wanted)), different
        else:
            allowed = (4, 9) if commit.MANIFEST in names else (4,)
            assert done.code in allowed and "Traceback" not in done.err, f"exit {done.code}: {done.err[-1500:]}"
            assert place != "newest" or done.code == 9, done.err[-1500:]
            assert progress(lab.root / NAME) == rows and not (lab.root / NAME / "model").exists()
    shutil.rmtree(lab.root)
    shutil.copytree(saved, lab.root)
