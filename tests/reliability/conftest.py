import pytest


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    from scripts.reliability.lab import Lab

    return Lab.made(tmp_path_factory.mktemp("lab") / "lab")
