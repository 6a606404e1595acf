"""Rewards that fail: services that break off, lie or hang, and functions of the user's that hang or crash."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from scripts.reliability.kills import progress, whole_rows
from scripts.reliability.lab import Lab, differing, digest
from scripts.reliability.row import Tally, row
from scripts.reliability.service import serving

TIMEOUT = 0.3
_SLOW = 4 * TIMEOUT  # longer than a client waits
SERVICE_FAULTS = (
    "500",
    "429",
    "silence",
    "drip",
    "drip headers",
    "nan",
    "count",
    "text",
    "garbage",
    "cut",
    "close",
    "404",
)
CODE_FAULTS = {  # fault -> exit code of the run that meets it
    "hang": 2,
    "compute": 2,
    "raise": 2,
    "nan": 2,
    "count": 2,
    "exit": 2,
    "die": -9,
}
CODE = """\
import json, os, re, signal, time
from pathlib import Path

STATE = Path(__file__).with_suffix(".state")


def score(rows, answers):
    scores = [float(len(answer)) for answer in answers]
    state = json.loads(STATE.read_text())
    STATE.write_text(json.dumps({**state, "calls": state["calls"] + 1}))
    if state["calls"] < state["from"]:
        return scores
    fault = state["fault"]
    if fault == "hang":
        time.sleep(60)
    if fault == "compute":
        re.match("(a+)+$", "a" * 40 + "b")
    if fault == "raise":
        raise OSError("no answer")
    if fault == "exit":
        raise SystemExit(0)
    if fault == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"nan": [float("nan"), *scores[1:]], "count": scores[1:]}.get(fault, scores)
