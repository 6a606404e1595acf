"""Tokenised rows of a run directory: kept once, read back equal, made anew where anything about them is different."""

from __future__ import annotations

import json
import logging
from functools import partial

import numpy as np
import pytest

from rlhf.data.chat import set_template
from rlhf.data.examples import load_examples
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.schema import DataBlock
from rlhf.run import commit
from rlhf.train import token_cache
from rlhf.train.token_cache import cache_key, cached_examples


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "pairs.jsonl"
    told = [{"prompt": f"why {i}?", "chosen": f"because {i}", "rejected": "no" * (1 + i % 3)} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in told))
    return DataBlock(path=str(path), eval_rows=5, max_length=64)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(["why because no 0123456789"] * 9, 300, None)
    set_template(made, "plain")
    return made


def key_of(data, tokenizer, kind="pairs", seed=0, content="a"):
    return cache_key(data, tokenizer, kind, seed, {"data": content})


def same(one, other):
    assert one.report == other.report
    for part in ("train", "eval"):
        assert len(getattr(one, part)) == len(getattr(other, part))
        for a, b in zip(getattr(one, part), getattr(other, part), strict=True):
            assert (a.row, a.margin, a.weight, a.scores) == (b.row, b.margin, b.weight, b.scores)
            for name in ("prompt_ids", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"):
                assert np.array_equal(getattr(a, name), getattr(b, name))


def never():
    raise AssertionError("tokenised again")


def test_the_second_start_reads_what_the_first_has_kept(forked, rows, tokenizer, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(token_cache, "LEAST_TOKENS", 1)
    caplog.set_level(logging.INFO, "rlhf")

    def body():
        load = partial(load_examples, rows, tokenizer, "pairs", 0)
        key, folder = key_of(rows, tokenizer), tmp_path / "cache"
        same(cached_examples(folder, key, load), load())
        assert "tokenised rows kept in" in caplog.text
        same(cached_examples(folder, key, never), load())
        assert f"tokenised rows read from {folder}" in caplog.text

    forked(body)


@pytest.mark.parametrize("damage", ["cut", "changed", "no manifest", "left half-written"])
def test_what_is_damaged_is_made_anew(forked, rows, tokenizer, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(token_cache, "LEAST_TOKENS", 1)

    def body():
        load = partial(load_examples, rows, tokenizer, "pairs", 0)
        key, folder = key_of(rows, tokenizer), tmp_path / "cache"
        path = folder / f"tokens-{key}"
        cached_examples(folder, key, load)
        file = path / "train.arrow"
        content = bytearray(file.read_bytes())
        if damage == "cut":
            file.write_bytes(content[:-9])
        elif damage == "changed":
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        elif damage == "no manifest":
            (path / "MANIFEST.json").unlink()
        else:
            path.rename(path.with_name(f".tmp-{path.name}"))
        with pytest.raises(AssertionError, match="tokenised again"):
            cached_examples(folder, key, never)
        same(cached_examples(folder, key, load), load())
        commit.verify(path, hash_limit=None)
        assert [found.name for found in folder.iterdir()] == [path.name]

    forked(body)


def test_every_difference_has_a_key_of_its_own(rows, tokenizer):
    other = train_tokenizer(["quite other words"] * 9, 280, None)
    set_template(other, "plain")
    templated = train_tokenizer(["why because no 0123456789"] * 9, 300, None)
    set_template(templated, "plain")
    templated.chat_template = templated.chat_template + " "
    keys = [
        key_of(rows, tokenizer),
        key_of(rows, tokenizer, kind="answers"),
        key_of(rows, tokenizer, seed=1),
        key_of(rows, tokenizer, content="b"),
        key_of(rows.model_copy(update={"max_length": 32}), tokenizer),
        key_of(rows.model_copy(update={"eval_rows": 6}), tokenizer),
        key_of(rows, other),
        key_of(rows, templated),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of(rows, tokenizer) == keys[0]
    assert key_of(rows, tokenizer, content="hub:owner/name@main/None/None/train") is None


def test_little_data_and_a_full_disk_do_without(forked, rows, tokenizer, tmp_path, monkeypatch, caplog):
    def body():
        load = partial(load_examples, rows, tokenizer, "pairs", 0)
        folder = tmp_path / "cache"
        same(cached_examples(folder, key_of(rows, tokenizer), load), load())
        assert not folder.exists()
        monkeypatch.setattr(token_cache, "LEAST_TOKENS", 1)
        folder.write_text("in the way")
        same(cached_examples(folder, key_of(rows, tokenizer), load), load())
        assert "not kept for the next start" in caplog.text

    forked(body)
