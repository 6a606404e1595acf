"""Numbers that are not finite, and invariants that do not hold: nothing is learned from either, nothing published."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf.engine.engine import Engine
from rlhf.engine.finite import held
from rlhf.rewards.scorer import Scorer
from rlhf.train import judged, loop, online, roles
from scripts.reliability.lab import STAGES, Done, Lab
from scripts.reliability.row import Tally, row

ONLINE = ("ppo", "grpo")
ONE_UPDATE = ("--set", "train.minibatches=1", "--set", "train.inner_epochs=1")
SHARDED = ("--set", "zero.stage=2")
LORA = ("--set", "model.lora={rank: 4}")
IN_UPDATES = ("weight", "gradient", "loss", "logits", "learning rate")  # of every stage
IN_ROLLOUTS = ("reward", "advantage")  # of on-policy ones
KEPT = ("--set", "checkpoint.keep=9")


@dataclass(frozen=True)
class Fault:
    """What becomes `value` in the steps `steps` (from 0) of a stage, whose updates are one per step."""

    stage: str
    what: str
    value: float
    steps: tuple[int, ...]

    def inject(self) -> None:
        """Break this process, which is about to run the stage."""
        INJECT[self.what](Clock(self.steps), self.value)

    def tensor(self) -> str:
        """How a line of skipped.jsonl begins that names what was broken."""
        names = {"weight": "weight ", "logits": "output 0 of the model", "advantage": "advantages"}
        return {**names, "gradient": "gradient", "reward": "scores"}.get(self.what, self.what)


class Clock:
    """Whether now is the time: the loop's step, which it tells."""

    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps, self.now = steps, -1
        for owner, name in ((loop, "collect"), (loop, "update")):
            setattr(owner, name, self._told(getattr(owner, name)))

    def _told(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def told(stage: Any, step: int, *rest: Any) -> Any:
            self.now = step
            return inner(stage, step, *rest)

        return told

    def strikes(self) -> bool:
        return self.now in self.steps


def bad_weight(clock: Clock, value: float) -> None:
    push = loop.push

    def pushed(stage: Any, step: int, index: int, objective: Any, minibatch: Any) -> Any:
        if clock.strikes() and objective is stage.objectives[0]:
            with torch.no_grad():
                list(held(objective.engine.trained.items()))[-1][1].view(-1)[0] = value
        return push(stage, step, index, objective, minibatch)

    loop.push = pushed


def in_loss(change: Callable[[Tensor, float], Tensor]) -> Callable[[Clock, float], None]:
    """Changes the first term of the first objective's loss."""

    def inject(clock: Clock, value: float) -> None:
        push = loop.push

        def pushed(stage: Any, step: int, index: int, objective: Any, minibatch: Any) -> Any:
            if not clock.strikes() or objective is not stage.objectives[0]:
                return push(stage, step, index, objective, minibatch)
            with changed(type(objective), "loss", lambda inner: lambda *a: spoilt(inner(*a), value)):
                return push(stage, step, index, objective, minibatch)

        def spoilt(loss: Any, value: float) -> Any:
            name, (total, unit, weight) = next(iter(loss.terms.items()))
            return type(loss)({**loss.terms, name: (change(total, value), unit, weight)}, loss.metrics)

        loop.push = pushed

    return inject


class changed:
    """An attribute is another inside."""

    def __init__(self, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
        self.owner, self.name, self.before = owner, name, getattr(owner, name)
        self.after = change(self.before)

    def __enter__(self) -> None:
        setattr(self.owner, self.name, self.after)

    def __exit__(self, *_: Any) -> None:
        setattr(self.owner, self.name, self.before)


def bad_logits(clock: Clock, value: float) -> None:
    """In what the trained model says while it learns."""
    call, push = Engine.__call__, loop.push
    struck: list[Engine] = []

    def said(engine: Engine, *args: Any, **kwargs: Any) -> Any:
        found = call(engine, *args, **kwargs)
        if engine not in struck or not torch.is_grad_enabled():
            return found
        first = found[0] if isinstance(found, tuple) else found
        with torch.no_grad():
            first.view(-1)[:] = value
        return found

    def pushed(stage: Any, step: int, index: int, objective: Any, minibatch: Any) -> Any:
        struck[:] = [objective.engine] if clock.strikes() and objective is stage.objectives[0] else []
        return push(stage, step, index, objective, minibatch)

    Engine.__call__, loop.push = said, pushed  # type: ignore[method-assign]


def bad_reward(clock: Clock, value: float) -> None:
    """Past the checks of every single reward: in their sum."""
    ask = Scorer.__call__

    def scored(scorer: Scorer, rollout: Any) -> Any:
        found = ask(scorer, rollout)
        if clock.strikes():
            found.total[0] = math.copysign(math.inf, value)  # NaN stands for an answer without a score
        return found

    Scorer.__call__ = scored  # type: ignore[method-assign]


def bad_advantage(clock: Clock, value: float) -> None:
    make = online.to_experience

    def made(*args: Any) -> Any:
        experience = make(*args)
        if clock.strikes():
            experience.advantages[0, 0] = value
        return experience

    online.to_experience = made


def bad_rate(clock: Clock, value: float) -> None:
    rate = loop.learning_rate

    def rated(optim: Any, number: int, updates: int) -> float:
        return value if clock.strikes() else rate(optim, number, updates)

    loop.learning_rate = rated


def with_gradient(total: Tensor, value: float) -> Tensor:
    """The same number, whose gradient is `value`."""
    same = total * 1.0
    same.register_hook(lambda gradient: torch.full_like(gradient, value))
    return same


INJECT: dict[str, Callable[[Clock, float], None]] = {
    "weight": bad_weight,
    "gradient": in_loss(with_gradient),
    "loss": in_loss(lambda total, value: total * 0 + value),
    "logits": bad_logits,
    "reward": bad_reward,
    "advantage": bad_advantage,
    "learning rate": bad_rate,
}


def faults(seed: int) -> list[Fault]:
    """One of every kind, in every stage that knows it, once and three times in a row."""
    draw, found = random.Random(seed), []
    for times, stage in itertools.product((1, 3), STAGES):
        for what in (*IN_UPDATES, *(IN_ROLLOUTS if stage in ONLINE else ())):
            first = draw.randint(1, 2 if times == 1 else 1)
            value = draw.choice((math.nan, math.inf, -math.inf))
            found.append(Fault(stage, what, value, tuple(range(first, first + times))))
    draw.shuffle(found)
    return found


@row(
    "R12",
    "NaN or Inf put into a weight, gradient, loss, logit, reward, advantage or learning rate, once and in three steps",
    expected="update not applied, its rows and tensors written down and counted; exit 5 at the third in a row; every"
    " checkpoint finite, nothing else published",
    asked="100",
    quick=2,
    full=100,
)
def not_finite(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: over all kinds and stages; every third trains an adapter, every third shards its optimizer."""
    rounds = (fault for number in itertools.count() for fault in faults(1000 * seed + number))
    for number, fault in enumerate(itertools.islice(rounds, tries)):
        options = (*KEPT, *(ONE_UPDATE if fault.stage in ONLINE else ()), *((), LORA, SHARDED)[number % 3])
        with tally.attempt(f"{fault} {' '.join(options)}"):
            name = "r12"
            lab.clear(name)
            words = lab.command(fault.stage, "--name", name, *options)
            done = lab.run(words, before=fault.inject)
            look(lab.root / name, fault, done)
    lab.clear("r12")


def look(stage: Path, fault: Fault, done: Done) -> None:
    """What a stage has left behind."""
    lines = [json.loads(line) for line in (stage / "skipped.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    stays = fault.what == "weight"  # nothing takes it away again
    ends = stays or len(fault.steps) == 3
    assert done.code == (5 if ends else 0), f"exit {done.code}: {done.err[-1500:]}"
    assert "Traceback" not in done.err, done.err
    left_out = len({line["step"] for line in lines if line["of"] != "value"})
    assert left_out == (3 if ends and not stays else 1), lines
    assert metrics[-1]["train/skipped"] == len(lines), (metrics[-1], lines)
    assert lines[0]["step"] == fault.steps[0] + 1, lines
    for line in lines:
        assert any(each["tensor"].startswith(fault.tensor()) for each in line["found"]), line
        assert fault.what == "learning rate" or line["rows"], line
        assert all(":" in each["where"] for each in line["rows"]), line
    if stays:  # the checkpoint of this step is refused
        assert "expected finite weights, found" in done.err, done.err
    elif ends:
        last = lines[-1]["step"]
        assert f"step {last}" in done.err and str(stage / "skipped.jsonl") in done.err, done.err
    else:
        weights = load_file(next((stage / "model").glob("*.safetensors")))
        assert all(value.isfinite().all() for value in weights.values())
    assert (stage / "MANIFEST.json").exists() == (stage / "model").exists() == (not ends)
    nothing_moved(stage, fault)


def nothing_moved(stage: Path, fault: Fault) -> None:
    """Checkpoints are finite, and the one after a step that was left out holds what the one before it held."""
    part = "reward" if fault.stage == "rm" else "policy"
    kept = {int(p.name[-6:]): tensors(p / part) for p in sorted((stage / "checkpoints").glob("step-*"))}
    assert kept, "no checkpoint is left"
    for step, state in kept.items():
        assert all(value.isfinite().all() for value in state.values()), step
    if fault.what != "weight":
        pairs = [(step, step + 1) for step in fault.steps if {step, step + 1} <= kept.keys()]
        assert pairs, (sorted(kept), fault)
        for before, after in pairs:
            assert kept[before].keys() == kept[after].keys()
            moved = [name for name, value in kept[before].items() if not torch.equal(value, kept[after][name])]
            assert not moved, (before, after, moved)


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of an engine's checkpoint: weights, and what the optimizer remembers."""
    found: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> None:
        if torch.is_tensor(value):
            if value.is_floating_point():
                found[name] = value
        elif isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{name}/{key}")
        elif isinstance(value, list | tuple):
            for place, each in enumerate(value):
                walk(each, f"{name}/{place}")

    for file in sorted(folder.rglob("*.pt")):
        walk(torch.load(file, weights_only=False, map_location="cpu"), file.name)
    for file in sorted(folder.rglob("*.safetensors")):
        walk(load_file(file), file.name)
    return found


# --- invariants -------------------------------------------------------------------------------------------------------


def shaken(module: nn.Module, by: float = 0.05) -> None:
    """Other weights than before."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=draw))


def wrap(
    owner: Any, name: str, before: Callable[..., None] | None = None, after: Callable[[Any], Any] | None = None
) -> None:
    """Do something more before, or to the result of, a function."""
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(*args)
        found = inner(*args, **kwargs)
        return found if after is None else after(found)

    setattr(owner, name, wrapped)


def other_weights_in_update() -> None:
    wrap(loop, "update", before=lambda stage, *rest: shaken(stage.objectives[0].engine.module))


def stale_sampler() -> None:
    wrap(online.OnlineCollector, "look_back", before=lambda collector, *rest: shaken(collector.actor.module))


def other_reference() -> None:
    wrap(roles, "reference", after=lambda reference: shaken(reference.engine.module) or reference)


def other_rejected() -> None:
    def change(logprobs: Tensor) -> Tensor:
        logprobs[:, 1] += 2.0
        return logprobs

    wrap(judged, "cached_logprobs", after=change)


def deaf_layer() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    wrap(LlamaMLP, "forward", after=lambda output: output.detach())


def no_supervision() -> None:
    from rlhf.data import collate

    wrap(collate, "tokens", after=lambda rows: type(rows)(rows.ids, rows.attention, torch.zeros_like(rows.mask)))


def dropout_on() -> None:
    wrap(
        roles,
        "policy_engine",
        after=lambda engine: setattr(engine.module.core.model.layers[0].self_attn, "attention_dropout", 0.1) or engine,
    )


def blind_to_padding() -> None:
    from rlhf.models.forward import RoleModule

    def blind(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])}

    RoleModule.can_pack = lambda self: False  # type: ignore[method-assign]
    wrap(RoleModule, "inputs", after=blind)


# name -> (how it is broken, in which stage, what must be said)
BROKEN: dict[str, tuple[Callable[[], None], str, str]] = {
    "ratio 1 before the first update": (
        other_weights_in_update,
        "ppo",
        "fresh samples of step 1: log-probabilities differ by",
    ),
    "sampler and trainer agree": (stale_sampler, "grpo", "expected sampler and trainer to agree within"),
    "KL 0 at the start": (other_reference, "ppo", "policy and reference at the start: log-probabilities differ by"),
    "chosen log-probs at the start": (
        other_reference,
        "dpo",
        "policy and reference at the start: log-probabilities differ by",
    ),
    "DPO loss ln 2": (other_rejected, "dpo", "expected ln 2 = 0.6931"),
    "padded = unpadded": (blind_to_padding, "sft", "with padding and without, found a difference of"),
    "padded = unpadded, scores": (blind_to_padding, "rm", "with padding and without, found a difference of"),
    "supervised tokens": (no_supervision, "sft", "expected tokens to learn from"),
    "a gradient for all": (deaf_layer, "sft", "found none for 8"),
    "a gradient for all, policy": (deaf_layer, "grpo", "found none for 8"),
    "no dropout": (dropout_on, "ppo", "expected no dropout"),
}


@row(
    "R18",
    "every invariant broken once, and every stage as it is",
    expected="exit 5 with the number, before any update; a clean run ends 0",
    asked="all",
    quick=3,
    full=len(BROKEN) + len(STAGES),
)
def invariants(lab: Lab, tally: Tally, tries: int, seed: int) -> None:
    """tries: of all of them, in an order by the seed."""
    cases: list[tuple[str, Callable[[], None], str, str]] = [(n, *case) for n, case in BROKEN.items()]
    cases += [("clean", lambda: None, stage, "") for stage in STAGES]
    random.Random(seed).shuffle(cases)
    for name, broken, stage, words in cases[:tries]:
        lab.clear("r18")
        lab.clear("cache")  # may hold log-probs of a broken reference
        with tally.attempt(f"{stage}: {name}"):
            done = lab.run(lab.command(stage, "--name", "r18"), before=broken)
            assert done.code == (5 if words else 0), f"exit {done.code}: {done.err[-1500:]}"
            assert words in done.err and "Traceback" not in done.err, done.err
            log = lab.root / "r18" / "metrics.jsonl"
            rows = log.read_text().splitlines() if log.exists() else []
            assert bool(rows) != bool(words), rows
            assert (lab.root / "r18" / "model").exists() != bool(words)
    lab.clear("r18")
    lab.clear("cache")
