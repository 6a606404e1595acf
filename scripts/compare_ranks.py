"""Does a recipe learn the same on one device and on several? Runs the first steps both ways and compares the curves.

    python -m scripts.compare_ranks ppo recipes/hh/ppo.yaml --run runs/hh --steps 20 --gpus 2 --set train.prompts=16

One process without sharding, then GPUS ranks under ZeRO-2 (trained models) and under ZeRO-3 (all models, down to the
smallest parameter). Exits 1 where a curve differs by more than --tolerance of its size.

On-policy curves part for good once a draw falls on the edge between two tokens and rounding decides it; a
train.rollout_batch that is one rank's share gives equal matrix shapes on both sides and makes that rare.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CURVES = ("train/loss", "policy/loss", "value/loss", "reward/score_mean", "rollout/kl_ref")
FLAT = {"persistence_threshold": 0}


def zero_overrides(stage: str, level: int) -> list[str]:
    """`--set` words that put every model of a stage under ZeRO-`level`; frozen models know 0 and 3 only."""
    frozen = level if level == 3 else 0
    roles = {"zero": level}
    if stage == "ppo":
        roles["critic.zero"] = level
    if stage in ("ppo", "grpo", "dpo"):
        roles["reference.zero"] = frozen
    words = []
    for role, value in roles.items():
        words += ["--set", f"{role}={json.dumps({'stage': value, **FLAT})}"]
    return words


def curves(metrics: Path) -> dict[str, list[float]]:
    """The known curves of a metrics.jsonl."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return {name: [row[name] for row in rows] for name in CURVES if name in rows[0]}


def difference(found: list[float], expected: list[float]) -> float:
    """The largest difference of any step, as a share of the curve's largest value (of 0.001 where it is all but 0)."""
    scale = max(1e-3, *(abs(value) for value in expected))
    return max(abs(a - b) for a, b in zip(found, expected, strict=True)) / scale


def main() -> int:
    """Run, compare, print one line per curve."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=["sft", "rm", "ppo", "grpo", "dpo"])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--tolerance", type=float, default=1e-3)
    options = parser.parse_args()
    length = "rollouts" if options.stage in ("ppo", "grpo") else "steps"
    base = ["--run", str(options.run), "--set", f"train.{length}={options.steps}"]
    base += [word for text in options.overrides for word in ("--set", text)]
    found = {}
    for label, ranks, level in (("one", 1, 0), ("zero2", options.gpus, 2), ("zero3", options.gpus, 3)):
        name = f"{options.stage}-compare-{label}"
        words = [options.stage, str(options.recipe), *base, "--name", name, "--gpus", str(ranks)]
        subprocess.run([sys.executable, "-m", "rlhf", *words, *zero_overrides(options.stage, level)], check=True)
        found[label] = curves(options.run / name / "metrics.jsonl")
    worst = 0.0
    for label in ("zero2", "zero3"):
        for curve, values in found[label].items():
            apart = difference(values, found["one"][curve])
            worst = max(worst, apart)
            last = found["one"][curve][-1]
            ends = f"ends at {values[-1]:.6g}, on one rank at {last:.6g}"
            print(f"{options.gpus} ranks, {label}: {curve}, {len(values)} steps, {ends}, differs by {apart:.1e}")
    return int(worst > options.tolerance)


if __name__ == "__main__":
    sys.exit(main())
