"""Whole stages with rewards of every kind: what is published about them, and what they make of a rollout."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

pytestmark = pytest.mark.pipeline
CODE = """
def steps(rows, steps):
    assert all(row["prompt"] for row in rows)
    return [None if row["row"] % 5 == 0 else [1.0 for _ in some] for row, some in zip(rows, steps)]


def slow(rows, answers):
    while True:
        pass
"""


@pytest.fixture(scope="module")
def other(cli, tiny, tmp_path_factory) -> Path:
    """A run with another vocabulary and another template: its reward model reads otherwise than the tiny run's."""
    root = tmp_path_factory.mktemp("other") / "run"
    options = ["--set", "model.init.vocab=350", "--set", "model.chat_template=chatml"]
    for command in (["sft", tiny.recipes / "sft.yaml", *options], ["rm", tiny.recipes / "rm.yaml"]):
        done = cli(*command, "--run", root)
        assert done.code == 0, done.err
    return root


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("code") / "mine.py"
    file.write_text(CODE)
    return file


@contextmanager
def serving() -> Iterator[str]:
    """A scorer that counts characters and leaves every seventh row unscored."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802  the library's name
            posted = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            rows = zip(posted["rows"], posted["answers"], strict=True)
            scores = [None if row["row"] % 7 == 0 else len(answer) for row, answer in rows]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": scores}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def published(run: Path, name: str) -> tuple[float, float]:
    """Mean and deviation as the stage's config.json and manifest agree on them."""
    config = json.loads((run / name / "model" / "config.json").read_text())
    facts = json.loads((run / name / "MANIFEST.json").read_text())["facts"]
    assert (config["score_mean"], config["score_std"]) == (facts["score_mean"], facts["score_std"])
    return config["score_mean"], config["score_std"]