"""


@row(
    "R22",
    "a reward service that answers 500 or 429, is silent, drips, says NaN, a wrong count, text or garbage, breaks off,"
    " refuses, for a while or for good; a function of the user's that hangs, raises, returns NaN or too little, exits,"
    " or kills the process",
    expected="bounded tries; no answer unscored or scored 0; exit 8 (a function: 2) with what was learned kept; once"
    " repaired, the same command ends bit-identical to a run without faults",
    asked="100",
    quick=3,
    full=100,
)
def reward_faults(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: two of three meet a service, one a function."""
    draw = random.Random(seed)
    code, functions = lab.work / "reward.py", list(CODE_FAULTS)
    code.write_text(CODE)
    with faulty_service(lab.work / "service.json") as service:
        wanted = {kind: straight(lab, *each) for kind, each in ways(code, service).items()}
        for number in range(tries):
            if number % 3 == 2:
                fault, kind = functions[number // 3 % len(functions)], "function"
                state, expected = code.with_suffix(".state"), CODE_FAULTS[fault]
            else:
                fault, kind = SERVICE_FAULTS[(number - number // 3) % len(SERVICE_FAULTS)], "service"
                state, expected = service.state, 8
            passes = kind == "service" and fault != "404" and draw.random() < 0.3
            first = draw.randrange(4)  # a run makes four calls of a function, eight of a service
            with tally.attempt(f"{kind}: {fault} from call {first}{', passing' if passes else ''}"):
                tell(state, fault, first, 1 if passes else 10**6)
                meet(lab, ways(code, service)[kind], wanted[kind], state, 0 if passes else expected)


class Service:
    """Where the faulty service listens, and the file that tells it what to do."""

    def __init__(self, state: Path, port: int) -> None:
        self.state, self.url = state, f"http://127.0.0.1:{port}/score"


def ways(code: Path, service: Service) -> dict[str, tuple[str, list[str]]]:
    """Stage folder and options for each kind of reward. No samples: they are shown without scores meanwhile."""
    function = {"kind": "function", "function": f"{code}:score", "timeout": TIMEOUT}
    http = {"kind": "http", "url": service.url, "timeout": TIMEOUT, "retries": 1, "batch_size": 16}
    no_samples = ["--set", "log.samples=0"]
    return {
        "function": (
            "r22-function",
            ["--set", f"rewards={json.dumps([function])}", "--allow-code", str(code), *no_samples],
        ),
        "service": ("r22-service", ["--set", f"rewards={json.dumps([http])}", *no_samples]),
    }


def tell(state: Path, fault: str, first: int, times: int) -> None:
    """From which call on what goes wrong, and how often."""
    state.write_text(json.dumps({"fault": fault, "from": first, "times": times, "calls": 0}))


def straight(lab: Lab, name: str, options: list[str]) -> dict[str, str]:
    """The end of a run without faults."""
    for state in (lab.work / "reward.state", lab.work / "service.json"):
        tell(state, "none", 0, 0)
    done = lab.run(lab.command("grpo", "--name", name, *options))
    assert done.code == 0, done.err
    return digest(lab.root / name)


def meet(lab: Lab, way: tuple[str, list[str]], wanted: dict[str, str], state: Path, expected: int) -> None:
    """A run that meets a fault ends as it must; repaired, it ends as if nothing had been."""
    name, options = way
    folder, words = lab.root / name, lab.command("grpo", "--name", name, *options)
    lab.clear(name)
    started = time.monotonic()
    done = lab.run(words)
    assert done.code == expected, f"exit {done.code} for {expected}: {done.err[-600:]}"
    assert time.monotonic() - started < 30, "the tries are not bounded"
    if done.code > 0:
        assert "Traceback" not in done.err, done.err[-600:]
    before = progress(folder)
    calls = json.loads(state.read_text())["calls"]
    if expected:
        tell(state, "none", 0, 0)
        done = lab.run(words)
        assert done.code == 0, done.err
        assert f"after step {before}" in done.err or not before, f"{before} steps were learned: {done.err[-300:]}"
    assert calls, "the fault was never met"
    assert all(row["reward/unscored"] == 0 for row in whole_rows(folder / "metrics.jsonl"))
    assert not (different := differing(digest(folder), wanted)), different


# --- the service -----------------------------------------------------------------------------------------------------


@contextmanager
def faulty_service(state: Path) -> Iterator[Service]:
    """A service that scores by length, and misbehaves as a file says."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(state))
    with serving(server):
        yield Service(state, server.server_port)


class Faulty(BaseHTTPRequestHandler):
    """One request: a good answer, or the fault that is due."""

    state: Path

    def do_POST(self) -> None:  # noqa: N802  the library's name
        posted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        due = json.loads(self.state.read_text())
        self.state.write_text(json.dumps({**due, "calls": due["calls"] + 1}))
        fault = due["fault"] if due["from"] <= due["calls"] < due["from"] + due["times"] else "none"
        with suppress(OSError):  # who asked may have left
            self.reply(fault, [float(len(answer)) for answer in posted["answers"]])

    def reply(self, fault: str, scores: list[Any]) -> None:
        """With a fault of SERVICE_FAULTS, or none."""
        if fault.isdecimal():
            return self.answer(int(fault), b"not now")
        changed = {"nan": [float("nan"), *scores[1:]], "count": scores[1:], "text": ["good", *scores[1:]]}
        body = json.dumps({"scores": changed[fault] if fault in changed else scores}).encode()
        if fault == "close":
            return None
        if fault.startswith("drip"):
            return self.drip(b"HTTP/1.1 200 OK\r\nX-Never: ends" if fault == "drip headers" else body)
        if fault == "silence":
            time.sleep(_SLOW)
        body = b"<html>Sign in</html>" if fault == "garbage" else body
        self.answer(200, body, claimed=len(body) + 100 if fault == "cut" else len(body))

    def answer(self, status: int, body: bytes, claimed: int | None = None) -> None:
        """A whole answer, which may claim to be longer than it is."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        self.end_headers()
        self.wfile.write(body)

    def drip(self, content: bytes) -> None:
        """Byte by byte, each well within what a client waits for the next."""
        if not content.startswith(b"HTTP"):
            self.send_response(200)
            self.end_headers()
        for byte in content:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            time.sleep(TIMEOUT / 8)

    def log_message(self, *_: Any) -> None:
        """Nothing is said on the screen."""


def handler(state: Path) -> type[BaseHTTPRequestHandler]:
    """A handler that does what a file says."""
    return type("Handler", (Faulty,), {"state": state})
