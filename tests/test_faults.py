"""Faults put into real runs: every guard that should notice does, says so in one message, and changes no weight."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.batch import Experience
from rlhf.data.examples import PromptExample
from rlhf.engine.engine import Engine
from rlhf.errors import NumericsError
from rlhf.models.forward import PolicyModule
from rlhf.recipe.guard_options import GuardsBlock, metric_of_alarms
from rlhf.recipe.schema import OptimBlock, ZeroBlock
from rlhf.recipe.stages import GRPORecipe
from rlhf.rewards.scorer import Scorer
from rlhf.train.alarms import Alarms
from rlhf.train.loop import Collected, Stage, update
from rlhf.train.objectives import PolicyObjective
from rlhf.train.online import OnlineCollector
from rlhf.train.pool import Budget
from rlhf.train.reference import Reference
from rlhf.train.rollout import Sampler
from rlhf.train.skips import Skips
from rlhf.train.state import OnlineState


def llama(seed: int = 1, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, pad_token_id=0, **options))


def recipe(**options: Any) -> GRPORecipe:
    values = {"model": {"from": "sft"}, "data": {"path": "x"}, "train": {"prompts": 4, "answers": 2, "seed": 1}}
    return GRPORecipe.model_validate({**values, "sampling": {"max_new_tokens": 6, "temperature": 0.7}, **options})


def collector(module: nn.Module, zero: int = 0, score: Any = None, minibatches: int = 1) -> OnlineCollector:
    """A policy that starts at its reference."""
    chosen = recipe(train={"prompts": 4, "answers": 2, "seed": 1, "minibatches": minibatches})
    block = ZeroBlock(stage=zero, persistence_threshold=0)
    actor = Engine(module, block, bf16=False, optim=OptimBlock(optimizer="sgd"))
    reference = Engine(PolicyModule(llama()), ZeroBlock(), bf16=False)
    score = score or (lambda rollout: [float(i) for i, _ in enumerate(rollout.texts)])
    return OnlineCollector(
        chosen,
        [PromptExample(list(range(40, 43 + i)), i, {"prompt": str(i)}) for i in range(4)],
        Sampler(list(range(1, 20)), 0, str),
        actor,
        Reference(reference),
        Scorer({"mine": score}, {"mine": 1.0}),
        None,
        None,
        None,
        OnlineState.at_start(chosen),
        starts_at_reference=True,
        budget=Budget(64),
    )


def stage(one: OnlineCollector, file: Path = Path("skipped.jsonl")) -> Stage:
    nothing: dict[str, Any] = dict.fromkeys(Stage.__dataclass_fields__)
    objective = PolicyObjective.from_recipe(one.actor, one.recipe, one.state)
    own = {"collector": one, "objectives": [objective], "steps": 2, "updates_per_step": 1, "budget": one.budget}
    skips = Skips(3, file, lambda group, numbers: {})
    return Stage(**{**nothing, **own, "policy_starts": 0, "averages": [], "skips": skips})


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in (engine.state_dict() or {}).items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


# --- what samples is not what learns ----------------------------------------------------------------------------------


class Stale(PolicyModule):
    """While it samples, its weights are those from before the last change: a sampler that was never told."""

    is_sampling = False

    def __init__(self, model: nn.Module, old: nn.Module) -> None:
        super().__init__(model)
        self.olds = [old]  # in a list, it is no part of the module

    @property
    def core(self) -> nn.Module:
        return self.olds[0] if self.is_sampling else super().core


class StaleCollector(OnlineCollector):
    """Samples from the weights of one update ago."""

    def sample(self, step: int, refill: int, whose: str):
        self.actor.module.is_sampling = True
        try:
            return super().sample(step, refill, whose)
        finally:
            self.actor.module.is_sampling = False


def moved(model: nn.Module, by: float) -> nn.Module:
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize(("by", "refused"), [(0.0, False), (0.05, True)])
def test_a_sampler_with_weights_of_one_update_ago_is_found_out(forked, by, refused, minibatches):
    """Where the rollout has one update, by the update's own pass, before any weight changes."""

    def body():
        plain = collector(Stale(llama(), moved(llama(), by)), minibatches=minibatches)
        one = StaleCollector(**{name: getattr(plain, name) for name in OnlineCollector.__dataclass_fields__})
        before = everything(one.actor)
        if not refused:
            metrics = update(stage(one), 0, one.collect(0))
            assert metrics["policy/loss"] is not None and not same(before, everything(one.actor))
            return
        with pytest.raises(NumericsError, match="rollout 1: expected sampler and trainer to agree") as caught:
            update(stage(one), 0, one.collect(0))
        assert "other weights" in str(caught.value) and same(before, everything(one.actor))

    forked(body)


