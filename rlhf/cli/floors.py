"""Versions below which a library is known to run code from what it only reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata

from rlhf.errors import UnsafeError

FLOORS = {
    "torch": ((2, 10), "before, weights-only reading could be led to run code (CVE-2025-32434, CVE-2026-24747)"),
    "transformers": ((5, 3), "before, a configuration alone could have a model's code run (CVE-2026-4372)"),
    "jinja2": ((3, 1, 5), "before, a chat template could leave its sandbox (CVE-2024-56326)"),
}


def installed() -> dict[str, str]:
    """The versions of those packages here; one that is missing is told where it is imported."""
    found = {}
    for name in FLOORS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def refuse_old(found: Mapping[str, str]) -> None:
    """Refuse versions below the floors; all at once. What comes before a release (2.10.0rc1) is below it."""
    old = []
    for name, version in found.items():
        least, why = FLOORS[name]
        number = re.match(r"(?:\d+!)?(\d+(?:\.\d+)*)(.*)", version)
        release = tuple(map(int, number[1].split("."))) if number else ()
        padded = (*release, 0, 0, 0)[: len(least)]
        if not release or padded < least or (padded == least and _is_before_release(number[2] if number else "")):
            old.append(f"{name} {'.'.join(map(str, least))} or newer, found {version}: {why}")
    if old:
        raise UnsafeError("expected " + "; ".join(old), fix="Update: pip install -U " + " ".join(sorted(found)))


def _is_before_release(rest: str) -> bool:
    return re.match(r"(?:\.0)*[.-]?(?:a|b|c|rc|alpha|beta|pre|preview|dev)", rest) is not None
