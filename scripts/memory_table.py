"""Bytes per rank of parameters, gradients and optimizer state of PPO's four roles, in three layouts under every ZeRO.

    python -m scripts.memory_table --write docs/memory.md              # one and two CPU ranks, a small model
    python -m scripts.memory_table --model 0.5b --dtype bf16 --ranks 1 --speed      # on a GPU

Each layout does two PPO-like updates; then every live tensor that it made is counted, each storage once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.batch import Loss
from rlhf.engine import dist
from rlhf.engine.engine import Engine
from rlhf.engine.zero import sharded_loading
from rlhf.models.build import Setup, build_policy, build_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.models.shared import Role, build_shared
from rlhf.models.tokenizer import train_tokenizer
from rlhf.recipe.schema import LoraBlock, OptimBlock, ZeroBlock

# name -> hidden size, layers, heads, key/value heads, feed-forward size, vocabulary
SHAPES = {"small": (256, 4, 4, 4, 1024, 4096), "0.5b": (896, 24, 14, 2, 4864, 151_936)}
LAYOUTS = {
    "full": "four models, actor and critic trained in full",
    "lora": "LoRA, a base each for policy (its reference: adapter off), critic and reward model",
    "shared": "LoRA, one base for all (`share_base`)",
}
ROWS, PROMPT, ANSWER, UPDATES = 4, 32, 96, 2
LORA = LoraBlock(rank=16)

Call = Callable[..., Tensor]


def write_base(folder: Path, shape: str, dtype: str) -> None:
    """A random model of this shape on the disk, for every layout to start from."""
    hidden, layers, heads, kv_heads, ffn, vocab = SHAPES[shape]
    tokenizer = train_tokenizer(["a b c d e f g"] * 3, 300, None)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Roles:
    """One layout: the trained engines, and a call for every role."""

    def __init__(self, layout: str, base: Path, stage: int, dtype: str) -> None:
        self.base, self.bf16 = base, dtype == "bf16"
        self.tokenizer = train_tokenizer(["a b c d e f g"] * 3, 300, None)
        self.zero = ZeroBlock(stage=stage, persistence_threshold=0, bucket_size=1_000_000)  # type: ignore[arg-type]
        self.frozen_zero = replace_stage(self.zero, 3 if stage == 3 else 0)
        lora = None if layout == "full" else LORA
        self.setup = Setup(dtype, "sdpa", lora, gradient_checkpointing=False, dropout=False, trained=True, seed=0)
        if layout == "shared":
            self.share()
            return
        self.actor = self.engine("policy", OptimBlock())
        self.critic = self.engine("scorer", OptimBlock())
        self.reward: Call = self.engine("scorer", None)
        self.reference: Call = self.engine("policy", None) if layout == "full" else self.without_adapter

    def engine(self, kind: str, optim: OptimBlock | None) -> Engine:
        """A model of its own."""
        zero = self.zero if optim else self.frozen_zero
        setup = self.setup if optim else replace(self.setup, lora=None, trained=False)
        with sharded_loading(zero, bf16=self.bf16):
            if kind == "policy":
                module: Any = PolicyModule(build_policy(str(self.base), self.tokenizer, setup))
            else:
                module = ScorerModule(build_scorer(str(self.base), self.tokenizer, setup, head="new"))
        return Engine(module, zero, bf16=self.bf16, optim=optim)

    def share(self) -> None:
        """All roles on one module."""
        roles = {"policy": Role(None, trained=True), "critic": Role(None, "new", trained=True)}
        roles["rewards_0"] = Role(None, "new")
        with sharded_loading(self.zero, bf16=self.bf16):
            module = build_shared(str(self.base), self.tokenizer, self.setup, roles, revision=None)
        own = {role: module.own(role).values() for role in ("policy", "critic")}
        options = {"bf16": self.bf16, "optim": OptimBlock()}
        self.actor = Engine(module, self.zero, role="policy", trained=own["policy"], **options)  # type: ignore[arg-type]
        self.critic = Engine(
            module,
            self.zero,
            role="critic",
            trained=own["critic"],
            beside=self.actor,
            **options,  # type: ignore[arg-type]
        )
        self.reference = lambda *args, **kwargs: self.actor(*args, role="reference", **kwargs)
        self.reward = lambda *args, **kwargs: self.actor(*args, role="rewards_0", **kwargs)

    def without_adapter(self, *args: Any, **kwargs: Any) -> Tensor:
        """The reference of a LoRA policy."""
        with self.actor.module.adapter_off():  # type: ignore[operator]
            found: Tensor = self.actor(*args, **kwargs)
        return found

    def update(self, seed: int) -> int:
        """Look back with all four roles, then one step of the actor and one of the critic. Returns tokens read."""
        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(5, 260, (ROWS, PROMPT + ANSWER), generator=draw).to(self.actor.device)
        attention = torch.ones_like(ids, dtype=torch.bool)
        answers = attention[:, PROMPT:]
        with self.actor.evaluating(), self.critic.evaluating():
            self.actor(ids, attention, answers)
            advantages = self.reference(ids, attention, answers) + self.reward(ids, attention)[:, None]
            returns = self.critic(ids, attention, answers) + 1.0
        counts = {"tokens": float(ROWS * ANSWER * dist.world_size())}
        logprobs = self.actor(ids, attention, answers)
        self.actor.backward(Loss({"policy": (-(logprobs * advantages).sum(), "tokens", 1.0)}), counts)
        self.actor.step(1e-5)
        values = self.critic(ids, attention, answers)
        self.critic.backward(Loss({"value": ((values - returns).pow(2).sum(), "tokens", 1.0)}), counts)
        self.critic.step(1e-5)
        return ids.numel()


def replace_stage(zero: ZeroBlock, stage: int) -> ZeroBlock:
    """The same sharding at another stage."""
    return zero.model_copy(update={"stage": stage})


def live() -> dict[int, int]:
    """Address -> bytes of the storage of every tensor that is alive, gradients included."""
    found = {}
    for tensor in [value for value in gc.get_objects() if isinstance(value, Tensor)]:
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is not None and part.device.type != "meta":
                storage = part.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return found


def measure(layout: str, base: Path, stage: int, dtype: str, rounds: int) -> dict[str, float]:
    """Bytes that the layout holds on this rank after its updates, and tokens per second of further ones."""
    gc.collect()
    before = live()
    roles = Roles(layout, base, stage, dtype)
    for seed in range(UPDATES):
        roles.update(seed)
    gc.collect()
    held = sum(size for address, size in live().items() if address not in before)
    speed = 0.0
    if rounds:
        finish_work()
        started = time.perf_counter()
        tokens = sum(roles.update(UPDATES + number) for number in range(rounds))
        finish_work()
        speed = tokens * dist.world_size() / (time.perf_counter() - started)
    return {"bytes": held, "tokens_per_second": speed}


def finish_work() -> None:
    """Wait for the device: its work is queued."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def work(base: Path, out: Path, options: argparse.Namespace) -> None:
    """What every rank does."""
    dist.start()
    found = {}
    for layout in LAYOUTS:
        for stage in options.stages:
            mine = measure(layout, base, stage, options.dtype, 5 if options.speed else 0)
            every = dist.gather_objects(mine)
            most = max(every, key=lambda part: part["bytes"])
            found[f"{layout} {stage}"] = most
    if dist.is_main():
        out.write_text(json.dumps(found))
    dist.finish()


