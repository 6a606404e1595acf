"""Versions are compared as versions, and every shortfall is told with its remedy."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from rlhf.doctor import install
from rlhf.doctor.install import CONSTRAINTS, LauncherCheck, check_versions, numbers


@pytest.mark.parametrize(
    ("older", "newer"), [("2.9.1", "2.10"), ("5.3", "5.23.0"), ("1.26", "2.4.6"), ("2.13.0", "2.13.1+cpu")]
)
def test_versions_compare_by_their_numbers(older, newer):
    assert numbers(older) < numbers(newer)


def test_what_follows_a_release_is_overlooked():
    assert numbers("2.13.0+cpu") == numbers("2.13") == numbers("2.13.0.0")


def test_this_installation_is_above_its_floors():
    found = list(check_versions())
    assert not [finding for finding in found if finding.state == "failed"]
    assert version("torch") in found[-1].found or found[-1].state == "warning"


def test_what_is_missing_too_old_or_untested_is_told(tmp_path):
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("torch==1.0.0\nPyYAML==0.1\n")
    needed = ["torch>=2.10", "no-such-package>=1.0", "pyyaml>=99.0", 'pytest>=999; extra == "dev"']
    found = {finding.check: finding for finding in check_versions(needed, constraints)}
    assert (
        found["no-such-package"].state == "failed"
        and "pip install 'no-such-package>=1.0'" in found["no-such-package"].fix
    )
    assert found["pyyaml"].state == "failed" and "expected 99.0 or newer" in found["pyyaml"].found
    assert found["packages"].state == "warning" and "torch" in found["packages"].found
    assert "(tested: 1.0.0)" in found["packages"].found and "pytest" not in str(found)


def test_the_tested_versions_are_those_of_the_project():
    tested = install.tested_versions(CONSTRAINTS)
    assert {"torch", "transformers", "deepspeed", "pyyaml"} <= tested.keys()


def test_the_launcher_is_really_started():
    assert LauncherCheck().finding().state == "ok"
