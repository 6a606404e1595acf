"""`rlhf label` with judges, through the command line: against a real server that behaves or not, and by the policy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.judge_server import Settings, make_server
from tests.conftest import Done, TinyRun, environment

ROOT = Path(__file__).parents[1]
FILES = ("answers.jsonl", "pairs.jsonl")
PAIRS = 6  # comparisons of four answers


class Service(Settings):
    """A running judge, and the recipe block that names it."""

    url = ""

    def block(self, kind: str = "pairwise", **options: object) -> str:
        given = {"kind": kind, "url": self.url, "model": "stand-in", "retries": 0, "timeout": 5.0, **options}
        return f"judge={json.dumps(given)}"


@pytest.fixture
def service() -> Iterator[Service]:
    """With noise, since all answers of an untrained model are equally bad."""
    found = Service(noise=1.0)
    server = make_server(found, 0)
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


def label(cli, tiny: TinyRun, name: str, judge: str, *more: str) -> Done:
    return cli(*tiny.command("label", "--name", name, "--set", judge, *more))


def content(tiny: TinyRun, name: str) -> list[bytes]:
    return [(tiny.root / name / file).read_bytes() for file in FILES]


def facts(tiny: TinyRun, name: str) -> dict:
    return json.loads((tiny.root / name / "MANIFEST.json").read_text())["facts"]


def log(tiny: TinyRun, name: str) -> str:
    return (tiny.root / name / "log.txt").read_text()


def cached(tiny: TinyRun) -> set[Path]:
    return set((tiny.root / "cache").glob("judge-*.jsonl"))


# --- two answers against each other -----------------------------------------------------------------------------------


def test_a_judge_compares_every_two_answers_in_both_orders(cli, tiny, service):
    done = label(cli, tiny, "judged", service.block(model="a"))
    assert done.code == 0, done.err
    answers, pairs = (tiny.rows("judged", file) for file in FILES)
    mute = [row for row in answers if "\0" in row["answer"]]
    said = [(group, i, each) for group in groups(answers) for i, row in enumerate(group) for each in row["comparisons"]]
    assert 200 < len(said) <= 40 * PAIRS and len(service.asked) <= 2 * len(said)
    assert len(mute) or len(said) > 230
    for group, i, each in said:
        assert i < each["with"] < 4 and group[i]["answer"] != group[each["with"]]["answer"]
        assert each["outcome"] == "decided" and each["share"] == each["verdicts"][0] == 1 - each["verdicts"][1]
    for group in groups(answers):
        for i, row in enumerate(group):
            own = [each["share"] for each in row["comparisons"]]
            own += [1 - each["share"] for other in group[:i] for each in other["comparisons"] if each["with"] == i]
            assert row["score"] == (pytest.approx(sum(own) / len(own)) if own else None)
            assert row["scores"] == {}
    for pair in pairs:
        assert pair["win_rate_chosen"] == pair["score_chosen"] > pair["score_rejected"] == pair["win_rate_rejected"]
        assert pair["share_chosen"] == 1.0
    assert facts(tiny, "judged")["judge"] == {"decided": len(said)}
    rows = tiny.rows("judged")
    assert sum(row["judge/decided"] for row in rows) == len(said)
    assert all(row["judge/first"] == 0.5 and row["judge/unparsable"] == 0 for row in rows)
    first = service.asked[0]
    assert first["model"] == "a" and first["temperature"] == 0 and first["max_tokens"] == 256
    assert f"{len(service.asked)} replies asked for, 0 cached" in log(tiny, "judged")


def groups(answers: list[dict]) -> list[list[dict]]:
    return [answers[i : i + 4] for i in range(0, len(answers), 4)]


def test_what_was_asked_is_not_asked_again_and_every_decided_pair_can_be_kept(cli, tiny, service):
    done = label(cli, tiny, "once", service.block(model="b"))
    assert done.code == 0, done.err
    asked = len(service.asked)
    service.fault = "refuse"  # whatever is asked now ends the run
    done = label(cli, tiny, "twice", service.block(model="b", verdict="=(1|2|tie)"), "--set", "label.pairs=all")
    assert done.code == 0, done.err
    assert len(service.asked) == asked and f"0 replies asked for, {asked} cached" in log(tiny, "twice")
    assert content(tiny, "once")[0] == content(tiny, "twice")[0]
    decided, found = facts(tiny, "twice")["judge"]["decided"], facts(tiny, "twice")
    assert found["pairs"] == decided and facts(tiny, "once")["pairs"] <= 40
    assert all(pair["share_chosen"] == 1.0 for pair in tiny.rows("twice", "pairs.jsonl"))


def test_a_judge_that_looks_at_the_order_decides_nothing(cli, tiny, service):
    service.bias = 1000.0
    done = label(cli, tiny, "biased", service.block(model="c"))
    assert done.code == 3 and "expected answers to make pairs, found none" in done.err
    assert [set(row) & {"judge/first"} for row in tiny.rows("biased")] == [{"judge/first"}] * 3
    assert all(row["judge/first"] == 1.0 and row["judge/decided"] == 0 for row in tiny.rows("biased"))
    assert all(each["outcome"] == "disagreed" for row in tiny.rows("biased", FILES[0]) for each in row["comparisons"])


def test_soft_verdicts_are_probabilities_and_cancel_the_order(cli, tiny, service):
    service.bias = 2.0
    done = label(cli, tiny, "soft", service.block(model="d", soft=True), "--set", "label.pairs=all")
    assert done.code == 0, done.err
    assert all(posted["logprobs"] is True and posted["top_logprobs"] == 5 for posted in service.asked)
    said = [each for row in tiny.rows("soft", FILES[0]) for each in row["comparisons"]]
    for each in said:
        a, b = each["verdicts"]
        assert each["share"] == pytest.approx((a + 1 - b) / 2) and 0 < each["share"] < 1
    assert all(row["judge/first"] > 0.6 for row in tiny.rows("soft"))
    assert all(0.5 < pair["share_chosen"] < 1 for pair in tiny.rows("soft", FILES[1]))


# --- one answer at a time ---------------------------------------------------------------------------------------------


def test_a_rubric_gives_every_answer_the_mean_of_its_votes(cli, tiny, service):
    service.noise = 2.0
    done = label(cli, tiny, "rated", service.block("rubric", votes=2))
    assert done.code == 0, done.err
    answers = tiny.rows("rated", FILES[0])
    judged = [row for row in answers if "\0" not in row["answer"]]
    assert all(len(row["votes"]) == 2 and row["score"] == sum(row["votes"]) / 2 for row in judged)
    assert {vote for row in judged for vote in row["votes"]} <= {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}
    assert facts(tiny, "rated")["judge"] == {"votes": 2 * len(judged)}
    assert len({posted["seed"] for posted in service.asked}) == 2, "votes are draws of their own"
    assert len(service.asked) == 2 * len({(row["row"], row["answer"]) for row in judged})
    assert all("comparisons" not in row for row in answers)
    assert all("share_chosen" not in row for row in tiny.rows("rated", FILES[1]))


SELF = {
    "kind": "self_rubric",
    "template": "{prompt}{answer}\n",
    "verdict": r"([0-5])",  # what an untrained model says now and then
    "sampling": {"max_new_tokens": 40, "temperature": 1.5, "top_k": 100},
}


def self_judged(**more: object) -> str:
    return f"judge={json.dumps({**SELF, **more})}"


def test_a_policy_judges_itself_and_repeats_itself(cli, tiny):
    done = label(cli, tiny, "self", self_judged())
    assert done.code == 0, done.err
    answers = tiny.rows("self", FILES[0])
    votes = [vote for row in answers for vote in row["votes"]]
    judged = [row for row in answers if "\0" not in row["answer"]]
    assert all(len(row["votes"]) == 3 for row in judged) and len(votes) == 3 * len(judged)
    assert {type(vote) for vote in votes} == {float, str} and {v for v in votes if isinstance(v, str)} == {"unparsable"}
    for row in answers:
        read = [vote for vote in row["votes"] if isinstance(vote, float)]
        assert row["score"] == (pytest.approx(sum(read) / len(read)) if read else None)
    found = facts(tiny, "self")["judge"]
    assert found["votes"] + found["unparsable"] == len(votes)
    assert [row["judge/votes"] + row["judge/unparsable"] for row in tiny.rows("self")] != [0, 0, 0]
    again = label(cli, tiny, "self-again", self_judged(), "--set", "label.min_margin=0.5")
    assert again.code == 0, again.err
    assert content(tiny, "self")[0] == content(tiny, "self-again")[0]
    assert f"0 replies asked for, {len(votes)} cached" in log(tiny, "self-again")


@pytest.mark.distributed
def test_two_ranks_judge_as_one_does(cli, tiny, service):
    """The policy by itself, sharded; and a service, which only one of them asks."""
    for name, judge in (("self", self_judged()), ("pairwise", service.block(model="e"))):
        fresh = [self_judged(votes=2), judge][name == "pairwise"]
        done = label(cli, tiny, f"one-{name}", fresh)
        assert done.code == 0, done.err
        for cache in cached(tiny):
            cache.unlink()
        done = tiny.launched("label", "--name", f"two-{name}", "--set", fresh, "--set", "zero.stage=3")
        assert done.code == 0, done.err
        assert content(tiny, f"one-{name}") == content(tiny, f"two-{name}")


def test_a_policy_that_cannot_judge_is_told_what_it_lacks(cli, tiny):
    done = label(cli, tiny, "mute", self_judged(verdict="Score: ([0-9]+)"))
    assert done.code == 5 and "expected judgements in step 1, found none of" in done.err
    assert "The policy must have learned to judge" in done.err


def test_questions_that_do_not_fit_into_the_policy_are_counted(cli, tiny):
    done = label(cli, tiny, "long", self_judged(sampling={"max_new_tokens": 90, "top_k": 100}))
    assert done.code == 0, done.err
    votes = [vote for row in tiny.rows("long", FILES[0]) for vote in row["votes"]]
    assert facts(tiny, "long")["judge"]["too_long"] == votes.count("too_long") > 0
    done = label(cli, tiny, "longer", self_judged(template="{prompt}{answer}" + "x" * 300))
    assert done.code == 5 and "no question fits into the model's positions" in done.err


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason", "came"),
    [
        ("html", "unparsable", "<!DOCTYPE html>"),
        ("no_json", "unparsable", "Preferred=1"),
        ("no_choices", "unparsable", '{"choices": []}'),
        ("nonsense", "unparsable", "Both answers have their merits."),
        ("error", "missing", "503 Service Unavailable, 'overloaded'"),
        ("silence", "missing", "TimeoutError"),
    ],
)
def test_a_service_that_misbehaves_now_and_then_is_counted_and_then_refused(cli, tiny, service, fault, reason, came):
    service.fault, service.share = fault, 0.15
    some = {"timeout": 1.0 if fault == "silence" else 20.0, "model": fault}
    short = ["--set", "data.limit=16"]
    done = label(cli, tiny, f"some-{fault}", service.block(**some), *short)
    assert done.code == 0, done.err
    found = facts(tiny, f"some-{fault}")["judge"]
    assert found[reason] > 0 and found["decided"] > found[reason] and set(found) == {"decided", reason}
    assert log(tiny, f"some-{fault}").count("of 1") >= 1 and came in log(tiny, f"some-{fault}")
    assert sum(row[f"judge/{reason}"] for row in tiny.rows(f"some-{fault}")) == found[reason]

    service.share = 1.0
    done = label(cli, tiny, f"all-{fault}", service.block(**{**some, "model": f"all {fault}"}), *short)
    assert done.code == 8 and "expected verdicts, found none in" in done.err and came in done.err, done.err
    service.fault = "none"
    done = label(cli, tiny, f"all-{fault}", service.block(**{**some, "model": f"all {fault}"}), *short)
    assert (done.code == 0) == (fault != "nonsense"), done.err


def test_a_refusal_and_a_wrong_key_end_the_run_and_no_key_is_told(cli, tiny, service, monkeypatch):
    service.fault = "refuse"
    done = label(cli, tiny, "refused", service.block(model="f"))
    assert done.code == 8 and "expected a verdict, found 400 Bad Request, 'no such model'" in done.err
    service.fault, service.key = "none", "right"
    words = [str(w) for w in tiny.command("label", "--name", "keyed", "--set", service.block(api_key_env="JUDGE_KEY"))]
    command = [sys.executable, "-m", "rlhf", *words, "--set", "data.limit=8"]
    found = {}
    for key in (None, "", "wrong-and-secret", "right"):
        given = environment() | ({} if key is None else {"JUDGE_KEY": key})
        found[key] = subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=120)
    for key in (None, ""):
        assert found[key].returncode == 2
        assert "expected a key in the environment variable JUDGE_KEY, found none" in found[key].stderr
    assert found["wrong-and-secret"].returncode == 8
    assert "found 401 Unauthorized, \"wrong key in 'Bearer (key)'\"" in found["wrong-and-secret"].stderr
    assert found["right"].returncode == 0, found["right"].stderr
    for path in tiny.root.rglob("*"):
        assert not path.is_file() or b"wrong-and-secret" not in path.read_bytes(), path


def test_a_service_that_is_not_there_is_refused_before_a_model_is_loaded(cli, tiny):
    done = label(cli, tiny, "nobody", 'judge={"kind": "pairwise", "url": "http://127.0.0.1:9/v1", "model": "x"}')
    assert done.code == 8 and "judge.url: expected a judge that accepts connections, found none" in done.err


def test_a_stage_killed_in_the_middle_of_a_step_asks_only_for_the_rest(cli, tiny, service):
    service.delay = 0.02
    judge = service.block(model="g", concurrency=2)
    before = cached(tiny)
    words = [str(word) for word in tiny.command("label", "--name", "judge-killed", "--set", judge)]
    process = subprocess.Popen([sys.executable, "-m", "rlhf", *words], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and len(service.asked) < 60:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    (cache,) = cached(tiny) - before
    kept = cache.read_bytes()
    with os.fdopen(os.open(cache, os.O_WRONLY | os.O_APPEND), "ab") as file:
        file.write(b'{"key": "cut sh')  # a line that the crash cut short
    asked, service.delay = len(service.asked), 0.0
    done = cli(*tiny.command("label", "--name", "judge-killed", "--set", judge))
    assert done.code == 0, done.err
    lines = cache.read_bytes()
    assert lines.startswith(kept) and all(json.loads(line) for line in lines.splitlines())
    assert kept.count(b"\n") > 40 and len(service.asked) - asked == lines.count(b"\n") - kept.count(b"\n")
    straight = label(cli, tiny, "judge-straight", judge)
    assert straight.code == 0 and content(tiny, "judge-killed") == content(tiny, "judge-straight")


def test_answers_that_were_cut_off_are_not_judged(cli, tiny, service):
    options = ["--set", "label.unfinished=drop", "--set", "sampling.max_new_tokens=1", "--set", "data.limit=8"]
    for kind in ("pairwise", "rubric"):
        done = label(cli, tiny, f"cut-{kind}", service.block(kind), *options)
        assert done.code == 5 and "judge: expected answers to judge in step 1, found none among 32" in done.err
    assert not service.asked


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "other"}, "judge.kind: expected one of pairwise, rubric, self_rubric, found 'other'"),
        ({"url": "ftp://x"}, "judge.url: expected http://HOST[:PORT]/PATH or https://..., found 'ftp://x'"),
        (
            {"template": "{prompt}"},
            "judge.template: expected {prompt}, {first}, {second} in the text, found no {first}",
        ),
        ({"verdict": "("}, "judge.verdict: expected a regular expression, found '('"),
        ({"verdict": "(a)(b)"}, "judge.verdict: expected a pattern with one group, found 2"),
        ({"api_key_env": "sk-123"}, "judge.api_key_env: expected the name of an environment variable"),
        ({"retries": -1}, "judge.retries: expected a whole number >= 0 and <= 10, found -1"),
        ({"kind": "rubric", "temperature": 0}, "judge.votes: expected 1 at temperature 0, found 3"),
        ({"kind": "rubric", "template": "x"}, "judge.template: expected {prompt}, {answer} in the text"),
        ({"soft": 1}, "judge.soft: expected true or false, found 1"),
    ],
)
def test_what_is_wrong_with_a_judge_is_said_at_once(cold_cli, tiny, options, text):
    given = {"kind": "pairwise", "url": "http://127.0.0.1:9/v1", "model": "x", **options}
    done = cold_cli(*tiny.command("label", "--name", "judge-wrong", "--set", f"judge={json.dumps(given)}"))
    assert done.code == 2 and text in done.err and not done.torch, done.err
    assert "sk-123" not in done.err.replace(json.dumps(given), "")


def test_rewards_and_a_judge_are_not_given_together(cold_cli, tiny):
    judge = "judge={kind: pairwise, url: 'http://127.0.0.1:9/v1', model: x}"
    rewards = "rewards=[{kind: length}]"
    done = cold_cli(*tiny.command("label", "--name", "judge-both", "--set", judge, "--set", rewards))
    assert done.code == 2 and "rewards: expected one of rewards and judge, found both" in done.err
    done = cold_cli(*tiny.command("label", "--name", "judge-none", "--set", "rewards=[]"))
    assert done.code == 2 and "rewards: expected one of rewards and judge, found neither" in done.err
