"""A place for scenarios of the reliability sheet."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """Tiny data and recipes, and a run directory with two finished stages."""
    from scripts.reliability.lab import Lab

    return Lab.made(tmp_path_factory.mktemp("lab") / "lab")
