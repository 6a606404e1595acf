"""Tokens per second of sampling against `model.generate`: same weights and prompts, alternating.

    python -m scripts.bench_generation --rounds 5 --threads 2
    python -m scripts.bench_generation --prompts 4 --answers 8 --cpu-time --continuous --lora

A model of 8 million parameters from random weights answers prompts of 60 to 120 tokens with at most 128 new ones; 1.1 %
of its vocabulary ends an answer, so that the mean length is about 70. Both sides sample from the whole distribution.
Prints tokens per second, the median over rounds, and its ratio to `model.generate`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhf.batch import Prompts
from rlhf.models.attention import Step, install, laid_out
from rlhf.models.build import add_lora
from rlhf.models.forward import PolicyModule
from rlhf.models.sample import generate
from rlhf.recipe.schema import LoraBlock, SamplingBlock

CONFIG = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    pad_token_id=0,
)
WIDTH, STOP = 128, list(range(1, 45))
SAMPLED = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, max_new_tokens=WIDTH, eos_token_id=STOP, pad_token_id=0)


def ragged(count: int, *, seed: int) -> Prompts:
    """Left-padded prompts of random tokens."""
    draws = torch.Generator().manual_seed(seed)
    lengths = torch.randint(60, 121, (count,), generator=draws)
    wide = int(lengths.max())
    attention = torch.arange(wide) >= wide - lengths[:, None]
    ids = torch.where(attention, torch.randint(50, 4096, (count, wide), generator=draws), 0)
    return Prompts(ids, attention, [{"row": i} for i in range(count)])


class Live(PolicyModule):
    """A policy whose layers run as they are, adapters included."""

    @contextmanager
    def decoding(self, dtype: torch.dtype | None) -> Iterator[Step]:
        """No weight is merged, cast or packed."""
        install(self.core)
        yield partial(laid_out, self.core)


def fresh() -> LlamaForCausalLM:
    """The model, with equal weights every time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(copy.deepcopy(CONFIG))
    model.set_attn_implementation("sdpa")
    return model.eval().requires_grad_(False)


def ours(policy: PolicyModule, prompts: Prompts, answers: int, slots: int, dtype: str) -> int:
    """Tokens that `generate` has sampled."""
    rollout = generate(
        policy,
        prompts,
        answers=answers,
        sampling=SamplingBlock(max_new_tokens=WIDTH, decode_dtype=dtype),
        stop_ids=STOP,
        pad_id=0,
        seeds=list(range(len(prompts) * answers)),
        decode=str,
        slots=slots,
    )
    return int(rollout.response_mask.sum())


def theirs(model: LlamaForCausalLM, prompts: Prompts, answers: int, slots: int) -> int:
    """Tokens that `model.generate` has sampled, as many rows at a time."""
    total = 0
    for part in prompts.split(max(1, slots // answers)):
        ids, attention = (x.repeat_interleave(answers, 0) for x in (part.ids, part.attention.long()))
        out = model.generate(input_ids=ids, attention_mask=attention, generation_config=SAMPLED)
        total += int((out[:, ids.shape[1] :] != 0).sum())
    return total


def continuous(model: LlamaForCausalLM, prompts: Prompts, answers: int) -> int:
    """Tokens that transformers' continuous batching has sampled."""
    rows = [
        ids[real].tolist() for ids, real in zip(prompts.ids, prompts.attention, strict=True) for _ in range(answers)
    ]
    found = model.generate_batch(inputs=rows, generation_config=SAMPLED, progress_bar=False)
    return sum(len(each.generated_tokens) for each in found.values())


def measure(
    sides: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float]
) -> dict[str, tuple[float, float]]:
    """Side -> tokens per second, and the ratio to the first side; medians over alternating rounds after a warm-up."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = clock()
            tokens = side()
            if number:
                speeds[name].append(tokens / (clock() - started))
    first = next(iter(speeds.values()))
    ratios = {name: [a / b for a, b in zip(own, first, strict=True)] for name, own in speeds.items()}
    return {name: (statistics.median(speeds[name]), statistics.median(ratios[name])) for name in sides}


def main() -> None:
    """All sides."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--cpu-time", action="store_true", help="count process CPU seconds instead of wall seconds")
    parser.add_argument("--lora", action="store_true", help="also with an adapter, merged and live")
    parser.add_argument(
        "--continuous", action="store_true", help="also transformers' generate_batch, which is slow here"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    policy = PolicyModule(fresh())
    prompts, shape = ragged(given.prompts, seed=0), (given.answers, given.slots)
    sides: dict[str, Callable[[], int]] = {
        "model.generate": partial(theirs, policy.core, prompts, *shape),
        "fp32": partial(ours, policy, prompts, *shape, "fp32"),
        "bf16": partial(ours, policy, prompts, *shape, "bf16"),
    }
    if given.continuous:
        sides["generate_batch"] = partial(continuous, fresh(), prompts, given.answers)
    for name, kind in {"adapter, merged": PolicyModule, "adapter, live": Live}.items() if given.lora else ():
        adapted = kind(add_lora(fresh(), LoraBlock(rank=16), "CAUSAL_LM"))
        sides[name] = partial(ours, adapted, prompts, *shape, "fp32")
    clock = time.process_time if given.cpu_time else time.perf_counter
    for name, (speed, ratio) in measure(sides, given.rounds, clock).items():
        print(f"{name}: {speed:,.0f} tokens/s, ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
