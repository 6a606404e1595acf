"""A scorer behind an HTTP address, spoken to with the standard library.

POST {"prompts": [text], "answers": [text], "rows": [object]} as JSON -> {"scores": [number or null]}, one per answer;
null leaves an answer unscored. What may pass (no connection, silence, 429, 5xx, an answer that is not that) is tried
again a bounded number of times, and then ends the run, or leaves its answers unscored, never at 0. What will not pass
(any other status) ends the run at once. Addresses are asked directly, whatever proxies the environment names, and
redirects are not followed.
"""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from rlhf.errors import RecipeError, ServiceError
from rlhf.rewards.base import Column, Row

logger = logging.getLogger("rlhf.rewards")

MAX_BYTES = 1 << 20  # of an answer; 20 characters per score are plenty
_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds before the first further try, doubled for each one after
_CHUNK = 1 << 16
_GIVES_UP = 3  # failed requests in a row


class _Bounded(http.client.HTTPConnection):
    """A connection whose answer must have begun, headers and all, within its timeout, however it drips."""

    def getresponse(self) -> http.client.HTTPResponse:
        late = threading.Event()

        def cut() -> None:
            late.set()
            with suppress(OSError):  # the plain socket's: a TLS one would be changed under its reader
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, cut)
        timer.daemon = True
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()
            if late.is_set():  # whatever the cut made of the answer, an end of the headers too
                raise TimeoutError(f"timed out: no headers within {self.timeout:g} s")


class _BoundedTls(_Bounded, http.client.HTTPSConnection):
    """The same over TLS."""


class _Http(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Bounded, req)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_BoundedTls, req)


# Neither proxies nor redirects: a POST that is sent elsewhere may lose its body, or leave http.
_OPENER = urllib.request.OpenerDirector()
for _handler in (
    _Http(),
    _Https(),
    urllib.request.HTTPDefaultErrorHandler(),
    urllib.request.HTTPErrorProcessor(),
):
    _OPENER.add_handler(_handler)


class PassingError(Exception):
    """What may pass: worth another try. scores: what can be used of the answer all the same."""

    def __init__(self, what: str, scores: Column | None = None) -> None:
        super().__init__(what)
        self.scores = scores


def http_scores(
    rows: list[Row],
    answers: list[str],
    *,
    url: str,
    api_key_env: str | None,
    timeout: float,
    retries: int,
    on_failure: str,
    batch_size: int,
    poll: Callable[[], None] = lambda: None,
) -> Column:
    """What the service at `url` says of the answers, `batch_size` of them per request, None where it says nothing.

    api_key_env: environment variable with the key, if any. timeout: seconds that one try may take. on_failure: "stop"
    raises ServiceError for a request that has failed for good: what was learned until then is kept, and the same
    command goes on to where a service without faults leads. "unscored" goes on; the further requests of this call are
    then tried once, and after three failed ones in a row the rest are not sent: a service that is down must not hold up
    the other ranks. poll: called before every try and while waiting for the next; it raises where asking must end
    early.
    """
    scores: Column = []
    failures: list[str] = []
    in_a_row = 0
    key = read_key(api_key_env, "rewards: http: api_key_env")
    for start in range(0, len(answers), batch_size):
        some, texts = rows[start : start + batch_size], answers[start : start + batch_size]
        if in_a_row >= _GIVES_UP:
            scores += [None] * len(texts)
            continue
        body = _body(some, texts)
        found, failure = _ask(url, body, len(texts), timeout, 0 if failures else retries, key, poll)
        if failure and on_failure == "stop":
            raise ServiceError(
                f"expected scores within {retries + 1} tries, found: {failure}",
                where=f"rewards: http: {shown(url)}",
                fix="Repair the service: the same command resumes. With on_failure=unscored a run does without it.",
            )
        failures += [failure] if failure else []
        in_a_row = in_a_row + 1 if failure else 0
        scores += found
    if failures:
        count = sum(score is None for score in scores)
        logger.warning("%s: %d of %d answers unscored: %s", shown(url), count, len(scores), failures[0])
    return scores


