"""Runs the same updates under every ZeRO stage and several budgets of tokens, on as many ranks as it was started with.

Writes, from rank 0, name -> (gradients of the first step, weights after three steps) for the test to compare.
Start: python equality_worker.py OUT, or through the deepspeed launcher.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from rlhf.batch import Experience, Pairs, Rows, Tokens
from rlhf.data.dealing import Unit
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.engine.zero import held_elements
from rlhf.models.build import Setup, build_policy, build_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.options import RmBtLoss
from rlhf.recipe.pair_options import DpoLoss
from rlhf.recipe.policy_options import PpoValueLoss
from rlhf.recipe.schema import InitBlock, OptimBlock, ZeroBlock
from rlhf.recipe.stages import GRPORecipe
from rlhf.train.loop import Collected, Stage, update
from rlhf.train.objectives import (
    Objective,
    PolicyObjective,
    PretrainingObjective,
    RewardObjective,
    SFTObjective,
    ValueObjective,
)
from rlhf.train.pool import Budget, Pool, sampled_pool
from rlhf.train.preference import Policy, PreferenceObjective
from rlhf.train.skips import Skips
from rlhf.train.state import OnlineState

INIT = InitBlock(hidden=32, layers=2, heads=4, kv_heads=2, ffn=64, vocab=300, context=64)
LENGTHS = [19, 4, 11, 7, 16, 5, 9, 13]  # ragged: ranks and micro-batches get unequal numbers of tokens
STEP_LR = 0.05  # small enough that three steps do not amplify the rounding of the first
GRADIENT_LR = 1e3  # a huge SGD step leaves weights that are the gradient, to the last digits of float32


def optim(lr: float) -> OptimBlock:
    return OptimBlock(lr=lr, optimizer="sgd", schedule="constant", warmup=0.0, max_grad_norm=0.0)


def tokens(seed: int) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    width = max(LENGTHS)
    ids = torch.randint(5, 260, (len(LENGTHS), width), generator=draw)
    attention = torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    mask = attention & (torch.arange(width) >= torch.tensor([n // 3 + 1 for n in LENGTHS])[:, None])
    return Tokens(torch.where(attention, ids, 0), attention, mask)


def experience(seed: int) -> Experience:
    """Left-padded prompts of 1-5 tokens, answers of 1-12 tokens; one answer is unscored (empty mask)."""
    draw = torch.Generator().manual_seed(seed)
    prompts, answers = torch.tensor([5, 1, 3, 2, 5, 4, 2, 3]), torch.tensor([12, 3, 8, 5, 11, 1, 7, 10])
    attention = torch.cat([torch.arange(5) >= 5 - prompts[:, None], torch.arange(12) < answers[:, None]], dim=1)
    ids = torch.where(attention, torch.randint(5, 260, attention.shape, generator=draw), 0)
    response_mask = attention[:, 5:].clone()
    response_mask[3] = False

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(8, 12, generator=draw)

    return Experience(
        ids,
        attention,
        response_mask,
        old_logprobs=-5.7 + noise(0.1),
        ref_logprobs=-5.7 + noise(0.1),
        advantages=noise(1.0),
        scores=torch.zeros(8),
        old_values=noise(0.5),
        returns=noise(1.0),
    )


def batch_for(name: str) -> Rows:
    if name == "sft":
        return tokens(1)
    if name in ("rm", "dpo"):
        ref = torch.stack([torch.linspace(-80, -20, 8), torch.linspace(-30, -90, 8)], dim=-1)
        pairs = Pairs(tokens(1), tokens(2), torch.linspace(0, 1, 8))
        return replace(pairs, ref=ref) if name == "dpo" else pairs
    return experience(3)


def pool_for(name: str) -> Pool:
    batch = batch_for(name)
    if isinstance(batch, Experience):  # neighbours stand for two answers to one prompt
        pool = sampled_pool(batch, list(range(8)), 2)
        more = tokens(4)
        further = Pool([Unit.single(i, n) for i, n in enumerate(LENGTHS)], more.select)
        return replace(pool, further={"ptx": further}) if name == "ptx" else pool
    sides = 2 if isinstance(batch, Pairs) else 1
    return Pool([Unit.single(i, sides * n) for i, n in enumerate(LENGTHS)], batch.select)


def objectives_for(name: str, engine: Engine, block: OptimBlock) -> list[Objective]:
    if name == "sft":
        return [SFTObjective(engine, block)]
    if name == "rm":
        return [RewardObjective.from_block(engine, block, RmBtLoss(center_coef=0.01))]
    if name == "dpo":
        return [PreferenceObjective.of(Policy(engine), block, DpoLoss(beta=0.1))]
    if name == "value":
        return [ValueObjective.from_block(engine, block, PpoValueLoss())]
    recipe = GRPORecipe.model_validate(
        {
            "model": {"from": "sft"},
            "data": {"path": "x"},
            "sampling": {"temperature": 0.9, "max_new_tokens": 12},
            **POLICIES[name],
        }
    )
    policy = replace(PolicyObjective.from_recipe(engine, recipe, OnlineState.at_start(recipe)), optim=block)
    return [policy, *([PretrainingObjective(engine, block, 0.5)] if name == "ptx" else [])]


# Every way to add losses up, and every term that a policy's loss can have.
POLICIES = {
    "policy": {"aggregation": "token_mean", "kl": {"placement": "reward"}},
    "grpo": {},
    "gspo": {"policy_loss": {"name": "gspo"}, "kl": {"estimator": "k2"}},
    "reinforce": {"policy_loss": {"name": "reinforce"}, "aggregation": "sequence_sum", "entropy_coef": 0.1},
    "ptx": {"policy_loss": {"name": "cispo"}, "aggregation": "constant"},
}
NAMES = ("sft", "rm", "dpo", "value", *POLICIES)
MORE = ("gspo", "reinforce", "ptx")  # what differs in them is the loss, not what the engine does with it
STAGES_OF_MORE = (0, 3)
# Tokens of a micro-batch, by ZeRO stage. Batches have 82 to 168: at 20 ranks take many turns, and some a stand-in.
BUDGETS = {0: (300, 64, 20), 1: (64,), 2: (20, 10_000), 3: (20,)}


def module_for(name: str, tokenizer) -> torch.nn.Module:
    setup = Setup(
        dtype="fp32", attention="sdpa", lora=None, gradient_checkpointing=False, dropout=False, trained=True, seed=3
    )
    if name in ("rm", "value"):
        return ScorerModule(build_scorer(INIT, tokenizer, setup, head="new"))
    return PolicyModule(build_policy(INIT, tokenizer, setup))


class NoGuard:
    def guard(self, step: int, metrics: dict[str, float]) -> None:
        pass


def stage_of(objectives: list[Objective], budget: Budget) -> Stage:
    nothing = {name: None for name in Stage.__dataclass_fields__}
    return Stage(
        **{
            **nothing,
            "steps": 3,
            "updates_per_step": 1,
            "budget": budget,
            "collector": NoGuard(),
            "objectives": objectives,
            "policy_starts": 0,
            "averages": [],
            "skips": Skips(1, Path("skipped.jsonl"), lambda group, numbers: {}),
        }
    )


def train(name: str, tokenizer, zero: ZeroBlock, budget: int, lr: float, steps: int) -> tuple[dict, dict, dict]:
    engine = Engine(module_for(name, tokenizer), zero, bf16=False, optim=optim(lr))
    before = engine.state_dict()
    held, total = held_elements(engine.module)
    objectives = objectives_for(name, engine, optim(lr))
    metrics = {}
    for step in range(steps):
        metrics = update(stage_of(objectives, Budget(budget)), step, Collected([pool_for(name)]))
    return before or {}, engine.state_dict() or {}, {**metrics, "held": held / total}


def main(out: str) -> None:
    dist.start()
    tokenizer = train_tokenizer(["a b c d e f g"] * 3, 300, None)
    tokenizer_size = len(tokenizer)
    assert tokenizer_size <= 300
    results = {}
    for name in NAMES:
        for stage in STAGES_OF_MORE if name in MORE else (0, 1, 2, 3):
            for budget in BUDGETS[stage]:
                zero = ZeroBlock(stage=stage, persistence_threshold=0, bucket_size=1000)
                before, after, _ = train(name, tokenizer, zero, budget, GRADIENT_LR, 1)
                gradients = {key: (before[key] - after[key]).double() / GRADIENT_LR for key in before}
                _, weights, metrics = train(name, tokenizer, zero, budget, STEP_LR, 3)
                results[name, stage, budget] = (gradients, weights, metrics)
    if dist.is_main():
        torch.save(results, out)
    dist.finish()


if __name__ == "__main__":
    main(sys.argv[1])
