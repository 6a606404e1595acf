"""On-policy training with sharded models: two ranks do what one does, and each holds its share.

All through the command line and the deepspeed launcher; one rank runs in a fork of a warm process.
"""

from __future__ import annotations

import re

import pytest

pytestmark = pytest.mark.distributed
SHARDED = "{stage: 3, persistence_threshold: 0, bucket_size: 1000}"  # else models this small are never cut
ZERO_3 = [
    "--set", f"zero={SHARDED}",
    "--set", f"critic.zero={SHARDED}",
    "--set", f"reference.zero={SHARDED}",
    "--set", f"rewards=[{{kind: model, from: rm, zero: {SHARDED}}}]",
]  # fmt: skip
LEARN = ["--set", "train.lr=2e-3", "--set", "critic.lr=2e-3"]  # so that the second rollout differs from the first
MEASURED = ("time", "speed/")


@pytest.fixture(scope="module")
def both(cli, tiny) -> dict[str, tuple[str, str]]:
    """PPO on one and on two ranks, in full and with LoRA: the stages' names by kind."""
    made = {}
    for kind, options in (("full", LEARN), ("lora", [*LEARN, "--set", "model.lora.rank=4"])):
        one, two = f"ppo-{kind}-one", f"ppo-{kind}-two"
        done = cli(*tiny.command("ppo", "--name", one, *options))
        assert done.code == 0, done.err
        done = tiny.launched("ppo", "--name", two, *options, *ZERO_3)
        assert done.code == 0, done.err
        made[kind] = (one, two)
    return made


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_sharded_ranks_learn_what_one_rank_learns(both, tiny, kind):
    one, two = (tiny.rows(name) for name in both[kind])
    assert len(one) == len(two) == 2
    for expected, found in zip(one, two, strict=True):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if not name.startswith(MEASURED):
                assert found[name] == pytest.approx(value, abs=1e-4), (name, expected["step"])
    assert abs(one[1]["rollout/kl_ref"]) > 1e-3 and one[0]["policy/grad_norm"] > 0.01


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_and_two_ranks_sample_the_same_tokens(both, tiny, kind):
    one, two = (tiny.rows(name, "samples.jsonl") for name in both[kind])
    assert [row["answer"] for row in one] == [row["answer"] for row in two]
    assert len(one) == 6 and any(row["answer"] for row in one)
    for expected, found in zip(one, two, strict=True):
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "roles"), [("full", {"policy", "critic", "reference", "reward model"}), ("lora", {"policy", "critic"})]
)
def test_each_rank_holds_its_share_of_every_model(both, tiny, kind, roles):
    log = (tiny.root / both[kind][1] / "log.txt").read_text()
    found = re.findall(r"rlhf.roles: ([a-z ]+): \w+, ([\d,]+) parameters .* ZeRO-3, ([\d,]+) held here", log)
    shares = {role: int(held.replace(",", "")) / int(total.replace(",", "")) for role, total, held in found}
    assert shares.keys() >= roles
    for role, share in shares.items():
        assert share == pytest.approx(0.5, abs=0.01), role


def test_the_published_weights_are_whole_and_equal(both, tiny):
    from safetensors.torch import load_file

    for part in ("model", "critic"):
        one, two = (load_file(tiny.root / name / part / "model.safetensors") for name in both["full"])
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert value.shape == two[name].shape and (value - two[name]).abs().max() < 1e-4, (part, name)