class HotCollector(OnlineCollector):
    """Forgets the temperature where it looks back."""

    def look_back(self, answers):
        cold = self.recipe.sampling.model_copy(update={"temperature": 1.0})
        other = OnlineCollector(**{name: getattr(self, name) for name in OnlineCollector.__dataclass_fields__})
        object.__setattr__(other, "recipe", self.recipe.model_copy(update={"sampling": cold}))
        return OnlineCollector.look_back(other, answers)


def test_a_temperature_on_one_side_only_is_found_out(forked):
    def body():
        plain = collector(PolicyModule(llama()), minibatches=2)
        one = HotCollector(**{name: getattr(plain, name) for name in OnlineCollector.__dataclass_fields__})
        with pytest.raises(NumericsError, match="expected sampler and trainer to agree") as caught:
            one.collect(0)
        assert "sampling.temperature" in str(caught.value)

    forked(body)


class Twice(OnlineCollector):
    """Asks the policy before the update, too."""

    def is_first_seen_in_update(self):
        return False


def test_the_only_update_on_a_rollout_needs_no_pass_before_it(forked):
    """The same update and the same numbers, with one pass through the policy less."""

    def body():
        found = []
        for kind in (OnlineCollector, Twice):
            plain = collector(PolicyModule(llama()))
            one = kind(**{name: getattr(plain, name) for name in OnlineCollector.__dataclass_fields__})
            passes = []
            one.actor.module.register_forward_hook(lambda *_, passes=passes: passes.append(1))
            collected = one.collect(0)
            metrics = {**collected.metrics, **update(stage(one), 0, collected)}
            found.append((metrics, everything(one.actor), len(passes)))
        (metrics, weights, few), (expected, known, many) = found
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert name.startswith("speed/") or metrics[name] == pytest.approx(value, abs=1e-5), name
        assert all(torch.allclose(weights[name], value, atol=1e-6) for name, value in known.items())
        assert few == many / 2, "the turns of one plan"
        assert metrics["rollout/sampler_gap"] > 0 and "rollout/kl_ref" in metrics

    forked(body)


# Where the rollout has one update, its own pass is compared with the sampler; else with the pass before it.
FOUND_BY = [(1, "expected sampler and trainer to agree"), (2, "fresh samples of step 1: log-probabilities differ")]


@pytest.mark.parametrize(("minibatches", "words"), FOUND_BY)
def test_another_temperature_in_the_update_is_found_out(forked, minibatches, words):
    def body():
        one = collector(PolicyModule(llama()), minibatches=minibatches)
        collected, before = one.collect(0), everything(one.actor)
        broken = stage(one)
        cold = one.recipe.sampling.model_copy(update={"temperature": 1.0})
        object.__setattr__(broken.objectives[0], "sampling", cold)
        with pytest.raises(NumericsError, match=words):
            update(broken, 0, collected)
        assert same(before, everything(one.actor))

    forked(body)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_a_policy_that_is_not_its_reference_at_the_start_is_found_out(forked, minibatches):
    def body():
        one = collector(PolicyModule(llama(seed=2)), minibatches=minibatches)
        before = everything(one.actor)
        with pytest.raises(NumericsError, match="policy and reference at the start: log-probabilities differ"):
            update(stage(one), 0, one.collect(0))
        assert same(before, everything(one.actor))

    forked(body)


