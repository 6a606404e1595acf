"""The chat service against a real server that behaves, and one that misbehaves."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from rlhf.errors import RecipeError, ServiceError
from rlhf.recipe.judge_options import PairwiseJudge
from rlhf.rewards import http
from rlhf.rewards.chat_service import ChatService, Reply, chat_url, check_service
from scripts.judge_server import Settings, make_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Settings, str]]:
    monkeypatch.setattr(http, "_PAUSE", 0.01)
    settings = Settings()
    made = make_server(settings, 0)
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    yield settings, f"http://127.0.0.1:{made.server_port}/v1"
    made.shutdown()
    made.server_close()
    thread.join()


def block(url: str, **options: object) -> PairwiseJudge:
    return PairwiseJudge(url=url, model="m", **{"retries": 2, "timeout": 5.0, "concurrency": 2, **options})


def requests(count: int) -> dict[str, dict]:
    return {str(i): {"model": "m", "messages": [{"role": "user", "content": f"question {i}"}]} for i in range(count)}


def ask(url: str, count: int, **options: object) -> dict[str, Reply]:
    return dict(ChatService(block(url, **options)).ask(requests(count)))


def test_every_request_is_posted_once_and_gets_its_reply(server):
    settings, url = server
    found = ask(url, 20, concurrency=8)
    assert found == {str(i): Reply("I see no answer to judge.") for i in range(20)}
    assert sorted(p["messages"][0]["content"] for p in settings.asked) == sorted(f"question {i}" for i in range(20))
    assert ask(url, 0) == {}


def test_requests_are_under_way_together(server):
    settings, url = server
    settings.delay = 0.2
    started = time.monotonic()
    ask(url, 10, concurrency=10)
    assert time.monotonic() - started < 1.5, "one after another they take 2 s"


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://h/v1", "http://h/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        ("https://h:8/x/v1?version=2", "https://h:8/x/v1/chat/completions?version=2"),
        ("http://h", "http://h/chat/completions"),
    ],
)
def test_the_place_of_chats(base, url):
    assert chat_url(base) == url


@pytest.mark.parametrize("fault", ["html", "no_json", "no_choices"])
def test_what_is_no_chat_is_unparsable_at_once(server, fault):
    settings, url = server
    settings.fault = fault
    (reply,) = ask(url, 1).values()
    assert reply.problem == "unparsable" and reply.shown and len(settings.asked) == 1


def test_what_may_pass_is_tried_again_and_then_missing(server):
    settings, url = server
    settings.fault = "error"
    (reply,) = ask(url, 1).values()
    assert reply.problem == "missing" and "503" in reply.shown and len(settings.asked) == 3


def test_a_service_that_is_down_is_soon_left_alone(server):
    settings, url = server
    settings.fault = "error"
    found = ask(url, 100)
    assert len(found) == 100 and {reply.problem for reply in found.values()} == {"missing"}
    assert len(settings.asked) <= 3 * 2 + 6 + 2
    settings.fault = "none"
    assert all(not reply.problem for reply in ask(url, 3).values())


def test_a_silent_service_is_left_after_its_time(server):
    settings, url = server
    settings.fault = "silence"
    started = time.monotonic()
    (reply,) = ask(url, 1, timeout=0.2, retries=1).values()
    assert reply.problem == "missing" and "timed out" in reply.shown and time.monotonic() - started < 2.0


def test_a_refusal_ends_all_and_tells_no_key(server, monkeypatch):
    settings, url = server
    settings.key = "right"
    monkeypatch.setenv("SOME_KEY", "wrong key")
    with pytest.raises(ServiceError, match="expected a verdict, found 401 Unauthorized") as caught:
        ask(url, 50, api_key_env="SOME_KEY")
    assert "wrong key" not in str(caught.value).replace("wrong key in", "") and "(key)" in str(caught.value)
    monkeypatch.setenv("SOME_KEY", "right")
    assert not ask(url, 1, api_key_env="SOME_KEY")["0"].problem


@pytest.mark.parametrize(
    ("key", "found"), [(None, "none"), ("", "none"), ("a\nb", "something else"), ("ä", "something")]
)
def test_a_key_that_cannot_be_sent_is_refused_beforehand(server, monkeypatch, key, found):
    monkeypatch.delenv("SOME_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(RecipeError, match=f"environment variable SOME_KEY, found {found}"):
        check_service(block(server[1], api_key_env="SOME_KEY"))
    check_service(block(server[1]))


def test_a_service_that_is_not_there_is_refused_beforehand():
    with pytest.raises(ServiceError, match="expected a judge that accepts connections, found none"):
        check_service(block("http://127.0.0.1:9/v1"))


def test_it_needs_no_torch():
    code = "import sys, rlhf.rewards.chat_service; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
