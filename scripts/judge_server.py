"""A stand-in for a language model that judges: an OpenAI-compatible server that knows the demo's gold reward.

    python -m scripts.judge_server --port 8123

It reads the sections of our default templates ([Prompt], [Answer 1], ...) and says `Preferred=1|2|tie` or `Score: N`.
--noise makes it err as people do, --bias makes it favour what is shown first, and --fault makes it misbehave, so that
what a run makes of such a service can be tried out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rlhf.data.demo import gold_reward, score_of

FAULTS = ("none", "html", "error", "silence", "nonsense", "no_choices", "no_json", "refuse")
_SECTION = re.compile(
    r"\[(Prompt|Answer|Answer 1|Answer 2)\]\n(.*?)(?=\n\[(?:Answer|Answer 1|Answer 2|End)\]\n)", re.DOTALL
)
_HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head><body>Please sign in to go on.</body></html>"


@dataclass
class Settings:
    """How the server judges and misbehaves. Tests change it while it runs."""

    noise: float = 0.0  # scale of the Gumbel noise on every answer's gold reward; 1: as noisy as demo:pairs
    bias: float = 0.0  # added to the reward of what is shown first
    seed: int = 0
    fault: str = "none"
    share: float = 1.0  # of the requests that get the fault, drawn by what they ask
    delay: float = 0.0  # seconds before every reply
    key: str | None = None  # asked for in the Authorization header
    asked: list[dict[str, Any]] = field(default_factory=list)  # every request that was understood


def judged(settings: Settings, text: str) -> tuple[str, float | None]:
    """(reply, probability that it prefers the first answer or None) to a question made by one of our templates."""
    sections = dict(_SECTION.findall(text))
    if "Prompt" not in sections:
        return "I see no answer to judge.", None
    prompt = sections["Prompt"]
    if "Answer" in sections:
        value = gold_reward(prompt, sections["Answer"]) + noise_of(settings, prompt, sections["Answer"])
        return f"Score: {score_of(max(-4.0, min(4.0, value)))}", None
    first, second = (
        gold_reward(prompt, sections[name]) + noise_of(settings, prompt, sections[name])
        for name in ("Answer 1", "Answer 2")
    )
    ahead = first + settings.bias - second
    return f"Preferred={'tie' if ahead == 0 else '1' if ahead > 0 else '2'}", 1 / (1 + math.exp(-ahead))


def noise_of(settings: Settings, prompt: str, answer: str) -> float:
    """A Gumbel variable that belongs to an answer: a judge who does not change his mind."""
    if settings.noise == 0:
        return 0.0
    uniform = drawn(settings, f"{prompt}\n{answer}")
    return -settings.noise * math.log(-math.log(uniform))


def drawn(settings: Settings, text: str) -> float:
    """A number in (0, 1) that belongs to a text."""
    number = int.from_bytes(hashlib.sha256(f"{settings.seed}\n{text}".encode()).digest()[:8], "big")
    return random.Random(number).uniform(1e-12, 1 - 1e-12)


def reply_of(settings: Settings, posted: dict[str, Any]) -> dict[str, Any]:
    """A chat completion, with the probabilities of 1 and 2 where they are asked for."""
    text, chance = judged(settings, posted["messages"][-1]["content"])
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if "logprobs" in posted and posted["logprobs"] and chance is not None:
        before, said = text.split("=")
        chance = min(max(chance, 1e-9), 1 - 1e-9)
        top = [{"token": "1", "logprob": math.log(chance)}, {"token": "2", "logprob": math.log1p(-chance)}]
        tokens = [(f"{before}=", []), (said, top)]
        choice["logprobs"] = {"content": [{"token": token, "logprob": 0.0, "top_logprobs": t} for token, t in tokens]}
    return {"object": "chat.completion", "model": posted["model"], "choices": [choice]}


def handler(settings: Settings) -> type[BaseHTTPRequestHandler]:
    """The class that answers one request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802  the library's name
            posted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path.partition("?")[0] != "/v1/chat/completions":
                return self.answer(404, b"no such place")
            if settings.key is not None and self.headers["Authorization"] != f"Bearer {settings.key}":
                return self.answer(401, f"wrong key in {self.headers['Authorization']!r}".encode())
            settings.asked.append(posted)
            time.sleep(settings.delay)
            question = posted["messages"][-1]["content"]
            if settings.fault != "none" and drawn(settings, f"fault {question}") < settings.share:
                return self.misbehave(posted)
            return self.answer(200, json.dumps(reply_of(settings, posted)).encode())

        def misbehave(self, posted: dict[str, Any]) -> None:
            if settings.fault == "silence":
                time.sleep(3.0)
                return self.answer(200, b"")
            if settings.fault == "nonsense":
                nonsense = {"role": "assistant", "content": "Both answers have their merits."}
                return self.answer(200, json.dumps({"choices": [{"message": nonsense}]}).encode())
            told = {
                "html": (200, _HTML),
                "error": (503, b"overloaded"),
                "no_choices": (200, b'{"choices": []}'),
                "no_json": (200, b"Preferred=1"),
                "refuse": (400, b"no such model"),
            }
            return self.answer(*told[settings.fault])

        def answer(self, status: int, body: bytes) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if body is _HTML else "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except OSError:  # who asked has left
                pass

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


class JudgeServer(ThreadingHTTPServer):
    """Lets as many wait for a connection as a judge may have requests under way."""

    request_queue_size = 256


def make_server(settings: Settings, port: int) -> JudgeServer:
    """A server on this machine that is not started yet; port 0 takes a free one."""
    return JudgeServer(("127.0.0.1", port), handler(settings))


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--noise", type=float, default=0.0, help="1: it errs as often as the labels of demo:pairs")
    parser.add_argument("--bias", type=float, default=0.0, help="how much it favours what is shown first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", choices=FAULTS, default="none", help="misbehave in this way")
    parser.add_argument("--share", type=float, default=1.0, help="of the requests that get the fault")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before every reply")
    given = vars(parser.parse_args())
    server = make_server(Settings(**{name: value for name, value in given.items() if name != "port"}), given["port"])
    print(f"judging at http://127.0.0.1:{server.server_port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
