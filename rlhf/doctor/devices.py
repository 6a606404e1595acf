"""What torch sees of the devices. It runs in a process of its own (`python -m rlhf.doctor.devices`): importing torch
takes seconds, and a broken driver may end the process that asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.doctor.finding import Finding, mebibytes

_START_S = 60.0


def facts() -> dict[str, Any]:
    """In the process that has torch: versions, and every device with its memory in bytes."""
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "built_for": torch.version.cuda, "devices": []}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            one = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            with torch.cuda.device(index):
                bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
                torch.ones(8, device="cuda").sum().item()  # the driver answers, not only lists
            found["devices"].append({"name": one.name, "free": free, "total": total, "bf16": bf16})
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


class DeviceCheck:
    """Asks in the background."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "rlhf.doctor.devices"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def findings(self, dev: Path = Path("/dev"), proc: Path = Path("/proc")) -> Iterator[Finding]:
        """What has come back. dev, proc: where a GPU and its driver would show."""
        try:
            out, err = self._process.communicate(timeout=_START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            fix = "The driver hangs: look at nvidia-smi and dmesg."
            yield Finding.of("devices", f"torch did not answer in {_START_S:.0f} s", failed=fix)
            return
        if self._process.returncode:
            said = (err.strip().splitlines() or [f"exit code {self._process.returncode}"])[-1]
            yield Finding.of("devices", f"torch fails: {said}", failed="Install it anew: README.md, Install.")
            return
        yield from judged(json.loads(out.splitlines()[-1]), driver(proc), sorted(dev.glob("nvidia[0-9]*")))


def driver(proc: Path) -> str | None:
    """The version of NVIDIA's kernel driver; None where there is none."""
    path = proc / "driver" / "nvidia" / "version"
    words = path.read_text().split() if path.is_file() else []
    return next((word for word in words if word[0].isdigit() and "." in word), None)


def judged(found: dict[str, Any], driver: str | None, nodes: list[Path]) -> Iterator[Finding]:
    """found: of `facts`. nodes: device files of GPUs."""
    if not found["devices"]:
        what = f"torch {found['torch']}: CPU only, gloo"
        if not (nodes or driver):
            yield Finding.of("devices", what)
        elif os.environ.get("CUDA_VISIBLE_DEVICES") == "" or os.environ.get("DS_ACCELERATOR") == "cpu":
            yield Finding.of("devices", f"{what}; the GPUs of this machine are hidden by the environment")
        elif found["built_for"] is None:
            fix = "Install torch's CUDA build: pip install --force-reinstall -c constraints.txt torch"
            yield Finding.of("devices", f"{what}, though this machine has GPUs: torch is built for CPUs", warning=fix)
        else:
            fix = f"Driver {driver or 'missing'} must fit CUDA {found['built_for']}: look at nvidia-smi."
            yield Finding.of("devices", f"{what}, though this machine has GPUs: they do not answer", failed=fix)
        return
    yield Finding.of(
        "devices",
        f"torch {found['torch']}, CUDA {found['built_for']}, NCCL {found['nccl']}, driver {driver or 'unknown'}",
    )
    for number, one in enumerate(found["devices"]):
        told = f"{one['name']}, {mebibytes(one['free'])} of {mebibytes(one['total'])} free"
        fix = None
        if not one["bf16"]:
            fix = "It has no bf16: model.dtype=fp32"
        elif one["free"] < 0.9 * one["total"]:
            fix = "Another process holds memory on it: nvidia-smi"
        yield Finding.of(f"device {number}", told + (", bf16" if one["bf16"] else ""), warning=fix)


if __name__ == "__main__":
    print(json.dumps(facts()))
