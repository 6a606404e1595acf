"""One engine on one rank, under every ZeRO stage: step, clipping, non-finite numbers, whole weights, checkpoints."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf.batch import Loss
from rlhf.engine import finite
from rlhf.engine.ema import Ema
from rlhf.engine.engine import Engine, sum_terms
from rlhf.errors import CheckpointError, UnsafeError
from rlhf.recipe.schema import OptimBlock, ZeroBlock

STAGES = (0, 1, 2, 3)
SGD = {"optimizer": "sgd", "max_grad_norm": 0.0}


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def engine_of(stage: int, module: nn.Module | None = None, bf16: bool = False, **optim) -> Engine:
    block = ZeroBlock(stage=stage, persistence_threshold=0, bucket_size=1000)
    return Engine(module or network(), block, bf16=bf16, optim=OptimBlock(**{**SGD, **optim}))


def rows(seed: int = 1, count: int = 4) -> Tensor:
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def loss_of(engine: Engine, inputs: Tensor, factor: float = 1.0) -> Loss:
    return Loss({"square": (factor * engine(inputs).pow(2).sum(), "rows", 1.0)})


def gradients(inputs: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
    """The textbook's, without an engine."""
    module = network()
    (factor * module(inputs).pow(2).sum() / len(inputs)).backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def total_norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().pow(2).sum()) for tensor in tensors.values()))


def test_terms_add_up():
    loss = Loss({"a": (torch.tensor(6.0), "tokens", 1.0), "b": (torch.tensor(5.0), "rows", 0.5)})
    assert sum_terms(loss, {"tokens": 3.0, "rows": 10.0}).item() == pytest.approx(2 + 0.25)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_lr_times_the_gradient(forked, stage):
    def body():
        engine, inputs = engine_of(stage), rows()
        before, expected = engine.state_dict(), gradients(rows())
        share = engine.backward(loss_of(engine, inputs), {"rows": 4.0})
        assert share == pytest.approx(float(network()(inputs).pow(2).sum() / 4), rel=1e-6)
        norm = engine.step(0.1)
        assert norm == pytest.approx(total_norm(expected), rel=1e-5)
        after = engine.state_dict()
        for name, gradient in expected.items():
            torch.testing.assert_close(before[name] - after[name], 0.1 * gradient, atol=1e-7, rtol=0)
        # the next step starts from no gradient
        engine.backward(loss_of(engine, inputs, factor=0.0), {"rows": 4.0})
        assert engine.step(0.1) == 0.0
        for name, value in engine.state_dict().items():
            assert torch.equal(value, after[name])

    forked(body)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_add_up_to_the_batch(forked, stage):
    def body():
        engine, inputs = engine_of(stage), rows(count=5)
        before = engine.state_dict()
        for part in (inputs[:2], inputs[2:4], inputs[4:]):
            engine.backward(loss_of(engine, part), {"rows": 5.0})
        engine.step(1.0)
        after = engine.state_dict()
        for name, gradient in gradients(inputs).items():
            torch.testing.assert_close(before[name] - after[name], gradient, atol=1e-6, rtol=0)

    forked(body)


@pytest.mark.parametrize("stage", STAGES)
def test_clipping_bounds_the_step_and_tells_the_norm_before(forked, stage):
    def body():
        engine, expected = engine_of(stage, max_grad_norm=0.5), gradients(rows(), 100.0)
        before = engine.state_dict()
        engine.backward(loss_of(engine, rows(), 100.0), {"rows": 4.0})
        norm = engine.step(1.0)
        assert norm == pytest.approx(total_norm(expected), rel=1e-5) and norm > 50
        after = engine.state_dict()
        step = {name: before[name] - after[name] for name in before}
        assert total_norm(step) == pytest.approx(0.5, rel=1e-4)
        for name, gradient in expected.items():
            torch.testing.assert_close(step[name], gradient * (0.5 / norm), atol=1e-6, rtol=0)

    forked(body)


# --- what is not finite -----------------------------------------------------------------------------------------------


def with_nan_loss(outputs: Tensor) -> Tensor:
    return outputs.pow(2).sum() * float("nan")


def with_infinite_loss(outputs: Tensor) -> Tensor:
    return outputs.clamp(max=-1e9).sum() + float("inf")  # its gradient would be 0


def with_nan_gradient(outputs: Tensor) -> Tensor:
    return outputs.mul(0.0).pow(2).sum().sqrt()  # 0, and its gradient is 0 / 0


def with_infinite_gradient(outputs: Tensor) -> Tensor:
    return (outputs - outputs.detach())[0, 0] * 1e30 * 1e30  # 0, and its gradient overflows


BAD = [with_nan_loss, with_infinite_loss, with_nan_gradient, with_infinite_gradient]


