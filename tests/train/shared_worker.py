"""Runs PPO-like updates of roles that share a base under every ZeRO stage, on as many ranks as it was started with.

Writes, from rank 0, variant -> what the roles returned, gradients, weights, averages and checkpoints, for the test to
compare with separate models. Start: python shared_worker.py FOLDER OUT, or through the deepspeed launcher; FOLDER holds
`sft` (a policy) and `rm/adapter` (a reward model's adapter on it).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rlhf.batch import Loss, Prompts
from rlhf.engine import dist
from rlhf.engine.ema import Ema
from rlhf.engine.engine import Engine
from rlhf.engine.zero import sharded_loading
from rlhf.models.build import Setup
from rlhf.models.sample import generate
from rlhf.models.shared import Role, SharedModule, build_shared
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.schema import LoraBlock, OptimBlock, SamplingBlock, ZeroBlock

LR, STEPS, DECAY = 0.5, 3, 0.75
SETUP = Setup("fp32", "sdpa", LoraBlock(rank=4), gradient_checkpointing=False, dropout=False, trained=True, seed=3)
# name -> (ZeRO stage, gradient checkpointing, persistence threshold); 2000 keeps every adapter whole at stage 3
VARIANTS = {
    "zero0": (0, False, 0),
    "zero1": (1, False, 0),
    "zero2": (2, False, 0),
    "zero3": (3, False, 0),
    "zero3 whole adapters": (3, False, 2000),
    "zero3 checkpointing": (3, True, 0),
}


SAMPLING = SamplingBlock(temperature=0.9, max_new_tokens=12)


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts of 1-5 tokens, answers of 1-12 tokens; ranks and micro-batches get unequal numbers."""

    ids: Tensor
    attention: Tensor
    mask: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: slice) -> Batch:
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def batch() -> Batch:
    draw = torch.Generator().manual_seed(3)
    prompts, answers = torch.tensor([5, 1, 3, 2, 5, 4, 2, 3]), torch.tensor([12, 3, 8, 5, 11, 1, 7, 10])
    attention = torch.cat([torch.arange(5) >= 5 - prompts[:, None], torch.arange(12) < answers[:, None]], dim=1)
    ids = torch.where(attention, torch.randint(5, 260, attention.shape, generator=draw), 0)
    return Batch(ids, attention, attention[:, 5:], *(torch.randn(8, 12, generator=draw) for _ in range(2)))


def policy_loss(call: Callable[..., Tensor], rows: Batch) -> Loss:
    """Policy gradient, summed over tokens."""
    logprobs = call(rows.ids, rows.attention, rows.mask, sampling=SAMPLING)
    return Loss({"policy": (-(logprobs * rows.advantages)[rows.mask].sum(), "tokens", 1.0)})


def value_loss(call: Callable[..., Tensor], rows: Batch) -> Loss:
    """Squared error, summed over tokens."""
    values = call(rows.ids, rows.attention, rows.mask)
    return Loss({"value": ((values - rows.returns)[rows.mask].pow(2).sum(), "tokens", 0.005)})


def sgd() -> OptimBlock:
    return OptimBlock(lr=LR, optimizer="sgd", max_grad_norm=0.0)


def roles_of(folder: Path) -> dict[str, Role]:
    adapter = str(folder / "rm" / "adapter")
    return {
        "policy": Role(None, trained=True),
        "critic": Role(adapter, "keep", trained=True),
        "rewards_0": Role(adapter, "keep"),
    }


