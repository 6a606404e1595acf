"""Roles on one base behave as separate models do: 1 or 2 ranks, ZeRO 0 to 3, against plain torch."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from rlhf.engine.engine import sum_terms
from rlhf.models.build import build_policy, build_scorer
from rlhf.models.export import save_policy, save_scorer
from rlhf.models.forward import PolicyModule, ScorerModule
from rlhf.recipe.schema import InitBlock

WORKER = Path(__file__).with_name("shared_worker.py")
ROOT = Path(__file__).parents[2]
INIT = InitBlock(hidden=32, layers=2, heads=4, kv_heads=2, ffn=64, vocab=300, context=64)
PREFIX = "model.base_model.model."


def load_worker():
    spec = importlib.util.spec_from_file_location("shared_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    sys.modules["shared_worker"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


worker = load_worker()
FROZEN = replace(worker.SETUP, lora=None, trained=False)
RESUMED = [name for name, parts in worker.PARTS.items() if worker.resumed in parts]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A policy, and a reward model trained (here: drawn) as an adapter and head on it."""
    folder = tmp_path_factory.mktemp("shared")
    tokenizer = worker.train_tokenizer(["a b c d e f g"] * 3, 300, None)
    save_policy(PolicyModule(build_policy(INIT, tokenizer, FROZEN)), tokenizer, folder / "sft")
    scorer = ScorerModule(build_scorer(str(folder / "sft"), tokenizer, worker.SETUP, head="new"))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in scorer.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    save_scorer(scorer, tokenizer, folder / "rm")
    return folder


def run(models: Path, ranks: int) -> dict:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    launcher = ["-m", "deepspeed.launcher.runner", "--log_level", "critical", "--no_local_rank"]
    launcher += ["--num_gpus", str(ranks), "--hostfile", "/nonexistent", "--master_port", str(port)]
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    env = {**os.environ, **fixed, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    out = models / f"{ranks}.pt"
    command = [sys.executable, *(launcher if ranks > 1 else []), str(WORKER), str(models), str(out)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(
    scope="module", params=[1, pytest.param(2, marks=pytest.mark.distributed)], ids=["one rank", "two ranks"]
)
def results(request, models) -> dict:
    return run(models, request.param)


@pytest.fixture(scope="module")
def plain(models, one_start) -> dict:
    """Four models, each with weights of its own, and the same updates of two of them as a textbook does them."""
    tokenizer = worker.train_tokenizer(["a b c d e f g"] * 3, 300, None)
    policy = PolicyModule(build_policy(str(models / "sft"), tokenizer, worker.SETUP))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_" in name:  # an adapter is drawn anew by everybody
                parameter.copy_(one_start[name.replace(".default.", ".policy.")])
    base = build_scorer(str(models / "sft"), tokenizer, FROZEN, head="new")
    critic = ScorerModule(PeftModel.from_pretrained(base, str(models / "rm" / "adapter"), is_trainable=True))
    reference = PolicyModule(build_policy(str(models / "sft"), tokenizer, FROZEN))
    reward = ScorerModule(build_scorer(str(models / "rm"), tokenizer, FROZEN, head="keep"))
    rows = worker.batch()

    @torch.no_grad()
    def outputs() -> dict[str, Tensor]:
        return {
            "policy": policy(rows.ids, rows.attention, rows.mask),
            "reference": reference(rows.ids, rows.attention, rows.mask),
            "rewards_0": reward(rows.ids, rows.attention),
            "critic": critic(rows.ids, rows.attention, rows.mask),
        }

    found = {"outputs": outputs(), "gradients": {}}
    for number in range(worker.STEPS):
        for role, module, loss in (("policy", policy, worker.policy_loss), ("critic", critic, worker.value_loss)):
            module.zero_grad()
            sum_terms(loss(module, rows), {"tokens": float(rows.mask.sum())}).backward()
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    if number == 0:
                        found["gradients"][shared_name(name, role)] = parameter.grad.clone()
                    with torch.no_grad():
                        parameter -= worker.LR * parameter.grad
    found["moved"] = outputs()
    found["weights"] = {
        shared_name(name, role): parameter.detach()
        for role, module in (("policy", policy), ("critic", critic))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }
    return found


@pytest.fixture(scope="module")
def one_start(results) -> dict[str, Tensor]:
    return results["zero0"]["updates"]["before"]


def shared_name(name: str, role: str) -> str:
    """The name of a separate model's parameter in the shared module."""
    return f"heads.{role}.weight" if ".modules_to_save." in name else name.replace(".default.", f".{role}.")


def updated(results: dict) -> list[tuple[str, dict]]:
    return [(variant, found) for variant, found in results.items() if "updates" in found]


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12))