def everything(engine: Engine) -> dict[str, Tensor]:
    """Weights, master weights and what the optimizer remembers, its step counters too."""
    optimizer = engine._engine.optimizer
    return engine.state_dict() | {n: v.clone() for n, v in finite.state_tensors(optimizer, engine.zero.stage)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def pushed(engine: Engine, step: int, bad=None) -> None:
    """Two micro-batches, of which the second may be bad."""
    dtype = engine.module[0].weight.dtype
    for part in range(2):
        outputs = engine(rows(2 * step + part).to(dtype))
        total = bad(outputs) if bad is not None and part else outputs.pow(2).sum()
        engine.backward(Loss({"square": (total, "rows", 1.0)}), {"rows": 8.0})


@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), *((s, d) for s in (1, 2, 3) for d in ("fp32", "bf16"))])
def test_what_is_not_finite_is_left_out_as_if_it_had_never_been(forked, stage, dtype):
    """Byte for byte a run without that update: weights, moments, step counters, and the updates after it."""

    def body():
        def fresh(norm: float) -> Engine:
            module = network().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
            return engine_of(stage, module, bf16=dtype == "bf16", optimizer="adamw", max_grad_norm=norm)

        for norm, bad in zip((0.0, 1.0, 0.0, 1.0), BAD, strict=True):
            straight, engine = fresh(norm), fresh(norm)
            for step in range(3):
                if step != 1:
                    pushed(straight, step)
                    straight.step(0.01)
                before = everything(engine)
                pushed(engine, step, bad if step == 1 else None)
                found = engine.step(0.01)
                assert engine.is_skipped == math.isnan(found) == (step == 1), step
                if step == 1:
                    assert same(everything(engine), before)
                    assert any("loss" in name or "gradient of" in name for name in engine.not_finite)
            assert same(everything(engine), everything(straight))

    forked(body)


class Half(nn.Module):
    """Its second layer counts where `both` do."""

    both = False

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.used(inputs) + (self.spare(inputs) if self.both else 0.0)


@pytest.mark.parametrize("stage", STAGES)
def test_a_parameter_that_is_not_reached_gets_nothing_of_what_was_left_out(forked, stage):
    def body():
        engine, found = engine_of(stage, Half()), []
        for both, factor in ((True, 1.0), (True, float("nan")), (False, 1.0)):
            engine.module.both = both
            engine.backward(loss_of(engine, rows(), factor), {"rows": 4.0})
            engine.step(0.1)
            found.append(engine.state_dict())
        assert not engine.is_skipped and not torch.equal(found[2]["used.weight"], found[1]["used.weight"])
        assert torch.equal(found[2]["spare.weight"], found[0]["spare.weight"])

    forked(body)


@pytest.mark.parametrize("stage", STAGES)
def test_a_weight_that_is_not_finite_is_seen_before_the_step(forked, stage, value=float("inf")):
    """Even one that no output depends on."""

    def body():
        torch.manual_seed(0)
        embedding = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
        engine = engine_of(stage, embedding, optimizer="adamw")
        with torch.no_grad():
            held = dict(finite.held(engine.module.named_parameters()))["0.weight"]
            held.view(-1)[-1] = value
        before = everything(engine)
        outputs = engine(torch.tensor([0, 1]))
        assert outputs.isfinite().all()
        engine.backward(Loss({"square": (outputs.pow(2).sum(), "rows", 1.0)}), {"rows": 2.0})
        engine.step(0.1)
        assert engine.is_skipped and engine.not_finite == {"weight 0.weight": str(value)}
        after = everything(engine)
        assert all(torch.equal(a.nan_to_num(7.0), after[name].nan_to_num(7.0)) for name, a in before.items())
        assert engine.bad_state()["0.weight"] == str(value)

    forked(body)


@pytest.mark.parametrize("stage", STAGES)
def test_trained_tensors_that_no_gradient_reaches_are_named_once(forked, stage):
    def body():
        for module, expected in ((network(), []), (Half(), ["spare.bias", "spare.weight"])):
            engine = engine_of(stage, module)
            engine.backward(loss_of(engine, rows(), factor=0.0), {"rows": 4.0})
            assert engine.unreached() == expected and engine.unreached() is None

    forked(body)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_frozen_engine(forked, stage):
    def body():
        block = ZeroBlock(stage=stage, persistence_threshold=0)
        engine = Engine(network(), block, bf16=False)
        assert engine.num_elements() == (0, 3 * 8 + 8 + 8 * 2 + 2)
        assert not engine.module.training
        with engine.evaluating():
            found = engine(rows())
        assert not found.requires_grad
        torch.testing.assert_close(found, network()(rows()).detach(), atol=1e-6, rtol=0)

    forked(body)


@pytest.mark.parametrize("stage", STAGES)
def test_evaluating_restores_the_mode(forked, stage):
    def body():
        engine = engine_of(stage, nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5)))
        assert engine.module.training
        with engine.evaluating():
            assert not engine.module.training and not engine(rows()).requires_grad
            assert torch.equal(engine(rows()), engine(rows()))
        assert engine.module.training and not torch.equal(engine(rows()), engine(rows()))
        with pytest.raises(ZeroDivisionError), engine.evaluating():
            1 / 0  # noqa: B018
        assert engine.module.training

    forked(body)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_gathered_weights_are_whole_and_training_goes_on(forked, stage):
    def body():
        engine, other = engine_of(stage), engine_of(stage)
        for step in range(3):  # forwards without hooks between the steps change nothing
            with engine.gathered() as module, torch.no_grad():
                assert module[0].weight.shape == (8, 3)
                first = module(rows())
                assert torch.equal(module(rows()), first)
            for one in (engine, other):
                one.backward(loss_of(one, rows(step)), {"rows": 4.0})
                one.step(0.1)
        expected = other.state_dict()
        for name, value in engine.state_dict().items():
            assert torch.equal(value, expected[name]), name

    forked(body)