class Run:
    """The module and its two engines."""

    def __init__(self, folder: Path, variant: str, optim: OptimBlock) -> None:
        stage, checkpointing, threshold = VARIANTS[variant]
        zero = ZeroBlock(stage=stage, persistence_threshold=threshold, bucket_size=1000)
        tokenizer = train_tokenizer(["a b c d e f g"] * 3, 300, None)
        setup = replace(SETUP, gradient_checkpointing=checkpointing)
        with sharded_loading(zero, bf16=False):
            self.module: SharedModule = build_shared(
                str(folder / "sft"), tokenizer, setup, roles_of(folder), revision=None
            )
        own = {role: self.module.own(role).values() for role in ("policy", "critic")}
        self.actor = Engine(self.module, zero, bf16=False, optim=optim, role="policy", trained=own["policy"])
        self.critic = Engine(
            self.module, zero, bf16=False, optim=optim, role="critic", trained=own["critic"], beside=self.actor
        )
        self.lr = optim.lr

    def step(self) -> dict[str, float]:
        """One update of the actor, then one of the critic, on this rank's rows in micro-batches of two."""
        counts = {"tokens": float(batch().mask.sum())}
        mine = batch().select(slice(dist.rank(), None, dist.world_size()))
        norms = {}
        for engine, loss in ((self.actor, policy_loss), (self.critic, value_loss)):
            for start in range(0, len(mine.ids), 2):
                engine.backward(loss(engine, mine.select(slice(start, start + 2))), counts)
            norms[engine.role] = engine.step(self.lr)
        return norms

    def outputs(self) -> dict[str, Tensor]:
        """What each role returns for all rows, the same on every rank."""
        rows = batch()
        with self.actor.evaluating():
            return {
                "policy": self.actor(rows.ids, rows.attention, rows.mask),
                "reference": self.actor(rows.ids, rows.attention, rows.mask, role="reference"),
                "rewards_0": self.actor(rows.ids, rows.attention, role="rewards_0"),
                "critic": self.critic(rows.ids, rows.attention, rows.mask),
            }

    def sample(self) -> None:
        """A rollout with whole weights; ranks sample answers of different lengths."""
        ids = torch.full((2, 3), 7 + dist.rank())
        prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool), [{}, {}])
        sampling = SamplingBlock(max_new_tokens=4 + 3 * dist.rank())
        with self.actor.gathered() as policy:
            generate(
                policy,
                prompts,
                answers=2,
                sampling=sampling,
                stop_ids=[2],
                pad_id=0,
                seeds=[1, 2, 3, 4],
                decode=str,
            )


def updates(folder: Path, variant: str) -> dict:
    """SGD: gradients of the first step, weights after three, and what roles return before and after."""
    run = Run(folder, variant, sgd())
    found = {"trained": [run.actor.num_elements(), run.critic.num_elements()]}
    before, found["outputs"] = run.actor.state_dict() or {}, run.outputs()
    for number in range(STEPS):
        found["metrics"] = run.step()
        if number == 0:
            after = run.actor.state_dict() or {}
            found["gradients"] = {name: (before[name] - after[name]).double() / LR for name in after}
        run.sample()
    return {**found, "before": before, "after": run.actor.state_dict() or {}, "moved": run.outputs()}


def resumed(folder: Path, variant: str) -> dict:
    """AdamW: two steps, checkpoint, a third; the same third step from the checkpoint; one engine's checkpoint alone."""
    optim = OptimBlock(lr=0.01, schedule="constant", warmup=0.0, max_grad_norm=0.01)
    run = Run(folder, variant, optim)
    start = run.actor.state_dict() or {}
    average, saved = Ema(run.actor, DECAY), Path(folder) / f"{variant}-{dist.world_size()}"
    history = []
    for number in range(3):
        if number == 2:
            average.save(saved / "ema")
            for name, engine in (("policy", run.actor), ("critic", run.critic)):
                engine.save(saved / name)
            dist.barrier()
        metrics = run.step()
        average.update()
        history.append(run.actor.state_dict() or {})
    with average.swapped():
        swapped = run.actor.state_dict() or {}
    back = run.actor.state_dict() or {}

    again = Run(folder, variant, optim)
    again_average = Ema(again.actor, DECAY)
    again.actor.load(saved / "policy")
    alone = again.actor.state_dict() or {}
    again.critic.load(saved / "critic")
    again_average.load(saved / "ema")
    again_metrics = again.step()
    again_average.update()
    with again_average.swapped():
        again_swapped = again.actor.state_dict() or {}
    written = sum(file.stat().st_size for name in ("policy", "critic") for file in (saved / name).rglob("*.pt"))
    return {
        "start": start,
        "history": history,
        "swapped": swapped,
        "back": back,
        "alone": alone,
        "again": again.actor.state_dict() or {},
        "again_swapped": again_swapped,
        "metrics": metrics,
        "again_metrics": again_metrics,
        "written": written,
        "averaged": sorted(average.average),
    }


PARTS = {
    "zero0": (updates, resumed),
    "zero1": (updates,),
    "zero2": (updates, resumed),
    "zero3": (updates, resumed),
    "zero3 whole adapters": (resumed,),
    "zero3 checkpointing": (updates,),
}


def main(folder: Path, out: str) -> None:
    dist.start()
    results = {}
    for variant in VARIANTS:
        results[variant] = {part.__name__: part(folder, variant) for part in PARTS[variant]}
    if dist.is_main():
        torch.save(results, out)
    dist.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