def launched(base: Path, ranks: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The measurements of a job with this many ranks."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    out = base / f"{ranks}.json"
    launcher = ["-m", "deepspeed.launcher.runner", "--log_level", "error", "--no_local_rank", "--num_gpus", str(ranks)]
    launcher += ["--hostfile", "/nonexistent", "--master_port", str(port), "--module", "scripts.memory_table"]
    words = ["--work", str(base), str(out), "--dtype", options.dtype, "--stages", *map(str, options.stages)]
    words += ["--speed"] if options.speed else []
    tools = str(Path(sys.executable).parent)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run([sys.executable, *launcher, *words], env=env, check=True)
    found: dict[str, dict[str, float]] = json.loads(out.read_text())
    return found


def lines(found: dict[int, dict[str, dict[str, float]]], options: argparse.Namespace) -> Iterator[str]:
    """The measurements as a table, a row per number of ranks and layout."""
    stages = options.stages
    units = ["MB", *(["tokens/s"] if options.speed else [])]
    yield "| ranks | layout | " + " | ".join(f"ZeRO-{stage}: {' / '.join(units)}" for stage in stages) + " |"
    yield "| --- | --- |" + " --- |" * len(stages)
    for ranks, cells in found.items():
        for layout, text in LAYOUTS.items():
            row = []
            for stage in stages:
                cell = cells[f"{layout} {stage}"]
                speed = f" / {cell['tokens_per_second']:,.0f}" if options.speed else ""
                row.append(f"{cell['bytes'] / 1e6:,.1f}{speed}")
            yield f"| {ranks} | {text} | " + " | ".join(row) + " |"


PAGE = """# Memory of PPO's four roles

Policy, reference, critic and reward model can be four models, LoRA adapters on a base each, or adapters on one frozen \
base. This is what each layout holds per rank: parameters, gradients and optimizer state, in MB (10^6 bytes).

{table}

Measured on the CPU in {dtype}, {shape}, LoRA of rank {rank} on every linear layer, AdamW. After two PPO-like \
updates (log-probabilities, reference, scores and values of {rows} rows of {width} tokens, then a step of the actor \
and one of the critic) every tensor alive on the rank that was not there before is counted, each storage once; of \
several ranks the fullest is shown. Activations are gone by then, at stage 0 gradients too (while a model is being \
trained they take another 4 bytes per trained parameter in fp32), and ZeRO's communication buckets of a million \
elements are included: they do not grow with the model. ZeRO-3 keeps no parameter whole (`persistence_threshold: \
0`); frozen models are sharded at stage 3 and whole below it. At stages 0 to 2 every rank holds the whole base, so \
what sharing saves does not depend on the number of ranks. On one rank there is nothing to shard, \
and ZeRO's own copy of the trained weights makes stages 1 to 3 larger than 0.

Regenerate with `python -m scripts.memory_table --write docs/memory.md`. For absolute numbers of a model of half a \
billion parameters, with tokens per second of such a step in each layout, on a GPU: `python -m scripts.memory_table \
--model 0.5b --dtype bf16 --ranks 1 --speed`.

A recipe asks for the last layout with `share_base: true` and `model.lora`. It needs a common base: a reward model \
trained with `lora` on the very weights that the policy starts from (`model: {{from: sft, lora: {{}}}}` in the \
recipe of `rlhf rm`), or a policy and a reward model that were both trained with `lora` from the same model. What a \
stage's adapter stands on is in its manifest (`adapter_base`). If the roles have no base in common, the command says \
which role stands on what.
"""


def page(table: list[str], options: argparse.Namespace) -> str:
    """The documentation page."""
    hidden, layers, _, _, _, vocab = SHAPES[options.model]
    shape = f"a Llama of {layers} layers, hidden size {hidden} and {vocab:,} tokens"
    return PAGE.format(
        table="\n".join(table), dtype=options.dtype, shape=shape, rank=LORA.rank, rows=ROWS, width=PROMPT + ANSWER
    )


def main() -> None:
    """Measure, print the table, and write the page where asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(SHAPES), default="small")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 needs stages of at least 1")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", choices=(0, 1, 2, 3))
    parser.add_argument("--speed", action="store_true", help="also measure tokens per second")
    parser.add_argument("--write", type=Path, help="write the page to this file")
    parser.add_argument("--work", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stages is None:
        options.stages = [1, 2, 3] if options.dtype == "bf16" else [0, 1, 2, 3]
    if options.work:
        work(*options.work, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        write_base(base, options.model, options.dtype)
        table = list(lines({ranks: launched(base, ranks, options) for ranks in options.ranks}, options))
    print("\n".join(table))
    if options.write:
        options.write.write_text(page(table, options), encoding="utf-8")


if __name__ == "__main__":
    main()