def recomputed(folder: Path, rows: list[dict]) -> tuple[float, float]:
    """Mean and deviation of the scores of both sides, one text at a time in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for row in rows:
        for side in ("chosen", "rejected"):
            # the plain template: a begin token, contents one after another, an end token behind the answer
            ids = [
                tokenizer.bos_token_id,
                *tokenizer.encode(row["prompt"], add_special_tokens=False),
                *tokenizer.encode(row[side], add_special_tokens=False),
                tokenizer.eos_token_id,
            ]
            with torch.no_grad():
                scores.append(model(torch.tensor([ids])).logits[0, 0])
    found = torch.stack(scores).double()
    return found.mean().item(), found.std().item()


@pytest.fixture(scope="module")
def few(tiny, tmp_path_factory) -> tuple[Path, list[dict]]:
    """Nine pairs in a file of their own."""
    rows = [json.loads(line) for line in (tiny.data / "pairs.jsonl").read_text().splitlines()][:9]
    file = tmp_path_factory.mktemp("few") / "few.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file, rows


def test_a_reward_model_publishes_the_statistics_of_its_held_out_scores(cli, tiny, few):
    file, rows = few
    held_out = f"data={{path: {tiny.data / 'pairs.jsonl'}, eval: {{path: {file}}}, max_length: 96}}"
    done = cli(*tiny.command("rm", "--name", "rm-held-out", "--set", held_out))
    assert done.code == 0, done.err
    assert "scores of 18 answers: mean" in (tiny.root / "rm-held-out" / "log.txt").read_text()
    expected = recomputed(tiny.root / "rm-held-out" / "model", rows)
    assert published(tiny.root, "rm-held-out") == pytest.approx(expected, abs=1e-5) and expected[1] > 1e-4


def test_without_held_out_rows_they_are_of_the_training_rows(cli, tiny, few):
    file, rows = few
    done = cli(*tiny.command("rm", "--name", "rm-few", "--set", f"data={{path: {file}, max_length: 96}}"))
    assert done.code == 0, done.err
    expected = recomputed(tiny.root / "rm-few" / "model", rows)
    assert published(tiny.root, "rm-few") == pytest.approx(expected, abs=1e-5)


def test_a_critic_made_from_a_reward_model_does_not_publish_its_statistics(cli, tiny):
    done = cli(*tiny.command("ppo", "--name", "ppo-critic", "--set", "rewards.0.statistics=normalise"))
    assert done.code == 0, done.err
    assert "score_mean" not in json.loads((tiny.root / "ppo-critic" / "critic" / "config.json").read_text())
    assert "score_mean" not in json.loads((tiny.root / "ppo-critic" / "MANIFEST.json").read_text())["facts"]


def test_statistics_shift_and_scale_the_scores(cli, tiny):
    found = {}
    for statistics in ("none", "center", "normalise"):
        name = f"grpo-{statistics}"
        done = cli(*tiny.command("grpo", "--name", name, "--set", f"rewards.0.statistics={statistics}"))
        assert done.code == 0, done.err
        found[statistics] = tiny.rows(name)[0]
    mean, std = published(tiny.root, "rm")
    plain, centered, normal = (found[name]["reward/score_mean"] for name in ("none", "center", "normalise"))
    assert centered == pytest.approx(plain - mean, abs=1e-5)
    assert normal == pytest.approx((plain - mean) / std, rel=1e-3, abs=1e-4)
    spread = found["none"]["reward/score_std"]
    assert found["normalise"]["reward/score_std"] == pytest.approx(spread / std, rel=1e-3)


@pytest.mark.parametrize("kind", ["from", "path"])
def test_a_reward_model_with_another_tokenizer_and_template_scores(cli, tiny, other, kind):
    source = other / "rm" if kind == "from" else other / "rm" / "model"
    name = f"grpo-other-{kind}"
    reward = f"rewards=[{{kind: model, {kind}: {source}, statistics: center}}]"
    done = cli(*tiny.command("grpo", "--name", name, "--set", reward))
    assert done.code == 0, done.err
    log = (tiny.root / name / "log.txt").read_text()
    assert "answers are rendered again for its own tokenizer and template" in log
    assert all(row["reward/unscored"] == 0 and row["reward/score_std"] > 0 for row in tiny.rows(name))


def test_ppo_with_such_a_reward_model_starts_its_critic_from_the_policy(cli, tiny, other):
    reward = ["--set", f"rewards=[{{kind: model, from: {other / 'rm'}}}]"]
    refused = cli(*tiny.command("ppo", "--name", "ppo-other", *reward, "--set", f"critic.from={other / 'rm'}"))
    assert refused.code == 4 and "critic: {from: sft}" in refused.err, refused.err
    done = cli(*tiny.command("ppo", "--name", "ppo-other", *reward, "--set", "critic.from=sft"))
    assert done.code == 0, done.err


def test_rows_over_such_a_models_positions_are_unscored_and_counted(cli, tiny, other, tmp_path):
    short = tmp_path / "short"
    short.mkdir()
    for file in (other / "rm" / "model").iterdir():
        if file.is_file():
            (short / file.name).write_bytes(file.read_bytes())
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 50}))
    done = cli(*tiny.command("grpo", "--name", "grpo-short", "--set", f"rewards=[{{kind: model, path: {short}}}]"))
    assert done.code == 0, done.err
    assert any(0 < row["reward/unscored"] < 32 for row in tiny.rows("grpo-short"))
    assert "longer than its 50 positions" in (tiny.root / "grpo-short" / "log.txt").read_text()


def rewards(other: Path, code: Path, url: str) -> list[str]:
    listed = [
        {"kind": "model", "from": str(other / "rm"), "zero": {"stage": 3}},
        {"kind": "http", "url": url, "weight": 0.1, "batch_size": 5},
        {"kind": "process", "function": f"{code}:steps", "separator": " "},
    ]
    return ["--set", f"rewards={json.dumps(listed)}", "--allow-code", str(code)]


def comparable(rows: list[dict]) -> list[dict]:
    kept = ("reward/", "rollout/length", "policy/loss")
    return [{name: value for name, value in row.items() if name.startswith(kept)} for row in rows]


@pytest.mark.distributed
def test_rewards_of_all_kinds_on_one_rank_and_on_two(cli, tiny, other, code):
    with serving() as url:
        options = rewards(other, code, url)
        refused = cli(*tiny.command("grpo", "--name", "kinds-1", *options[:2]))
        assert refused.code == 9 and "--allow-code" in refused.err
        one = cli(*tiny.command("grpo", "--name", "kinds-1", *options))
        assert one.code == 0, one.err
        two = tiny.launched("grpo", "--name", "kinds-2", *options)
        assert two.code == 0, two.err
    first = tiny.rows("kinds-1")[0]
    assert {"reward/model", "reward/http", "reward/process"} <= first.keys()
    assert first["reward/process"] >= 1 and first["reward/http"] > 0 and 0 < first["reward/unscored"] < 32
    for expected, found in zip(comparable(tiny.rows("kinds-1")), comparable(tiny.rows("kinds-2")), strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.distributed
def test_statistics_are_taken_over_all_ranks(tiny, few):
    file, rows = few  # 9 pairs: one rank scores a row more than the other
    held_out = f"data={{path: {tiny.data / 'pairs.jsonl'}, eval: {{path: {file}}}, max_length: 96}}"
    done = tiny.launched("rm", "--name", "rm-ranks", "--set", held_out, "--set", "zero.stage=3")
    assert done.code == 0, done.err
    expected = recomputed(tiny.root / "rm-ranks" / "model", rows)
    assert published(tiny.root, "rm-ranks") == pytest.approx(expected, abs=1e-5)


def test_a_function_that_takes_too_long_ends_the_run(cli, tiny, code):
    reward = f"rewards=[{{kind: function, function: '{code}:slow', timeout: 0.3}}]"
    done = cli(*tiny.command("grpo", "--name", "grpo-slow", "--set", reward, "--allow-code", code))
    assert done.code == 2 and "within 0.3 s, found none (line " in done.err and "Traceback" not in done.err


def test_a_service_that_refuses_ends_the_run(cli, tiny):
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/score"
    try:
        done = cli(*tiny.command("grpo", "--name", "grpo-404", "--set", f"rewards=[{{kind: http, url: '{url}'}}]"))
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert done.code == 8 and f"{url}: expected scores, found 404" in done.err and done.err.count("error: ") == 1