def check_reachable(url: str, timeout: float, where: str, wanted: str = "scorer") -> None:
    """Refuse an address where nobody accepts a connection: one try, nothing is sent. where: the recipe key."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname, port), timeout).close()
    except (OSError, UnicodeError) as error:  # the latter: no name of a host
        raise ServiceError(
            f"expected a {wanted} that accepts connections, found none at {shown(url)}: {error}",
            where=where,
            fix="Start it, or correct the address; it must be reachable from every node.",
        ) from None


def _body(rows: Sequence[Row], answers: Sequence[str]) -> bytes:
    """The request. Of a row those columns that JSON can hold."""
    prompts = [row["prompt"] for row in rows]
    plain = [{key: value for key, value in row.items() if _is_json(value)} for row in rows]
    return json.dumps({"prompts": prompts, "answers": list(answers), "rows": plain}).encode()


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _ask(
    url: str, body: bytes, count: int, timeout: float, retries: int, key: str | None, poll: Callable[[], None]
) -> tuple[Column, str]:
    """One request with its further tries: (scores, why some are missing, empty where none failed)."""
    last = PassingError("")
    for again in range(retries + 1):
        pause(again, poll)
        try:
            answer = exchange(url, body, timeout, bearer(key), wanted="scores", where="rewards: http")
            return _scores(answer, count), ""
        except PassingError as error:
            last = error
        except ServiceError as error:
            raise ServiceError(without_key(error.what, key), where=error.where, fix=error.fix) from None
    return [None] * count if last.scores is None else last.scores, without_key(str(last), key)


def read_key(variable: str | None, where: str) -> str | None:
    """The key in the environment variable that the recipe names. where: the recipe's key, for messages."""
    if variable is None:
        return None
    key = os.environ[variable] if variable in os.environ else ""
    if not key or not key.isascii() or not key.isprintable():
        found = "something else" if key else "none"
        raise RecipeError(
            f"expected a key in the environment variable {variable}, found {found}",
            where=where,
            fix="Set it in the shell that starts the command, or remove the option where none is needed.",
        )
    return key


def bearer(key: str | None) -> dict[str, str]:
    """The header that carries a key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def without_key(text: str, key: str | None) -> str:
    """What may be said: a service may repeat the key that it was sent."""
    return text if key is None else text.replace(key, "(key)")


def seconds_before(again: int) -> float:
    """How long to wait before a try: nothing before the first, 0, then twice as long each time, up to a bound."""
    return min(_PAUSE * 2 ** (again - 1), _LONGEST_PAUSE) if again else 0.0


def pause(again: int, poll: Callable[[], None]) -> None:
    """Wait before a further try, longer each time; `again` counts them, 0 being the first try of all."""
    until = time.monotonic() + seconds_before(again)
    poll()
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, _PAUSE))
        poll()


def exchange(url: str, body: bytes, timeout: float, headers: Mapping[str, str], *, wanted: str, where: str) -> bytes:
    """One try: the body of a good answer. PassingError is worth another, ServiceError is the end.

    wanted, where: for messages, what was asked for and which part of the recipe asks.
    """
    try:
        return _post(url, body, timeout, headers)
    except urllib.error.HTTPError as error:
        raise _status(url, error, wanted, where) from None
    except (OSError, http.client.HTTPException) as error:  # no connection, a broken one, or silence
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise PassingError(f"{type(error).__name__}: {reason}") from None


def _status(url: str, error: urllib.error.HTTPError, wanted: str, where: str) -> PassingError | ServiceError:
    """A status that may pass, or the end."""
    text = ""
    with error, suppress(OSError, http.client.HTTPException):
        text = error.read(200).decode("utf-8", "replace").strip()
    said = f"{error.code} {error.reason}" + (f", {text!r}" if text else "")
    if error.code == 429 or error.code >= 500:
        return PassingError(f"it answered {said}")
    location = error.headers["Location"]
    refused = "The service refuses what it is asked: see that it takes what is posted, at this address."
    return ServiceError(
        f"expected {wanted}, found {said}" + (f", sent on to {location}" if location else ""),
        where=f"{where}: {shown(url)}",
        fix="Write that address in `url`: redirects are not followed." if location else refused,
    )


def _post(url: str, body: bytes, timeout: float, headers: Mapping[str, str]) -> bytes:
    """The body of a good answer, read within `timeout` seconds and MAX_BYTES."""
    deadline = time.monotonic() + timeout
    known = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, body, {**known, **headers}, method="POST")
    answer = b""
    with _OPENER.open(request, timeout=timeout) as response:
        while chunk := response.read1(_CHUNK):
            answer += chunk
            if len(answer) > MAX_BYTES:
                raise PassingError(f"it answered with more than {MAX_BYTES:,} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {timeout:g} s")
        if response.length:  # what was announced and never came
            raise http.client.IncompleteRead(answer, response.length)
    return answer


def _scores(answer: bytes, count: int) -> Column:
    """The scores of an answer; one that is no finite number makes the answer worth another try."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        raise PassingError(f"expected JSON, found {_beginning(answer)}") from None
    scores = found["scores"] if isinstance(found, dict) and "scores" in found else None
    if not isinstance(scores, list):
        raise PassingError(f'expected {{"scores": [...]}}, found {_beginning(answer)}')
    if len(scores) != count:
        raise PassingError(f"expected {count} scores, found {len(scores)}")
    column = [_number(score) for score in scores]
    bad = [score for score, number in zip(scores, column, strict=True) if number is None and score is not None]
    if bad:
        raise PassingError(f"expected finite numbers, found {str(bad[0])[:60]}", column)
    return column


def _number(value: Any) -> float | None:
    """A finite number, None for everything else."""
    try:
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond 1e308
        return None
    return number if math.isfinite(number) else None


def _beginning(answer: bytes) -> str:
    return repr(answer[:60].decode("utf-8", "replace"))


def shown(url: str) -> str:
    """An address without its query, which may hold a key."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
