"""A tokenizer that was trained for a stage: whole or not at all, and the same on the next start."""

from __future__ import annotations

import shutil

import pytest

pytestmark = pytest.mark.pipeline


@pytest.fixture
def unfinished(tiny):
    """The `sft` stage before its publication."""
    folder = tiny.root / "sft-unfinished"
    shutil.copytree(tiny.root / "sft", folder, ignore=shutil.ignore_patterns("MANIFEST.json", "model"))
    shutil.copytree(tiny.root / "sft" / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    yield folder
    shutil.rmtree(folder)


def test_what_a_killed_start_left_of_it_is_made_anew(cli, tiny, unfinished):
    (unfinished / "tokenizer").rename(unfinished / ".tmp-tokenizer")
    (unfinished / ".tmp-tokenizer" / "tokenizer_config.json").unlink()
    done = cli(*tiny.command("sft", "--name", unfinished.name))
    assert done.code == 0, done.err
    assert not (unfinished / ".tmp-tokenizer").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        files = [folder / "tokenizer" / name for folder in (unfinished, tiny.root / "sft")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_one_that_was_changed_is_not_taken_up_but_made_anew(cli, tiny, unfinished):
    file = unfinished / "tokenizer" / "tokenizer.json"
    file.write_text(file.read_text().replace('"the"', '"thx"', 1) + " ")
    done = cli(*tiny.command("sft", "--name", unfinished.name))
    assert done.code == 0 and "tokenizer.json" in done.err and "made anew" in done.err, done.err
    assert file.read_bytes() == (tiny.root / "sft" / "tokenizer" / "tokenizer.json").read_bytes()
