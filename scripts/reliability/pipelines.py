"""`rlhf run` killed at a random moment, and started again: iterative DPO, whose rounds are stages of one pipeline."""

from __future__ import annotations

import random
import time

from rlhf.recipe.document import to_yaml
from rlhf.run.rundir import RunDir
from scripts.reliability.lab import Lab, differing, digest
from scripts.reliability.row import Tally

_LONGEST = 300.0  # seconds; the stages are processes that begin with importing everything
ROUND = [
    {
        "stage": "label",
        "recipe": "label.yaml",
        "name": "label-{round}",
        "set": {"model.from": "dpo-{previous}", "label.seed": "{round}"},
    },
    {
        "stage": "dpo",
        "recipe": "dpo.yaml",
        "name": "dpo-{round}",
        "set": {"model.from": "dpo-{previous}", "data.from": "label-{round}"},
    },
]
PIPELINE = {
    "stages": [
        {"stage": "sft", "recipe": "sft.yaml"},
        {"stage": "rm", "recipe": "rm.yaml"},
        {"stage": "dpo", "recipe": "dpo.yaml", "name": "dpo-0"},
        {"rounds": 2, "stages": ROUND},
    ]
}
STAGES = ("dpo-0", "label-1", "dpo-1", "label-2", "dpo-2")  # sft and rm are finished already


def killed_pipelines(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """One straight run, then `tries` that are killed between or within rounds."""
    if not tries:
        return
    file, draw = lab.recipes / "pipeline.yaml", random.Random(seed)
    file.write_text(to_yaml(PIPELINE))
    words = ["run", str(file), "--run", str(lab.root)]
    straight = lab.run(words, timeout=_LONGEST)
    assert straight.code == 0, straight.err
    wanted = {name: digest(lab.root / name) for name in STAGES}
    for _ in range(tries):
        for name in STAGES:
            lab.clear(name)
        moment = draw.uniform(0, straight.seconds)
        with tally.attempt(f"rlhf run killed after {moment:.1f} s"):
            child = lab.start(words)
            time.sleep(moment)
            child.kill()
            child.wait()
            wait_for_stage(lab)
            done = lab.run(words, timeout=_LONGEST)
            assert done.code == 0, done.err
            different = {name: differing(digest(lab.root / name), wanted[name]) for name in STAGES}
            assert not any(different.values()), different
    for name in STAGES:
        lab.clear(name)


def wait_for_stage(lab: Lab, seconds: float = 30.0) -> None:
    """The stage of a killed pipeline ends by itself: it must, soon."""
    deadline = time.monotonic() + seconds
    while held := [name for name in STAGES if RunDir(lab.root).stage(name).holder()]:
        assert time.monotonic() < deadline, f"{held[0]} goes on {seconds:.0f} s after its pipeline was killed"
        time.sleep(0.05)
