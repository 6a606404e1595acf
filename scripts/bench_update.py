"""Tokens per second of a training step against a textbook torch loop: same weights, same batch, alternating.

    python -m scripts.bench_update --rounds 7

The loop pads the batch, calls the Hugging Face model and takes cross-entropy over all logits; DPO calls the model
on both answers with the reference sums given. Prints the median over rounds and the ratio of paired rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from rlhf.batch import Pairs, Tokens
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.models.build import Setup, build_policy
from rlhf.models.forward import PolicyModule
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.pair_options import DpoLoss
from rlhf.recipe.schema import InitBlock, OptimBlock, ZeroBlock
from rlhf.train.objectives import Objective, SFTObjective
from rlhf.train.preference import Policy, PreferenceObjective

INIT = InitBlock(hidden=256, layers=6, heads=8, kv_heads=4, ffn=1024, vocab=4096, context=512, tied=False)


def ragged(rows: int, seed: int) -> Tokens:
    """Rows of 40 to 320 tokens whose first third is prompt."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(40, 320, (rows,), generator=draw)
    width = int(lengths.max())
    columns = torch.arange(width)
    attention = columns < lengths[:, None]
    ids = torch.where(attention, torch.randint(5, 260, (rows, width), generator=draw), 0)
    return Tokens(ids, attention, attention & (columns >= lengths[:, None] // 3))


def textbook_logprobs(model: torch.nn.Module, tokens: Tokens) -> Tensor:
    """Log-probs of every token from full logits, masked: (B, T - 1)."""
    logits = model(input_ids=tokens.ids, attention_mask=tokens.attention.long()).logits[:, :-1]
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, tokens.ids[:, 1:, None]).squeeze(-1)
    return logprobs * tokens.mask[:, 1:]


def textbook_sft(model: torch.nn.Module, tokens: Tokens) -> Tensor:
    """Mean negative log-likelihood."""
    return -textbook_logprobs(model, tokens).sum() / tokens.mask[:, 1:].sum()


def textbook_dpo(model: torch.nn.Module, pairs: Pairs) -> Tensor:
    """Sigmoid DPO with given reference sums."""
    chosen, rejected = (textbook_logprobs(model, side).sum(-1) for side in (pairs.chosen, pairs.rejected))
    margins = (chosen - pairs.ref[:, 0]) - (rejected - pairs.ref[:, 1])
    return -torch.nn.functional.logsigmoid(0.1 * margins).mean()


def ours(objective: Objective, batch: Tokens | Pairs) -> Callable[[], None]:
    """One optimizer step as the trainer does it."""

    def step() -> None:
        counts = dist.sum_over_ranks(objective.counts(batch))
        for micro in batch.split(8):
            objective.engine.backward(objective.loss(micro), counts)
        objective.engine.step(1e-5)

    return step


def textbook(model: torch.nn.Module, loss: Callable[..., Tensor], batch: Tokens | Pairs) -> Callable[[], None]:
    """One optimizer step of the loop."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        micros = list(batch.split(8))
        for micro in micros:
            (loss(model, micro) / len(micros)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, sides: dict[str, Callable[[], None]], tokens: int, rounds: int) -> None:
    """Alternate the two sides; print tokens per second and the paired ratio."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        for side, step in sides.items():
            started = time.perf_counter()
            step()
            if number:  # the first round warms up
                seconds[side].append(time.perf_counter() - started)
    mine, theirs = seconds.values()
    ratios = sorted(b / a for a, b in zip(mine, theirs, strict=True))
    speed = {side: tokens / statistics.median(times) for side, times in seconds.items()}
    text = ", ".join(f"{side} {value:,.0f} tokens/s" for side, value in speed.items())
    print(f"{name}: {text}, ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})")


def main() -> None:
    """SFT and DPO."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    dist.start()
    tokenizer = train_tokenizer(["a b c d e f g"] * 3, 4096, None)
    setup = Setup("fp32", "sdpa", None, gradient_checkpointing=False, dropout=False, trained=True, seed=0)
    batch = ragged(16, 1)
    pairs = Pairs(ragged(8, 2), ragged(8, 3), torch.zeros(8))
    pairs = replace(pairs, ref=torch.zeros(8, 2))
    optim = OptimBlock()
    for name in ("sft", "dpo"):
        engine = Engine(PolicyModule(build_policy(INIT, tokenizer, setup)), ZeroBlock(), bf16=False, optim=optim)
        model = build_policy(INIT, tokenizer, setup)
        if name == "sft":
            sides = {
                "ours": ours(SFTObjective(engine, optim), batch),
                "textbook": textbook(model, textbook_sft, batch),
            }
            tokens = int(batch.attention.sum())
        else:
            sides = {
                "ours": ours(PreferenceObjective.of(Policy(engine), optim, DpoLoss()), pairs),
                "textbook": textbook(model, textbook_dpo, pairs),
            }
            tokens = int(pairs.chosen.attention.sum() + pairs.rejected.attention.sum())
        measure(name, sides, tokens, rounds)
    dist.finish()


if __name__ == "__main__":
    main()