@pytest.mark.parametrize("stage", STAGES)
def test_state_dict_is_a_whole_copy(forked, stage):
    def body():
        engine, expected = engine_of(stage), network().state_dict()
        state = engine.state_dict()
        assert state.keys() == expected.keys()
        for name, value in state.items():
            assert torch.equal(value, expected[name]) and not value.requires_grad
            value.zero_()
        assert torch.equal(engine.state_dict()["0.weight"], expected["0.weight"])

    forked(body)


def test_gains_and_biases_are_not_decayed(forked):
    def body():
        engine = engine_of(0, optimizer="adamw", weight_decay=0.5)
        before = engine.state_dict()
        engine.backward(loss_of(engine, rows(), factor=0.0), {"rows": 4.0})
        engine.step(0.1)
        for name, value in engine.state_dict().items():
            decay = 0.95 if name.endswith("weight") else 1.0
            torch.testing.assert_close(value, decay * before[name], atol=1e-7, rtol=0)

    forked(body)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_engine_goes_on_as_the_saved_one(forked, tmp_path, stage):
    def body():
        engine = engine_of(stage, optimizer="adamw")
        for step in range(2):
            engine.backward(loss_of(engine, rows(step)), {"rows": 4.0})
            engine.step(0.01)
        engine.save(tmp_path)
        fresh = engine_of(stage, optimizer="adamw")
        fresh.load(tmp_path)
        for one in (engine, fresh):
            one.backward(loss_of(one, rows(9)), {"rows": 4.0})
            one.step(0.01)
        expected = engine.state_dict()
        for name, value in fresh.state_dict().items():
            assert torch.equal(value, expected[name]), name
        assert not torch.equal(expected["0.weight"], network().state_dict()["0.weight"])

    forked(body)


class Harmful:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "was here"))


@pytest.mark.parametrize(
    ("stage", "pattern"), [(0, "*model_states.pt"), (1, "*model_states.pt"), (1, "*optim_states.pt"), (3, "*optim_*")]
)
def test_code_in_a_checkpoint_is_not_run(forked, tmp_path, stage, pattern):
    def body():
        engine = engine_of(stage, optimizer="adamw")
        engine.save(tmp_path / "checkpoint")
        file = next((tmp_path / "checkpoint").rglob(pattern))
        torch.save({**torch.load(file, weights_only=False), "extra": Harmful(tmp_path / "trace")}, file)
        with pytest.raises(UnsafeError, match="expected weights or optimizer state, found code"):
            engine.load(tmp_path / "checkpoint")
        assert not (tmp_path / "trace").exists()

    forked(body)


def test_code_in_the_file_of_another_rank_stops_this_one_too(forked, tmp_path):
    def body():
        engine = engine_of(1, optimizer="adamw")
        engine.save(tmp_path / "checkpoint")
        own = next((tmp_path / "checkpoint").rglob("*optim_states.pt"))
        torch.save(Harmful(tmp_path / "trace"), own.with_name(own.name.replace("rank_0", "rank_1", 1)))
        with pytest.raises(UnsafeError, match="expected weights or optimizer state, found code"):
            engine.load(tmp_path / "checkpoint")
        assert not (tmp_path / "trace").exists()

    forked(body)


def test_deepspeed_itself_reads_weights_only(forked, tmp_path):
    """Whatever happens to a file after it was looked through."""

    def body():
        torch.save(Harmful(tmp_path / "trace"), tmp_path / "a.pt")
        with pytest.raises(UnsafeError, match="found code"):
            engine_of(1)._engine.checkpoint_engine.load(str(tmp_path / "a.pt"))
        assert not (tmp_path / "trace").exists()

    forked(body)


def test_a_damaged_average_is_told(forked, tmp_path):
    def body():
        average = Ema(engine_of(0), 0.5)
        average.save(tmp_path)
        file = next(tmp_path.glob("ema-*"))
        file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(CheckpointError, match="expected safetensors, found damage"):
            average.load(tmp_path)

    forked(body)


def test_a_folder_without_a_checkpoint(forked, tmp_path):
    def body():
        with pytest.raises(CheckpointError, match="expected a checkpoint, found none"):
            engine_of(0).load(tmp_path)

    forked(body)


def test_the_module_given_is_the_module_trained(forked):
    def body():
        module = network()
        untouched = copy.deepcopy(module)
        engine = engine_of(0, module)
        assert engine.module is module
        engine.backward(loss_of(engine, rows()), {"rows": 4.0})
        engine.step(0.1)
        assert not torch.equal(module[0].weight, untouched[0].weight)

    forked(body)
