"""The same global batch gives the same update: 1 or 2 ranks, any budget of tokens, ZeRO 0 to 3, plain torch."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.engine.engine import sum_terms

WORKER = Path(__file__).with_name("equality_worker.py")
ROOT = Path(__file__).parents[2]
GRADIENT, WEIGHTS = 1e-6, 2e-6  # relative difference of every tensor, in norm


def load_worker():
    spec = importlib.util.spec_from_file_location("equality_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


worker = load_worker()


def run(out: Path, ranks: int) -> dict:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
    launcher += ["--num_gpus", str(ranks), "--hostfile", "/nonexistent", "--master_port", str(port)]
    tools = str(Path(sys.executable).parent)
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    command = [sys.executable, *(launcher if ranks > 1 else []), str(WORKER), str(out)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("equality") / "one.pt", 1)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("equality") / "two.pt", 2)


class PlainEngine:
    """What an objective needs of an engine, without DeepSpeed."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module, self.device = module, torch.device("cpu")

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def plain_update(name: str, lr: float, steps: int) -> dict[str, torch.Tensor]:
    """The whole batch in one forward and one textbook SGD step."""
    tokenizer = worker.train_tokenizer(["a b c d e f g"] * 3, 300, None)
    module = worker.module_for(name, tokenizer)
    objectives = worker.objectives_for(name, PlainEngine(module), worker.optim(lr))
    pool = worker.pool_for(name)
    for _ in range(steps):
        module.zero_grad()
        for objective in objectives:
            batch = pool.of(objective.group).batch(list(range(8)))
            counts = {key: float(value) for key, value in objective.counts(batch).items()}
            sum_terms(objective.loss(batch), counts).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= lr * parameter.grad
    return {key: value.detach().clone() for key, value in module.named_parameters(remove_duplicate=False)}


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def check_equal(results: dict, expected: dict) -> None:
    for (name, stage, budget), (gradients, weights, _) in results.items():
        want_gradients, want_weights, _ = expected[name, 0, 300]
        assert gradients.keys() == want_gradients.keys() and len(gradients) > 10
        for key, gradient in gradients.items():
            where = f"{name}, ZeRO-{stage}, {budget} tokens: {key}"
            assert difference(gradient, want_gradients[key]) < GRADIENT, where
            assert difference(weights[key], want_weights[key]) < WEIGHTS, where


@pytest.mark.parametrize("name", worker.NAMES)
def test_one_rank_equals_plain_torch(one_rank, name):
    weights = plain_update(name, worker.STEP_LR, 3)
    assert len(weights) > 10
    for key, value in one_rank[name, 0, 300][1].items():
        assert difference(value, weights[key]) < WEIGHTS, key


def test_gradients_are_not_trivially_equal(one_rank):
    for (name, _, _), (gradients, _, _) in one_rank.items():
        assert all(gradient.norm() > 0 for gradient in gradients.values()), name
    assert (
        difference(
            one_rank["sft", 0, 300][0]["model.model.norm.weight"], one_rank["dpo", 0, 300][0]["model.model.norm.weight"]
        )
        > 0.1
    )


def test_one_rank_whatever_the_stage_and_the_budget(one_rank):
    check_equal(one_rank, one_rank)


@pytest.mark.distributed
def test_two_ranks_give_the_update_of_one(one_rank, two_ranks):
    assert two_ranks.keys() == one_rank.keys()
    check_equal(two_ranks, one_rank)
    for key, (_, _, metrics) in two_ranks.items():
        for name, value in one_rank[key][2].items():
            assert name == "held" or metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), (key, name)


@pytest.mark.distributed
def test_each_rank_holds_its_share_under_zero_3(two_ranks):
    for (name, stage, _), (_, _, metrics) in two_ranks.items():
        assert metrics["held"] == pytest.approx(0.5 if stage == 3 else 1.0, abs=0.01), name
