"""The cache of replies: what was kept is there again, whatever a crash has left behind it."""

from __future__ import annotations

import json

import pytest

from rlhf.errors import CheckpointError
from rlhf.rewards.chat_service import Reply
from rlhf.train.replies import ReplyCache, digest


def test_replies_are_kept_by_content_and_survive_a_cut_line(forked, tmp_path):
    def body() -> None:
        cache = ReplyCache(tmp_path / "cache", ["judge", "model"])
        cache.add("a", Reply("Preferred=1"))
        cache.add("b", Reply("2", [{"token": "2", "top_logprobs": []}]))
        whole = cache.path.read_bytes()
        cache.path.write_bytes(whole + b'{"key": "c", "te')
        again = ReplyCache(tmp_path / "cache", ["judge", "model"])
        assert again["a"] == Reply("Preferred=1") and again["b"].logprobs[0]["token"] == "2"
        assert "c" not in again and cache.path.read_bytes() == whole
        again.add("c", Reply("tie"))
        assert [json.loads(line)["key"] for line in again.path.read_text().splitlines()] == ["a", "b", "c"]
        other = ReplyCache(tmp_path / "cache", ["judge", "another model"])
        assert "a" not in other and other.path != cache.path
        cache.path.write_bytes(b"damaged\n" + whole)
        with pytest.raises(CheckpointError, match="found a damaged line"):
            ReplyCache(tmp_path / "cache", ["judge", "model"])

    forked(body)


def test_a_name_depends_on_all_of_the_content_and_not_on_its_order():
    assert digest({"a": 1, "b": [2.0]}) == digest({"b": [2.0], "a": 1})
    assert len({digest(value) for value in ({"a": 1}, {"a": 2}, ["a", 1], {"a": "1"}, "ä")}) == 5
