"""What torch says of devices is judged beside what the machine shows."""

from __future__ import annotations

from pathlib import Path

from rlhf.doctor.devices import DeviceCheck, driver, judged

GPU = {"name": "H100", "free": 79 * 2**30, "total": 80 * 2**30, "bf16": True}
NODES = [Path("/dev/nvidia0")]


def facts(*devices: dict, built_for: str | None = "12.9") -> dict:
    return {"torch": "2.13.0", "built_for": built_for, "devices": list(devices), "nccl": "2.27"}


def test_the_devices_of_this_machine(tmp_path):
    found = list(DeviceCheck().findings(tmp_path, tmp_path))
    assert found[0].check == "devices" and found[0].state == "ok" and "torch 2." in found[0].found


def test_torch_without_the_gpus_that_are_there(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert [f.state for f in judged(facts(), None, [])] == ["ok"]
    assert [f.state for f in judged(facts(built_for=None), "590.1", NODES)] == ["warning"]
    (dead,) = judged(facts(), None, NODES)
    assert dead.state == "failed" and "CUDA 12.9" in dead.fix
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [f.state for f in judged(facts(), "590.1", NODES)] == ["ok"]


def test_each_gpu_has_its_line():
    busy = {**GPU, "free": 10 * 2**30}
    found = list(judged(facts(GPU, busy, {**GPU, "bf16": False}), "590.1", NODES))
    assert [f.state for f in found] == ["ok", "ok", "warning", "warning"]
    assert "NCCL 2.27, driver 590.1" in found[0].found and found[1].found == "H100, 79 GiB of 80 GiB free, bf16"


def test_the_driver_says_its_version(tmp_path):
    assert driver(tmp_path) is None
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  590.44.01  Release Build\n"
    (tmp_path / "driver" / "nvidia" / "version").write_text(text)
    assert driver(tmp_path) == "590.44.01"