@pytest.mark.parametrize(("minibatches", "words"), FOUND_BY)
def test_weights_changed_between_rollout_and_update_are_found_out(forked, minibatches, words):
    def body():
        one = collector(PolicyModule(llama()), minibatches=minibatches)
        collected = one.collect(0)
        moved(one.actor.module, 0.05)
        before = everything(one.actor)
        with pytest.raises(NumericsError, match=words):
            update(stage(one), 0, collected)
        assert same(before, everything(one.actor))

    forked(body)


class Dropping(nn.Module):
    """A layer with dropout behind it that nobody switched off."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.layer(x))


def test_dropout_that_is_left_on_is_found_before_an_update(forked):
    def body():
        model = llama()
        model.model.layers[1].mlp = Dropping(model.model.layers[1].mlp)
        with pytest.raises(
            NumericsError, match=r"policy: expected no dropout, found .*layers\.1\.mlp\.dropout \(0\.1\)"
        ):
            collector(PolicyModule(model)).collect(0)

    forked(body)


# --- numbers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minibatches", "whose"), [(1, "sample"), (2, "old")])
def test_nan_weights_end_the_rollout(forked, minibatches, whose):
    def body():
        one = collector(PolicyModule(llama()), minibatches=minibatches)
        with torch.no_grad():
            one.actor.module.model.lm_head.weight[3] = torch.nan
        with pytest.raises(NumericsError, match=f"rollout 1: expected finite {whose}_logprobs, found"):
            one.collect(0)

    forked(body)


def test_a_score_of_infinity_ends_the_rollout(forked):
    def body():
        with pytest.raises(NumericsError, match="rollout 1: expected finite (scores|advantages), found"):
            collector(
                PolicyModule(llama()), score=lambda rollout: [math.inf, *[0.0] * (len(rollout.texts) - 1)]
            ).collect(0)

    forked(body)


def test_an_update_with_an_infinite_advantage_is_left_out(forked, tmp_path):
    """The next one, on the rollout as it is, is the first of a run without it."""

    def body():
        one = collector(PolicyModule(llama()))
        collected, before = one.collect(0), everything(one.actor)
        (pool,) = collected.minibatches

        def spoilt(places: list[int]) -> Experience:
            rows = pool.batch(places)
            rows.advantages[[place == 0 for place in places], 0] = math.inf
            return rows

        running = stage(one, tmp_path / "skipped.jsonl")
        metrics = update(running, 0, Collected([replace(pool, batch=spoilt)]))
        assert same(before, everything(one.actor)) and metrics == {}
        assert running.skips.total == running.skips.in_a_row["policy"] == 1 and running.skips.reason is None
        (row,) = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
        assert (row["step"], row["minibatch"], row["of"], row["in_a_row"]) == (1, 1, "policy", 1)
        assert {"rank": 0, "tensor": "advantages", "value": "inf"} in row["found"]
        assert "loss" in [each["tensor"] for each in row["found"]]
        assert set(each["row"] for each in row["rows"]) <= set(range(4)) and row["rows"]
        update(running, 0, collected)
        assert not same(before, everything(one.actor)) and running.skips.in_a_row == {}
        straight = collector(PolicyModule(llama()))
        update(stage(straight), 0, straight.collect(0))
        assert same(everything(one.actor), everything(straight.actor))

    forked(body)


# --- alarms -----------------------------------------------------------------------------------------------------------

# name -> the values of its metric in a run that goes wrong, and the rollout (from 1) at which it is said
COLLAPSES = {
    "kl_spike": ([0.1, 3.0, 60.0, 70.0], 3),
    "entropy_collapse": ([3.0, 1.0, 0.2, 0.2], 3),
    "eos_rate": ([0.9, 0.8, 0.3, 0.2], 3),
    "length_drift": ([10.0, 20.0, 31.0, 40.0], 3),
    "flat_reward": ([1.0, 0.0, 0.0, 0.0], 4),
    "all_clipped": ([0.1, 0.0, 0.0, 0.0], 4),
    "explained_variance": ([-0.2] * 5, 5),
    "repeated_answers": ([0.0, 0.2, 0.6, 0.9], 3),
}


@pytest.mark.parametrize("name", GuardsBlock.model_fields)
@pytest.mark.parametrize("on_alarm", ["warn", "stop"])
def test_every_alarm_goes_off_once_in_a_run_that_goes_wrong(name, on_alarm):
    values, at = COLLAPSES[name]
    alarms = Alarms(GuardsBlock(**{name: {"on_alarm": on_alarm}}))
    raised = [
        [alarm for alarm in alarms.look({metric_of_alarms()[name]: value}) if alarm.name == name] for value in values
    ]
    assert [bool(found) for found in raised] == [number == at for number in range(1, len(values) + 1)]
    assert raised[at - 1][0].stops is (on_alarm == "stop") and alarms.marks()[f"alarm/{name}"] == 1.0


REWARDS = """
import math


