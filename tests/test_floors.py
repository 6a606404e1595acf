"""Versions of libraries that are known to run code from what they read are refused."""

from __future__ import annotations

import pytest

from rlhf.cli.floors import FLOORS, installed, refuse_old
from rlhf.errors import UnsafeError

NEW = {"torch": "2.10.0", "transformers": "5.3.0", "jinja2": "3.1.5"}


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("torch", "2.9.1"), ("torch", "2.5.1+cu121"), ("torch", "1.13"), ("torch", "2.10.0rc1"),
        ("torch", "2.10.0a0+git123"), ("torch", "2.10.dev20260101"), ("torch", "nonsense"),
        ("transformers", "5.2.9"), ("transformers", "4.57.0"), ("transformers", "5.3.0.dev0"),
        ("jinja2", "3.1.4"), ("jinja2", "3.0"), ("jinja2", "2.11.3"),
    ],
)  # fmt: skip
def test_older_ones_are_refused(name, version):
    with pytest.raises(UnsafeError, match=rf"{name} .* or newer, found") as refusal:
        refuse_old({**NEW, name: version})
    assert refusal.value.exit_code == 9 and "pip install -U" in str(refusal.value)


@pytest.mark.parametrize(
    "versions",
    [NEW, {"torch": "2.13.0+cpu"}, {"torch": "3.0"}, {"torch": "2.10"}, {"jinja2": "3.1.10"}, {"jinja2": "3.2"},
     {"transformers": "6.0.0rc1"}, {"torch": "2.10.0.post1"}, {}],
)  # fmt: skip
def test_newer_ones_pass(versions):
    refuse_old(versions)


def test_all_are_told_at_once():
    with pytest.raises(UnsafeError, match=r"torch 2.10 .*transformers 5.3 .*jinja2 3.1.5 "):
        refuse_old({"torch": "2.0", "transformers": "4.0", "jinja2": "3.0"})


def test_what_is_installed_here_is_looked_at():
    assert installed().keys() == FLOORS.keys()
    refuse_old(installed())


def test_every_stage_asks_before_anything_else(monkeypatch):
    """The version is data: a stage that starts beside an old torch is refused although its recipe does not exist."""
    from pathlib import Path

    from rlhf.cli import floors
    from rlhf.cli.stages import StageCommand, run_stage

    monkeypatch.setitem(floors.FLOORS, "torch", ((99, 0), "a test"))
    with pytest.raises(UnsafeError, match="torch 99.0 or newer"):
        run_stage(StageCommand("sft", Path("none.yaml"), Path("none")))
