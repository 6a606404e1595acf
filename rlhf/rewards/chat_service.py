"""A language model behind an OpenAI-compatible address, asked by several threads at once.

POST {"model", "messages", ...} to URL/chat/completions -> {"choices": [{"message": {"content": text}}]}. What may pass
(no connection, silence, 429, 5xx) is tried again a bounded number of times, and then the reply is missing. What is not
of that form (HTML, no JSON, no choices) is unparsable, at once. What will not pass (any other status) ends the run. The
key is taken from the environment, sent in a header, and left out of all that is said.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from rlhf.errors import ServiceError
from rlhf.recipe.judge_options import EndpointBlock
from rlhf.rewards.http import PassingError, bearer, check_reachable, exchange, pause, read_key, without_key
from rlhf.rewards.verdicts import MISSING, UNPARSABLE

_GIVES_UP = 3  # times as many failed requests in a row as are under way: silent ones come to fill all places
_SHOWN = 200  # characters of what came back


@dataclass(frozen=True)
class Reply:
    """What came back: a text, or the problem and as much of what was said instead as is worth showing."""

    text: str = ""
    logprobs: Any = None  # `logprobs.content` as the service gave it
    problem: str = ""
    shown: str = ""


def chat_url(base: str) -> str:
    """Where chats are completed, of a base address; a query is kept."""
    parts = urlsplit(base)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/chat/completions", parts.query, ""))


def check_service(block: EndpointBlock) -> None:
    """Refuse a key that is not there, and an address where nobody accepts a connection."""
    read_key(block.api_key_env, "judge.api_key_env")
    check_reachable(block.url, block.timeout, "judge.url", wanted="judge")


class ChatService:
    """Asks. `requests` maps names of the caller's choice to bodies."""

    def __init__(self, block: EndpointBlock) -> None:
        self._block, self._url = block, chat_url(block.url)
        self._key = read_key(block.api_key_env, "judge.api_key_env")
        self._lock = threading.Lock()
        self._failed = self._in_a_row = 0
        self._leaving = False

    def ask(self, requests: Mapping[str, dict[str, Any]]) -> Generator[tuple[str, Reply]]:
        """Replies in the order in which they come.

        Once a request has failed for good, the further ones of this call are tried once, and after several in a row the
        rest are not sent.
        """
        self._failed = self._in_a_row = 0
        self._leaving = False
        pool = ThreadPoolExecutor(self._block.concurrency)
        try:
            names = {pool.submit(self._ask, body): name for name, body in requests.items()}
            for done in as_completed(names):
                yield names[done], done.result()
        finally:
            self._leaving = True
            pool.shutdown(cancel_futures=True)

    def _ask(self, body: dict[str, Any]) -> Reply:
        if self._in_a_row >= _GIVES_UP * self._block.concurrency:
            return Reply(problem=MISSING, shown="not sent: too many requests before it have failed")
        last = ""
        for again in range(1 if self._failed else self._block.retries + 1):
            if self._leaving:
                break
            pause(again, lambda: None)
            try:
                answer = self._exchange(json.dumps(body).encode())
            except PassingError as error:
                last = str(error)
            else:
                self._in_a_row = 0
                return self._read(answer)
        with self._lock:
            self._failed += 1
            self._in_a_row += 1
        return Reply(problem=MISSING, shown=without_key(last, self._key))

    def _exchange(self, body: bytes) -> bytes:
        try:
            return exchange(self._url, body, self._block.timeout, bearer(self._key), wanted="a verdict", where="judge")
        except ServiceError as error:
            raise ServiceError(without_key(error.what, self._key), where=error.where, fix=error.fix) from None

    def _read(self, answer: bytes) -> Reply:
        try:
            found = json.loads(answer)
        except (ValueError, RecursionError):
            found = None
        match found:
            case {"choices": [{"message": {"content": str(text)}, "logprobs": {"content": list(logprobs)}}, *_]}:
                return Reply(text, logprobs)
            case {"choices": [{"message": {"content": str(text)}}, *_]}:
                return Reply(text)
        said = without_key(answer[: 4 * _SHOWN].decode("utf-8", "replace"), self._key)
        return Reply(problem=UNPARSABLE, shown=said[:_SHOWN])