def flat(rows, answers):
    return [1.0 for _ in answers]


def nan(rows, answers):
    return [math.nan if i == 1 else 0.0 for i, _ in enumerate(answers)]
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.write_text(REWARDS)
    return file


def with_reward(code: Path, name: str, *options: str) -> list[str | Path]:
    words = ["--set", f"rewards={json.dumps([{'kind': 'function', 'function': f'{code}:{name}'}])}"]
    return [*words, *(word for option in options for word in ("--set", option)), "--allow-code", code]


def test_a_reward_that_never_differs_is_said_and_the_run_goes_on(cli, tiny, code):
    words = with_reward(code, "flat", "guards.flat_reward.rollouts=1")
    done = cli(*tiny.command("grpo", "--name", "flat-warned", *words))
    assert done.code == 0 and done.err.count("alarm flat_reward: all answers have had the same score") == 1
    assert [row["alarm/flat_reward"] for row in tiny.rows("flat-warned")] == [1.0, 1.0]
    assert "alarm flat_reward" in (tiny.root / "flat-warned" / "log.txt").read_text()
    model, start = (load_file(tiny.root / name / "model" / "model.safetensors") for name in ("flat-warned", "sft"))
    assert max(float((model[key] - start[key]).abs().max()) for key in model) < 1e-3  # the KL term alone


def test_an_alarm_that_stops_leaves_a_checkpoint_from_which_the_same_command_goes_on(cli, tiny, code):
    stop = "guards.flat_reward={rollouts: 2, on_alarm: stop}"
    command = tiny.command("grpo", "--name", "flat-stopped", *with_reward(code, "flat", stop, "train.rollouts=4"))
    done = cli(*command)
    assert done.code == 5 and done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert "stopped after step 2 as guards.flat_reward.on_alarm says" in done.err
    status = json.loads((tiny.root / "flat-stopped" / "status.json").read_text())
    assert status["state"] == "failed" and status["step"] == 2
    assert [path.name for path in (tiny.root / "flat-stopped" / "checkpoints").iterdir()] == ["step-000002"]
    assert [row["step"] for row in tiny.rows("flat-stopped")] == [1, 2]
    done = cli(*command)
    assert done.code == 0, done.err
    assert [row["step"] for row in tiny.rows("flat-stopped")] == [1, 2, 3, 4]
    assert "alarm flat_reward" not in done.err  # it was said, and is still on
    assert tiny.rows("flat-stopped")[3]["alarm/flat_reward"] == 1.0


def test_a_reward_that_returns_nan_is_one_clear_error(cli, tiny, code):
    done = cli(*tiny.command("grpo", "--name", "nan-reward", *with_reward(code, "nan")))
    assert done.code == 2 and done.err.count("error: ") == 1 and "Traceback" not in done.err
    assert "nan" in done.err and "mine.py:nan" in done.err, done.err


def test_nan_in_a_published_model_is_told_before_anything_is_learned(cli, tiny, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny.root / "sft" / "model", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    done = cli(*tiny.command("grpo", "--name", "nan-weights", "--set", f"model={{path: {broken}}}"))
    assert done.code == 5 and done.err.count("error: ") == 1 and "Traceback" not in done.err, done.err
    assert "expected finite weights, found nan in model.model.norm.weight" in done.err and str(broken) in done.err
    assert "rollout" not in done.err and not (tiny.root / "nan-weights" / "model").exists()
