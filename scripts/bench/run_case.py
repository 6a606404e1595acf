"""One case from start to numbers."""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf.engine import dist
from rlhf.models.load import DTYPES
from scripts.bench import flops, peer
from scripts.bench.cases import RATE, Case, all_cases, recipe_of
from scripts.bench.material import (
    SHAPES,
    WARM_ROWS,
    WARM_STEPS,
    Sources,
    keep_model,
    long_rows,
    random_policy,
    scorer_of,
)
from scripts.bench.measure import (
    PARTS,
    Disturbance,
    Ratio,
    Sample,
    Step,
    alternate,
    flop_rate,
    peak_memory,
    rate,
)
from scripts.bench.one_thread import OneThread
from scripts.bench.ours import Ours
from scripts.bench.peer_ppo import PPOPeer
from scripts.bench.raw_stages import raw_side, reference_sums
from scripts.bench.spec import Spec


@dataclass(frozen=True)
class SideResult:
    """What one side did, medians over rounds. seconds, tokens: of a step."""

    rate: float  # tokens per second
    share: float  # useful operations per second over the peak
    seconds: float
    tokens: float
    memory: float | None  # bytes
    loss: float | None  # of the first measured step
    parts: dict[str, float] = field(default_factory=dict)


def measure(spec: Spec) -> dict[str, Any]:
    """The result of a case, as JSON has it. All sides work in one thread."""
    thread = OneThread()
    device = thread.do(lambda: begin(spec))
    case = next(case for case in all_cases() if case.name == spec.case)
    clock = "wall" if spec.threads > 1 or device.type == "cuda" or case.ranks > 1 else "cpu"
    dtype = DTYPES[spec.dtype]
    peak = thread.do(lambda: flops.matmul_peak(dtype, device, clock)) * case.ranks
    fast_peak = thread.do(lambda: flops.fast_peak(dtype, device, clock))
    made, notes = thread.do(lambda: build(case, spec, thread))
    sides = {name: step if isinstance(step, PPOPeer) else within(thread, step) for name, step in made.items()}
    around = Disturbance()
    samples = alternate(sides, spec.rounds)
    others = around.share(case.ranks)
    after = spec.rounds + 1
    memory = {name: peak_memory(lambda step=step: step(after)) for name, step in sides.items()}
    found = {name: summary(samples[name], clock, peak, memory[name]) for name in sides}
    thread.do(dist.finish)
    return {
        "case": case.name,
        "threads": spec.threads,
        "dtype": spec.dtype,
        "clock": clock,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "peak": peak,
        "fast_peak": fast_peak,
        "rounds": spec.rounds,
        "others": others,
        "sides": {name: asdict(side) for name, side in found.items()},
        "ratios": {name: asdict(Ratio.of(samples["ours"], samples[name], clock)) for name in sides if name != "ours"},
        "notes": notes,
    }


def begin(spec: Spec) -> torch.device:
    """Set the calling thread up."""
    torch.set_num_threads(spec.threads)
    return dist.start()


def within(thread: OneThread, step: Step) -> Step:
    """A step that is done in another thread than its caller's."""
    return lambda number: thread.do(lambda: step(number))


def summary(samples: list[Sample], clock: str, peak: float, memory: float | None) -> SideResult:
    """Medians over rounds."""
    parts = {
        part: statistics.median(sample.work.seconds[part] for sample in samples)
        for part in PARTS
        if all(part in sample.work.seconds for sample in samples)
    }
    return SideResult(
        rate=rate(samples, clock),
        share=flop_rate(samples, clock) / peak,
        seconds=statistics.median(sample.seconds(clock) for sample in samples),
        tokens=statistics.median(sample.work.tokens for sample in samples),
        memory=memory,
        loss=samples[0].work.loss,
        parts=parts,
    )


