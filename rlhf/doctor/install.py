"""The installation: versions against the floors and the tested ones, the launcher, the compiler."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from rlhf import __version__
from rlhf.doctor.finding import Finding

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"  # in a checkout; an installed package has none
_FLOOR = re.compile(r"([A-Za-z0-9._-]+)>=([0-9.]+)$")
_START_S = 60.0


def check_versions(requirements: list[str] | None = None, constraints: Path = CONSTRAINTS) -> Iterator[Finding]:
    """Every package that a run imports, against its floor, then against the versions that the tests ran with.

    requirements: as in the package's metadata; None reads them. Those of an extra are left out.
    """
    yield Finding.of("rlhf", f"{__version__}, Python {platform.python_version()}, {sys.executable}")
    if requirements is None:
        try:
            requirements = requires("rlhf") or []
        except PackageNotFoundError:
            fix = "Install it, so that the versions it needs can be checked: pip install -e ."
            yield Finding.of("packages", "rlhf is imported from a folder and not installed", warning=fix)
            return
    floors = dict(match.groups() for line in requirements if (match := _FLOOR.match(line)))
    assert floors, requirements
    tested = tested_versions(constraints)
    others = []
    for name, floor in floors.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            yield Finding.of(name, "not installed", failed=f"pip install '{name}>={floor}'")
            continue
        if numbers(found) < numbers(floor):
            fix = f"It is the oldest that works and is safe: pip install '{name}>={floor}'"
            yield Finding.of(name, f"expected {floor} or newer, found {found}", failed=fix)
        elif canonical(name) in tested and numbers(found) != numbers(tested[canonical(name)]):
            others.append(f"{name} {found} (tested: {tested[canonical(name)]})")
    if others:
        fix = "What the tests ran with: pip install -c constraints.txt -e ."
        yield Finding.of("packages", ", ".join(others), warning=fix)
    else:
        what = "as tested" if tested else "at or above their floors"
        yield Finding.of("packages", f"{len(floors)} needed, {what}; torch {version_or_none('torch')}")


def version_or_none(name: str) -> str:
    """The version of a package, `none` where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def tested_versions(constraints: Path) -> dict[str, str]:
    """Package -> version of a constraints file; {} where there is none."""
    lines = constraints.read_text(encoding="utf-8").splitlines() if constraints.is_file() else []
    pairs = (line.partition("==") for line in lines)
    return {canonical(name): pinned for name, equals, pinned in pairs if equals}


def canonical(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def numbers(text: str) -> tuple[int, ...]:
    """The release of a version, for comparing: 2.13.0+cpu -> (2, 13); what follows it is overlooked."""
    match = re.match(r"\d+(\.\d+)*", text)
    assert match, text
    parts = [int(part) for part in match.group().split(".")]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


class LauncherCheck:
    """Starts DeepSpeed's runner in the background, since importing it takes seconds."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--help"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finding(self) -> Finding:
        """Whether it starts."""
        try:
            out, _ = self._process.communicate(timeout=_START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            fix = "Python waits for something: look at the disk that holds the packages, and at memory."
            return Finding.of("launcher", f"deepspeed's runner did not start in {_START_S:.0f} s", failed=fix)
        if self._process.returncode or "--num_gpus" not in out:
            said = (out.strip().splitlines() or ["nothing"])[-1]
            fix = "Several devices need it: pip install -c constraints.txt -e ."
            return Finding.of("launcher", f"deepspeed's runner does not start: {said}", failed=fix)
        tools = [name for name in ("ssh", "pdsh") if not shutil.which(name)]
        nodes = f"; no {' and no '.join(tools)}: one node only" if tools else "; ssh and pdsh for several nodes"
        return Finding.of("launcher", f"deepspeed's runner starts{nodes}")


def check_compiler() -> Finding:
    """What torch.compile calls. Optimizers and losses are torch's own: DeepSpeed builds nothing for them."""
    if shutil.which("c++") or shutil.which("g++"):
        return Finding.of("compiler", "c++, for model.attention=flex_attention; nothing else is compiled")
    return Finding.of("compiler", "none; only model.attention=flex_attention needs one")
