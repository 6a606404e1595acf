"""The HTTP scorer against a real server that behaves, and one that misbehaves in every way."""

from __future__ import annotations

import datetime
import json
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf.errors import RecipeError, ServiceError, StoppedError
from rlhf.rewards import http
from rlhf.rewards.http import check_reachable, http_scores

Reply = Callable[[int, dict[str, Any]], tuple[int, Any]]  # (number of the request, what was posted) -> status, answer


class Service:
    """What was asked of the server, and what it is to answer: bytes as they are, anything else as JSON."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.reply: Reply = lambda number, posted: (200, {"scores": [len(answer) for answer in posted["answers"]]})
        self.headers: dict[str, str] = {}
        self.keys: list[str | None] = []
        self.delay = 0.0
        self.drip = 0.0  # seconds between bytes
        self.url = ""

    def handler(self) -> type[BaseHTTPRequestHandler]:
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802  the library's name
                posted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.headers["Content-Type"] == "application/json"
                service.asked.append(posted)
                service.keys.append(self.headers["Authorization"])
                time.sleep(service.delay)
                status, answer = service.reply(len(service.asked), posted)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    for name, value in service.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    for i in range(0, len(body), 1 if service.drip else len(body)):
                        self.wfile.write(body[i : i + 1] if service.drip else body)
                        time.sleep(service.drip)
                except OSError:  # who asked is gone
                    pass

            def do_GET(self) -> None:  # noqa: N802
                raise AssertionError("nothing is ever fetched")

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(http, "_PAUSE", 0.01)
    found = Service()
    server = ThreadingHTTPServer(("127.0.0.1", 0), found.handler())
    found.url = f"http://127.0.0.1:{server.server_port}/score"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def ask(service: Service, answers: list[str], **changes: Any) -> list[float | None]:
    rows = [{"row": i, "prompt": f"p{i}", "messages": []} for i, _ in enumerate(answers)]
    limits = {"timeout": 5.0, "retries": 2, "on_failure": "unscored", "batch_size": 4}
    options = {"url": service.url, "api_key_env": None, **limits, **changes}
    return http_scores(rows, answers, **options)


def test_answers_are_posted_in_batches_and_scored_in_order(service: Service) -> None:
    assert ask(service, ["a", "bb", "", "dddd", "é\n\U0001f600"]) == [1.0, 2.0, 0.0, 4.0, 3.0]
    assert [posted["answers"] for posted in service.asked] == [["a", "bb", "", "dddd"], ["é\n\U0001f600"]]
    assert service.asked[0].keys() == {"prompts", "answers", "rows"}
    assert service.asked[1]["prompts"] == ["p4"] and service.asked[1]["rows"][0]["row"] == 4


def test_columns_that_json_cannot_hold_are_left_out(service: Service) -> None:
    row = {"prompt": "p", "answer": 7, "when": datetime.date(2024, 1, 1), "raw": b"x", "nan": float("nan"), "l": [None]}
    options = {"api_key_env": None, "timeout": 5.0, "retries": 0, "on_failure": "stop", "batch_size": 1}
    assert http_scores([row], ["abc"], url=service.url, **options) == [3.0]
    assert service.asked[0]["rows"] == [{"prompt": "p", "answer": 7, "l": [None]}]


def test_null_is_unscored_without_another_try(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.reply = lambda number, posted: (200, {"scores": [0, None, -1.5]})
    assert ask(service, ["a", "b", "c"]) == [0.0, None, -1.5]
    assert len(service.asked) == 1 and not caplog.records


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_what_passes_is_tried_again(service: Service, status: int) -> None:
    service.reply = lambda number, posted: (status, b"busy") if number < 3 else (200, {"scores": [1, 2]})
    assert ask(service, ["a", "b"]) == [1.0, 2.0]
    assert len(service.asked) == 3


BAD = {
    "an error": (500, b"broken", "500 Internal Server Error, 'broken'"),
    "no JSON": (200, b"<html>", "expected JSON, found '<html>'"),
    "nothing": (200, b"", "expected JSON, found ''"),
    "deep JSON": (200, b"[" * 100_000, "expected JSON"),
    "a list": (200, [1, 2], 'expected {"scores": [...]}'),
    "no list": (200, {"scores": 1}, 'expected {"scores": [...]}'),
    "a wrong count": (200, {"scores": [1.0]}, "expected 2 scores, found 1"),
    "too many": (200, {"scores": [1.0, 2.0, 3.0]}, "expected 2 scores, found 3"),
    "far too much": (200, b'{"scores": [1, 2], "why": "' + b"x" * http.MAX_BYTES + b'"}', "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_request_that_fails_for_good_is_unscored_and_told(
    service: Service, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    status, answer, words = BAD[name]
    service.reply = lambda number, posted: (status, answer)
    assert ask(service, ["a", "b"]) == [None, None]
    assert len(service.asked) == 3
    (record,) = caplog.records
    assert "2 of 2 answers unscored" in record.getMessage() and words in record.getMessage()
    assert record.levelno == logging.WARNING


@pytest.mark.parametrize("name", [*BAD, "no number"])
def test_a_request_that_fails_for_good_ends_the_run_where_that_is_asked(service: Service, name: str) -> None:
    status, answer, words = {**BAD, "no number": (200, b'{"scores": [1, NaN]}', "expected finite numbers, found nan")}[
        name
    ]
    service.reply = lambda number, posted: (status, answer)
    with pytest.raises(ServiceError, match="expected scores within 3 tries, found: ") as caught:
        ask(service, ["a", "b", "c", "d", "e"], batch_size=2, on_failure="stop", url=service.url + "?key=secret")
    assert words in str(caught.value) and "the same command resumes" in str(caught.value)
    assert service.url in str(caught.value) and "secret" not in str(caught.value)
    assert len(service.asked) == 3 and caught.value.exit_code == 8


def test_null_and_what_passes_do_not_end_a_run(service: Service) -> None:
    service.reply = lambda number, posted: (503, b"") if number < 3 else (200, {"scores": [None, 1]})
    assert ask(service, ["a", "b"], on_failure="stop") == [None, 1.0]


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, '"x"', "true", "[1]", "{}"]
)
def test_what_is_no_finite_number_leaves_its_answer_unscored_and_keeps_the_others(service: Service, value: str) -> None:
    service.reply = lambda number, posted: (200, f'{{"scores": [2.5, {value}]}}'.encode())
    assert ask(service, ["a", "b"]) == [2.5, None]
    assert len(service.asked) == 3


def test_a_number_that_recovers_is_used(service: Service) -> None:
    service.reply = lambda number, posted: (200, b'{"scores": [NaN]}' if number == 1 else {"scores": [4]})
    assert ask(service, ["a"]) == [4.0]


def test_a_slow_service_is_left_after_its_time(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.delay = 1.0
    started = time.monotonic()
    assert ask(service, ["a"], timeout=0.2, retries=1) == [None]
    assert time.monotonic() - started < 0.9
    assert "timed out" in caplog.records[0].getMessage()


def test_a_service_that_drips_is_left_after_its_time(service: Service) -> None:
    service.drip = 0.05  # 16 bytes take 0.8 s, each of them far less than the timeout
    started = time.monotonic()
    assert ask(service, ["a"], timeout=0.2, retries=0) == [None]
    assert time.monotonic() - started < 0.6


def test_headers_that_drip_are_left_after_their_time(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Never: ")
                while True:
                    connection.sendall(b"x")
                    time.sleep(0.05)

        thread = threading.Thread(target=drip)
        thread.start()
        started = time.monotonic()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        assert ask(service, ["a"], url=url, timeout=0.3, retries=0) == [None]
        assert time.monotonic() - started < 1.0
        thread.join()
    assert "no headers within 0.3 s" in caplog.records[0].getMessage()


def test_an_answer_that_breaks_off_is_tried_again(service: Service) -> None:
    service.headers = {"Content-Length": "1000"}
    service.reply = lambda number, posted: (200, b'{"scores": [1')
    assert ask(service, ["a"], retries=1) == [None]
    assert len(service.asked) == 2


def test_once_a_request_has_failed_the_others_are_tried_once(service: Service) -> None:
    service.reply = lambda number, posted: (500, b"") if "bad" in posted["answers"] else (200, {"scores": [1]})
    assert ask(service, ["a", "bad", "c", "bad", "e"], batch_size=1) == [1.0, None, 1.0, None, 1.0]
    assert [posted["answers"][0] for posted in service.asked] == ["a", *["bad"] * 3, "c", "bad", "e"]


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refusal_ends_the_run_at_once(service: Service, status: int) -> None:
    service.reply = lambda number, posted: (status, b"no such model")
    with pytest.raises(ServiceError, match=f"expected scores, found {status} .*, 'no such model'") as caught:
        ask(service, ["a"], url=service.url + "?key=secret")
    assert service.url in str(caught.value) and "secret" not in str(caught.value)
    assert len(service.asked) == 1 and caught.value.exit_code == 8


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("target", ["/other", "file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_redirects_are_refused(service: Service, status: int, target: str) -> None:
    service.reply = lambda number, posted: (status, b"")
    service.headers = {"Location": target}
    with pytest.raises(ServiceError, match=f"found {status} .*, sent on to {target}") as caught:
        ask(service, ["a"])
    assert "redirects are not followed" in str(caught.value) and len(service.asked) == 1


def test_proxies_of_the_environment_are_not_used(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(service, ["abc"]) == [3.0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_service_that_is_gone_is_unscored(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(service, ["a", "b"], url=f"http://127.0.0.1:{free_port()}/") == [None, None]
    assert "Connection refused" in caplog.records[0].getMessage()


def test_an_address_is_reachable_where_a_connection_is_accepted(service: Service) -> None:
    check_reachable(service.url, 5.0, "rewards.0.url")
    assert not service.asked
    for host in (f"127.0.0.1:{free_port()}", "a" * 64 + ".invalid", "no-such-host.invalid"):
        with pytest.raises(ServiceError, match="expected a scorer that accepts connections") as caught:
            check_reachable(f"http://{host}/score?key=secret", 2.0, "rewards.0.url")
        assert str(caught.value).startswith("rewards.0.url: ") and "secret" not in str(caught.value)


def test_pauses_double_up_to_a_bound(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_PAUSE", 0.5)
    assert [http.seconds_before(again) for again in range(8)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    monkeypatch.setattr(http, "_PAUSE", 0.1)
    service.reply = lambda number, posted: (503, b"")
    started = time.monotonic()
    assert ask(service, ["a"], retries=2) == [None] and len(service.asked) == 3
    assert time.monotonic() - started >= 0.3


def test_http_needs_no_torch() -> None:
    code = "import sys, rlhf.rewards.http; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nobody_waits_for_a_service_when_asked_to_stop(service: Service) -> None:
    def poll() -> None:
        if service.asked:
            raise StoppedError("stopped")

    started = time.monotonic()
    with pytest.raises(StoppedError):
        ask(service, ["a"] * 9, poll=poll)
    assert len(service.asked) == 1 and time.monotonic() - started < 5.0


# --- keys -------------------------------------------------------------------------------------------------------------


def test_the_key_goes_into_a_header_and_into_nothing_that_is_said(service, monkeypatch, caplog):
    monkeypatch.setenv("MY_KEY", "canary-123")
    assert ask(service, ["ab"]) == [2.0] and service.keys == [None]
    assert ask(service, ["ab"], api_key_env="MY_KEY") == [2.0] and service.keys[1] == "Bearer canary-123"
    service.reply = lambda number, posted: (500, b"I do not like canary-123")
    assert ask(service, ["ab"], api_key_env="MY_KEY", retries=0) == [None]
    assert "I do not like (key)" in caplog.text and "canary" not in caplog.text
    service.reply = lambda number, posted: (401, b"who is canary-123?")
    with pytest.raises(ServiceError, match=r"who is \(key\)\?") as refusal:
        ask(service, ["ab"], api_key_env="MY_KEY")
    assert "canary" not in str(refusal.value)


@pytest.mark.parametrize(("value", "found"), [(None, "none"), ("", "none"), ("a\nb", "something else")])
def test_a_key_that_is_not_there(service, monkeypatch, value, found):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(RecipeError, match=f"environment variable MY_KEY, found {found}"):
        ask(service, ["ab"], api_key_env="MY_KEY")