def build(case: Case, spec: Spec, thread: OneThread) -> tuple[dict[str, Step], list[str]]:
    """The sides that take part, and why one does not."""
    sources, work = Sources(spec.hh, spec.gsm8k), Path(spec.work)
    steps = spec.rounds + 2  # a round to warm up, one for the memory
    policy = warm_policy(case.model, spec)
    scorer = scorer_of(policy)
    recipe = recipe_of(case, sources, str(policy), str(scorer), steps, spec.dtype)
    if case.tokens:
        rows = long_rows(sources, case.tokens, case.rows * steps, sources.home(work))
        recipe["data"]["path"] = str(rows)
    folder = sources.home(work) / "runs" / case.name.replace(" ", "-")
    ours = Ours(case, recipe, folder)
    sides: dict[str, Step] = {"ours": ours.sample if case.sampling else ours.step}
    notes: list[str] = []
    if not case.is_compared:
        return sides, notes
    refs = {}
    if case.stage == "dpo":
        refs = reference_sums(ours, policy, range(steps))
    if spec.raw and not case.lora and case.decode is None:
        sides["raw"] = raw_side(case, ours, policy, scorer, refs, spec.dtype)
    try:
        with alone():
            options = common(case, folder, spec.dtype)
            if case.stage == "ppo":
                other = ppo_side(case, ours, policy, scorer, options, steps, thread)
            else:
                other = peer_side(case, ours, policy, scorer, refs, options)
    except Exception as error:  # noqa: BLE001  the peer is not ours to mend; the page says what it said
        notes.append(f"TRL: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    else:
        if other is None:
            notes.append("TRL is not installed, or its version has no such trainer")
        else:
            sides = {"ours": sides.pop("ours"), "trl": other, **sides}
    return sides, notes


def common(case: Case, folder: Path, dtype: str) -> dict[str, Any]:
    """Arguments of every TRL configuration."""
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": 1,
        "learning_rate": RATE,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": dtype == "bf16",
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
        "seed": 0,
    }


@contextmanager
def alone() -> Iterator[None]:
    """Inside, nothing says that this process is a rank: TRL would wrap its model for several."""
    words = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE")
    kept = {name: os.environ.pop(name) for name in words if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def ppo_side(
    case: Case, ours: Ours, policy: Path, scorer: Path, options: dict[str, Any], steps: int, thread: OneThread
) -> PPOPeer | None:
    """A step of TRL's PPO; None where TRL is not there, or has no PPO any more."""
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("trl.experimental.ppo") is None:
        return None
    return PPOPeer(case, ours, policy, scorer, options, steps, thread)


def peer_side(
    case: Case, ours: Ours, policy: Path, scorer: Path, refs: dict[int, Any], options: dict[str, Any]
) -> Callable[[int], Any] | None:
    """A step of another of TRL's trainers; None where TRL is not there."""
    if importlib.util.find_spec("trl") is None:
        return None
    if case.stage == "sft":
        return peer.sft(case, ours, policy, options)
    if case.stage == "rm":
        return peer.rm(case, ours, scorer, options)
    if case.stage == "dpo":
        return peer.dpo(case, ours, policy, options, refs)
    return peer.grpo(case, ours, policy, options)


def warm_policy(model: str, spec: Spec) -> Path:
    """The policy that stages start from: the small one after some fine-tuning, the wide one as it was drawn."""
    sources, work = Sources(spec.hh, spec.gsm8k), Path(spec.work)
    drawn = random_policy(model, sources, work)
    if model != "small":
        return drawn
    folder = drawn.with_name(f"{model}-sft")
    if not folder.exists():
        case = Case("sft", model, rows=WARM_ROWS)
        recipe = recipe_of(case, sources, str(drawn), "", WARM_STEPS, "fp32")
        recipe["train"] |= {"lr": 2e-3, "warmup": 0.1}
        ours = Ours(case, recipe, sources.home(work) / "runs" / "warm")
        for number in range(WARM_STEPS):
            ours.step(number)
        keep_model(folder, ours.engine.module.core, ours.tokenizer)
    return folder


def prepare(spec: Spec) -> None:
    """Make all models, so that no case pays for it."""
    torch.set_num_threads(spec.threads)
    dist.start()
    for model in SHAPES:
        scorer_of(warm_policy(model, spec))
    dist.finish()
