"""The judge, the requirements one by one, the table, and the whole evaluation on untrained stages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from rich.console import Console

from rlhf.data.demo import FLOOR, demo_rows, gold_reward, join, optimum
from rlhf.data.grammar import tokenize
from rlhf.errors import CheckpointError
from rlhf.eval.demo import (
    ROOM,
    DemoScores,
    Row,
    cells,
    checks,
    evaluate_demo,
    judge,
    missing,
    policy_row,
    render_table,
    sampling_of,
    verdict_lines,
)
from rlhf.eval.metrics import Estimate, estimate
from rlhf.recipe.schema import SamplingBlock
from rlhf.run.stage import StageSummary

PROMPT = "we saw this western at the festival"
GOOD = " in march, and the script was really sharp, and i loved the ending."
BAD = " in march, and the script was really dull, and i hated the ending."


def summary(name: str, command: str, kind: str = "policy") -> StageSummary:
    return StageSummary(name, command, kind, "finished", 10, 10, None, [], [], None, 100.0, 142.0)


def scores(rewards: list[float], distinct_2: float = 0.4, parse_share: float = 1.0) -> DemoScores:
    return DemoScores(rewards, estimate(rewards), parse_share, distinct_2, 12.0)


BEFORE = scores([0.0, 1.0, -1.0, 0.0] * 25)
AFTER = scores([2.0, 3.0, 1.0, 2.5] * 25)


def row_of(after: DemoScores = AFTER, kl: float = 3.0, name: str = "ppo", command: str = "ppo") -> Row:
    return policy_row(summary(name, command), after, [kl - 0.5, kl + 0.5] * 50, BEFORE, 4.0)


def failing(row: Row) -> list[int]:
    return [number for number, check in enumerate(row.checks) if not check.passed]


def test_judge():
    found = judge([PROMPT, PROMPT, PROMPT], [GOOD, BAD, " sharp sharp sharp sharp"])
    assert found.rewards == [gold_reward(PROMPT, GOOD), gold_reward(PROMPT, BAD), FLOOR]
    assert found.gold.mean == pytest.approx(sum(found.rewards) / 3, abs=1e-12)
    assert found.parse_share == pytest.approx(2 / 3, abs=1e-12)
    assert found.length == pytest.approx((16 + 16 + 4) / 3, abs=1e-12)
    # Bigrams: 15 + 15 + 3. ", and" stands twice in the good review, the bad one has four of its own, the last has one.
    assert found.distinct_2 == pytest.approx((14 + 4 + 1) / 33, abs=1e-12)


def test_judge_gives_the_floor_to_nothing():
    found = judge([PROMPT, PROMPT], ["", "\n"])
    assert (found.gold.mean, found.parse_share, found.length, found.distinct_2) == (FLOOR, 0.0, 0.0, 0.0)


def test_row_of_a_policy():
    row = row_of()
    assert row.seconds == 42.0
    assert row.gain is not None and row.gain.mean == pytest.approx(2.125, abs=1e-12)
    assert row.gap_closed == pytest.approx(2.125 / 4.0, abs=1e-12)
    assert row.kl is not None and row.kl.mean == pytest.approx(3.0, abs=1e-12)
    assert failing(row) == [] and len(row.checks) == 5


def test_sft_is_not_judged_against_itself():
    row = policy_row(summary("sft", "sft"), BEFORE, [0.0] * 100, None, 4.0)
    assert row.checks == [] and row.gain is None and row.kl is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (row_of(scores([1.0, 0.0, 0.0, -0.9] * 25)), [0, 1]),  # too little, and hardly significant
        (row_of(scores([20.0, -20.0, 20.0, -13.0] * 25)), [0]),  # much on average, too noisy to tell
        (row_of(scores([1.0, 2.0, 0.0, 1.0] * 25)), [1]),  # certain, but a quarter of the gap only
        (row_of(kl=20.1), [2]),
        (row_of(scores(AFTER.rewards, parse_share=0.89)), [3]),
        (row_of(scores(AFTER.rewards, distinct_2=0.19)), [4]),
        (row_of(scores([-2.0] * 100, 0.1, 0.1), kl=30.0), [0, 1, 2, 3, 4]),
        (row_of(scores(AFTER.rewards, distinct_2=0.2, parse_share=0.9), kl=20.0), []),  # all exactly at their limits
    ],
)
def test_every_requirement_can_fail_alone(row, expected):
    assert failing(row) == expected


def test_a_sure_loss_fails():
    # Every prompt worse by the same amount: the standard error is 0.
    assert failing(row_of(scores([reward - 1.0 for reward in BEFORE.rewards]))) == [0, 1]


def test_nothing_diverse_to_begin_with():
    row = replace(row_of(), scores=AFTER)
    assert not checks(row, scores(BEFORE.rewards, distinct_2=0.0))[4].passed


def test_missing():
    good = [row_of(name=name, command=name) for name in ("ppo", "grpo", "dpo")]
    assert missing(good) == []
    assert missing(good[:2]) == ["dpo"]
    assert missing([]) == ["ppo", "grpo", "dpo"]
    bad = row_of(kl=50.0, name="dpo", command="dpo")
    assert missing([*good[:2], bad]) == ["dpo"]
    branch = row_of(name="dpo-b0.5", command="dpo")
    assert missing([*good[:2], bad, branch]) == [], "one good branch is enough"


def shown(rows: list[Row], width: int = 80) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(render_table(rows, 3.9), *verdict_lines(rows), sep="\n", soft_wrap=True)
    return capture.get()


def test_table_and_verdicts():
    reward = Row("rm", "rm", 61.4, accuracy=Estimate(0.7125, 0.01, 1000), ceiling=0.846)
    rows = [policy_row(summary("sft", "sft"), BEFORE, [0.0] * 100, None, 4.0), reward, row_of(), row_of(kl=50.0)]
    text = shown(rows)
    for part in ("0.00 ± 0.07", "0.713 / 0.846", "61 s", "3.0 ± 0.1", "53%", "100.0%", "0.400", "optimum", "3.90"):
        assert part in text, part
    assert "pass ppo: " in text
    assert "FAIL ppo: " in text and "✗ KL 50.0 nats (at most 20)" in text
    assert "FAIL grpo: no finished stage" in text and "FAIL dpo: no finished stage" in text
    assert cells(reward)[1:4] == ["", "", ""]
    assert "…" not in text, "nothing is cut at 80 columns"


def test_whole_evaluation_of_untrained_stages(publish, tmp_path, capsys):
    for seed, (name, command) in enumerate([("sft", "sft"), ("rm", "rm"), ("ppo", "ppo"), ("ppo-kl1", "ppo")]):
        publish(tmp_path, name, command, seed)
    assert not evaluate_demo(tmp_path)
    text = capsys.readouterr().out
    for name in ("sft", "rm", "ppo", "ppo-kl1", "optimum", "FAIL"):
        assert name in text
    record = json.loads((tmp_path / "report" / "demo.json").read_text())
    assert [row["stage"] for row in record["rows"]] == ["sft", "rm", "ppo", "ppo-kl1"]
    assert record["failed"] == ["ppo", "grpo", "dpo"]
    assert record["rows"][0]["scores"]["gold"] == {"mean": FLOOR, "se": 0.0, "count": 256}
    assert 0.3 < record["rows"][1]["accuracy"]["mean"] < 0.7, "an untrained reward model"
    assert record["rows"][2]["kl"]["mean"] > 0.1
    assert record["optimum"] == pytest.approx(
        sum(optimum(row["prompt"]) for row in demo_rows("eval_prompts")) / 256, abs=1e-12
    )
    assert {each["stage"] for each in record["samples"][0]["answers"]} == {"sft", "ppo", "ppo-kl1"}
    assert all(len(row["cells"]) == len(record["columns"]) for row in record["rows"])


def test_all_stages_are_sampled_as_sft_was(publish, tmp_path):
    sampling = sampling_of(publish(tmp_path, "sft", "sft", 0))
    assert sampling == SamplingBlock(temperature=0.9, max_new_tokens=ROOM)
    longest = max(len(tokenize(join(row["prompt"], row["completion"]))) for row in demo_rows("sft"))
    assert longest < ROOM, "no review is cut off, even where a word takes two tokens now and then"


def test_without_sft_there_is_nothing_to_compare_with(publish, tmp_path):
    publish(tmp_path, "dpo", "dpo", 0)
    with pytest.raises(CheckpointError, match="expected a finished SFT stage"):
        evaluate_demo(tmp_path)