def test_every_role_equals_its_separate_model_before_and_after_updates(results, plain):
    for variant, found in updated(results):
        for when in ("outputs", "moved"):
            for role, expected in plain[when].items():
                where = f"{variant}, {when}, {role}"
                attended = slice(None) if role == "rewards_0" else worker.batch().mask
                torch.testing.assert_close(
                    found["updates"][when][role][attended], expected[attended], atol=2e-5, rtol=0, msg=where
                )
    moved = {role: difference(plain["moved"][role], plain["outputs"][role]) for role in plain["moved"]}
    assert moved["policy"] > 1e-3 and moved["critic"] > 1e-3 and moved["reference"] == moved["rewards_0"] == 0


def test_gradients_and_weights_equal_those_of_separate_models(results, plain):
    assert len(plain["gradients"]) == 2 * 28 + 1  # A and B of 14 projections twice, and the critic's head
    for variant, found in updated(results):
        for name, gradient in plain["gradients"].items():
            where = f"{variant}: {name}"
            if gradient.norm() == 0:  # of the fresh adapter's A, since B is zero
                assert ".lora_A.policy." in name and found["updates"]["gradients"][name].norm() == 0, where
            else:
                assert difference(found["updates"]["gradients"][name], gradient) < 1e-4, where  # steps are small
            assert difference(found["updates"]["after"][name], plain["weights"][name]) < 1e-5, where


def test_nothing_but_the_two_roles_moves(results, plain):
    for variant, found in updated(results):
        before, after = found["updates"]["before"], found["updates"]["after"]
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == set(plain["weights"]), variant
        numbers = sum(value.numel() for value in {value.data_ptr(): value for value in before.values()}.values())
        trained = {role: 0 for role in ("policy", "critic")}
        for name in changed:
            trained["policy" if ".policy." in name else "critic"] += before[name].numel()
        counted = found["updates"]["trained"]
        assert [count for count, _ in counted] == list(trained.values()) and counted[0][1] <= numbers, variant


@pytest.mark.parametrize("variant", RESUMED)
def test_checkpoints_restore_each_engine_to_the_bit(results, variant):
    found = results[variant]["resumed"]
    final = found["history"][2]
    for name, value in final.items():
        assert torch.equal(found["again"][name], value), name
    assert found["metrics"] == found["again_metrics"] and all(norm > 0.01 for norm in found["metrics"].values())
    for name, value in found["alone"].items():  # the actor's checkpoint alone: the critic is where it started
        expected = found["history"][1] if ".policy." in name else found["start"]
        assert torch.equal(value, expected[name]), name
    assert not torch.equal(final["heads.critic.weight"], found["history"][1]["heads.critic.weight"])
    trained = 4 * sum(value.numel() for name, value in final.items() if ".policy." in name or ".critic." in name)
    base = 4 * sum(value.numel() for name, value in final.items() if ".lora_" not in name and "heads." not in name)
    assert found["written"] < 3 * trained + 0.9 * base + 200_000  # weights, moments and what DeepSpeed says of them


@pytest.mark.parametrize("variant", RESUMED)
def test_the_average_follows_the_weights(results, variant):
    found = results[variant]["resumed"]
    decay = worker.DECAY
    for name, live in found["history"][2].items():
        if ".policy." not in name:
            assert torch.equal(found["swapped"][name], live), name
            continue
        expected = found["start"][name].double()
        for state in found["history"]:
            expected = decay * expected + (1 - decay) * state[name].double()
        torch.testing.assert_close(found["swapped"][name].double(), expected, atol=1e-7, rtol=0, msg=name)
        assert torch.equal(found["back"][name], live), name
        assert torch.equal(found["again_swapped"][name], found["swapped"][name]), name
    moved = "lora_B.policy"
    assert any(not torch.equal(found["swapped"][n], v) for n, v in found["history"][2].items() if moved in n)
    assert len(found["averaged"]) == 28
