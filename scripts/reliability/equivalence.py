"""However a batch is divided, the gradient is the same: micro-batches, ranks, ZeRO, recomputation, adapters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from scripts.compare_ranks import zero_overrides
from scripts.reliability.lab import STAGES, Lab
from scripts.reliability.row import Tally, row

TOLERANCE = 1e-6  # relative difference of a model's whole gradient, in norm
OF_A_TENSOR = 3e-6  # of every single tensor: two answers that are much alike leave a small difference of large parts
STEP = 1e3  # one huge step of SGD leaves weights that are the gradient, to the last digits of float32
RANK, ALPHA = 4, 32  # of adapters
ONE_STEP = {
    "train.lr": STEP, "train.optimizer": "sgd", "train.schedule": "constant", "train.warmup": 0.0,
    "train.max_grad_norm": 0.0, "checkpoint.every": 0, "log.samples": 0, "data.eval_rows": 0,
}  # fmt: skip
SHORT = {
    "offline": {"train.steps": 1, "eval.every": 0},
    "online": {"train.rollouts": 1, "train.minibatches": 1, "train.inner_epochs": 1},
}
CRITIC = {f"critic.{key}": value for key, value in (
    ("lr", STEP), ("optimizer", "sgd"), ("schedule", "constant"), ("warmup", 0.0), ("max_grad_norm", 0.0),
)}  # fmt: skip
CHECKPOINTING = ("--set", "model.gradient_checkpointing=true")


@dataclass(frozen=True)
class Variant:
    """A way to compute the same update. bitwise: every operation is the same, and in the same order."""

    name: str
    words: tuple[str, ...] = ()
    ranks: int = 1
    zero: int = 0
    lora: bool = False
    bitwise: bool = False


VARIANTS = (
    Variant("micro-batches of 1", ("--set", "train.micro_batch=1")),
    Variant("recomputed", CHECKPOINTING, bitwise=True),
    Variant("2 ranks", ranks=2),
    Variant("adapter, micro-batches of 1", ("--set", "train.micro_batch=1"), lora=True),
    Variant("micro-batches of 3", ("--set", "train.micro_batch=3")),
    Variant("2 ranks, ZeRO-3", ranks=2, zero=3),
    Variant("adapter, recomputed", CHECKPOINTING, lora=True, bitwise=True),
    Variant("one pass", ("--set", "train.micro_batch=64")),
    Variant("2 ranks, ZeRO-2, micro-batches of 1, recomputed", (*CHECKPOINTING, "--set", "train.micro_batch=1"), 2, 2),
    Variant("40 tokens a pass", ("--set", "train.micro_batch=null", "--set", "train.micro_tokens=40")),
    Variant("adapter, 2 ranks, ZeRO-2", ranks=2, zero=2, lora=True),
    Variant("adapter, published merged", lora=True),
)


@row(
    "R19",
    "the same batch in other micro-batches, on two ranks, under ZeRO, recomputed, through an adapter, for every stage",
    expected=f"gradients equal to {TOLERANCE:.0e}, of a tensor to {OF_A_TENSOR:.0e}; bitwise where the order is equal",
    asked="60",
    quick=10,
    full=60,
    alone=True,
)
def same_gradient(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: over all stages; each stage begins elsewhere in the list, so that a few tries see most of it."""
    assert tries <= len(STAGES) * len(VARIANTS)
    base: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for number in range(tries):
        stage, turn = STAGES[number % len(STAGES)], number // len(STAGES)
        variant = VARIANTS[(turn + 2 * STAGES.index(stage) + seed) % len(VARIANTS)]
        with tally.attempt(f"{stage}, {variant.name}"):
            key = (stage, variant.lora)
            if key not in base:
                base[key] = update(lab, stage, Variant("base", lora=variant.lora))
            if variant.name.endswith("merged"):
                check_merged(lab, stage)
            else:
                check(update(lab, stage, variant), base[key], lab, bitwise=variant.bitwise)


def settings(stage: str) -> Iterator[str]:
    """`--set` words for one step of SGD from the lab's `sft`."""
    online = stage in ("ppo", "grpo")
    values = {**ONE_STEP, **SHORT["online" if online else "offline"], **(CRITIC if stage == "ppo" else {})}
    values |= {"model.from": "sft"} if stage == "sft" else {}
    for name, value in values.items():
        if not (stage == "rm" and name == "log.samples"):  # it generates none
            yield from ("--set", f"{name}={value}")


def update(lab: Lab, stage: str, variant: Variant) -> dict[str, Tensor]:
    """Every published tensor after the step: by file and name."""
    name = folder_of(stage, variant.lora) if variant.name == "base" else f"r19-{stage}"
    lab.clear(name)
    adapter = ("--set", f"model.lora={{rank: {RANK}, alpha: {ALPHA}}}") if variant.lora else ()
    zero = zero_overrides(stage, variant.zero) if variant.zero else []
    words = lab.command(stage, "--name", name, *settings(stage), *adapter, *variant.words, *zero)
    done = lab.run(words, ranks=variant.ranks)
    assert done.code == 0, done.err
    return tensors(lab.root / name)


def folder_of(stage: str, lora: bool) -> str:
    """The name of the run that the others are compared with."""
    return f"r19-{stage}-{'adapter' if lora else 'whole'}"


def tensors(stage: Path) -> dict[str, Tensor]:
    """The weights of a finished stage's model, critic and adapter."""
    files = [file for part in ("model", "critic") for file in sorted((stage / part).rglob("*.safetensors"))]
    return {f"{file.relative_to(stage)}: {name}": value for file in files for name, value in load_file(file).items()}


def check(found: dict[str, Tensor], expected: dict[str, Tensor], lab: Lab, *, bitwise: bool) -> None:
    """Compare the steps that two runs have taken from the same start."""
    assert found.keys() == expected.keys() and len(found) > 10
    start = load_file(lab.root / "sft" / "model" / "model.safetensors")
    whole: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    for key, value in expected.items():
        if bitwise:
            assert torch.equal(found[key], value), f"{key} differs"
        file, _, name = key.rpartition(": ")
        known = name in start and start[name].shape == value.shape
        size = float((value.double() - start[name].double() if known else value.double()).norm())
        apart = float((found[key].double() - value.double()).norm())
        assert apart <= OF_A_TENSOR * size, f"{key}: moved by {size:.1e}, elsewhere in another way by {apart:.1e}"
        whole.setdefault(file, []).append(apart)
        sizes.setdefault(file, []).append(size)
    for file, parts in whole.items():
        assert sum(size > 0 for size in sizes[file]) >= 14, f"{file}: too few tensors have moved"
        apart = math.hypot(*parts) / math.hypot(*sizes[file])
        assert apart <= TOLERANCE, f"{file}: gradients differ by {apart:.1e}"


def check_merged(lab: Lab, stage: str) -> None:
    """Published weights are those of the base plus alpha / rank times the product of the adapter's two matrices."""
    folder = lab.root / folder_of(stage, True) / "model"
    start, merged = (load_file(path / "model.safetensors") for path in (lab.root / "sft" / "model", folder))
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    products = [name for name in adapter if name.endswith(".lora_A.weight")]
    assert len(products) >= 14, products  # seven matrices of each of two layers
    for name in products:
        one, two = adapter[name].double(), adapter[name.replace(".lora_A.", ".lora_B.")].double()
        plain = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        step = ALPHA / RANK * two @ one
        apart = float((merged[plain].double() - start[plain].double() - step).norm())
        assert step.norm() > 0 and apart <= TOLERANCE * float(step.norm()), f"{plain}: {apart / float(step.norm()):.1e}"
