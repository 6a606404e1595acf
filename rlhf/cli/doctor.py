"""`rlhf doctor`: every check of the machine and the installation, one line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rlhf.doctor.finding import Finding

out = Console(highlight=False)
_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


def examine(run: Path | None, *, selftest: bool, as_json: bool) -> None:
    """Print what is found as soon as it is; exit 1 where anything has failed."""
    seen = []
    for finding in findings(run, selftest=selftest):
        seen.append(finding)
        if not as_json:
            show(finding)
    if as_json:
        print(json.dumps([asdict(finding) for finding in seen], indent=2))
    failed, warnings = (sum(each.state == state for each in seen) for state in ("failed", "warning"))
    if not as_json:
        out.print(f"{len(seen)} checks: {failed} failed, {warnings} warnings")
        if not failed and not selftest:
            out.print("next: rlhf doctor --selftest")
    if failed:
        sys.exit(1)


def show(finding: Finding) -> None:
    """The line, and the remedy below it."""
    state = f"[{_STYLES[finding.state]}]{finding.state:7}[/]"
    out.print(f"{state}  {escape(finding.check):17} {escape(finding.found)}", soft_wrap=True)
    if finding.fix:
        out.print(f"{'':27}{finding.fix}", markup=False, soft_wrap=True)


def findings(run: Path | None, *, selftest: bool) -> Iterator[Finding]:
    """The checks in order. What takes seconds runs beside the others."""
    from rlhf.doctor import disk, install, machine
    from rlhf.doctor.devices import DeviceCheck

    devices, launcher = DeviceCheck(), install.LauncherCheck()
    yield from install.check_versions()
    yield install.check_compiler()
    yield machine.check_cpu()
    yield machine.check_memory()
    yield machine.check_files()
    yield machine.check_umask()
    yield machine.check_shared_memory()
    yield machine.check_ports()
    yield machine.check_host_name()
    yield from machine.check_interfaces()
    yield machine.check_hub()
    yield machine.check_extensions()
    if run is not None:
        yield from disk.check_disk(run)
    yield from devices.findings()
    yield launcher.finding()
    if selftest:
        from rlhf.doctor.selftest import selftest as prove

        yield from prove()
