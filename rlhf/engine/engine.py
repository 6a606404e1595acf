"""One model under DeepSpeed: call it, push a loss back through it, step it, look at it whole, save and load it.

The engine knows nothing of losses or language models. A loss arrives as sums (`rlhf.batch.Loss`) together with the
global count of each denominator, taken over all ranks and micro-batches before the first backward; so the update does
not depend on how the rows were spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from rlhf.batch import Loss
from rlhf.engine import dist, finite, zero
from rlhf.engine.files import CheckpointFiles, refuse_code
from rlhf.engine.proximal import PullToStart
from rlhf.errors import CheckpointError
from rlhf.recipe.schema import OptimBlock, ZeroBlock

_TAG = "deepspeed"


class Engine:
    """A module that DeepSpeed shards. With `optim` it is trained, without it is frozen and in eval mode.

    Several engines may train parts of one module: each says which `role` the module plays when it is called through
    the engine, and which parameters are `trained` for it. They must be all that the role's loss reaches: ZeRO-3 gives
    a trained parameter without a gradient the one of the step before. beside: an engine that has the module already.

    A step in which a number is not finite on any rank is left out on all of them: `is_skipped`, and `not_finite` says
    what this rank saw. Nothing of it stays: weights, optimizer state and step counters are as before.
    """

    def __init__(
        self,
        module: nn.Module,
        zero_block: ZeroBlock,
        *,
        bf16: bool,
        optim: OptimBlock | None = None,
        role: str | None = None,
        trained: Iterable[nn.Parameter] | None = None,
        beside: Engine | None = None,
    ) -> None:
        assert (role is None) == (trained is None), "a role and its parameters are named together"
        self.zero = zero_block
        self.optim = optim
        self.role = role
        self.is_skipped = False  # the last step
        self.not_finite: dict[str, str] = {}  # what this rank has seen in this update or the last: name -> value
        self.saw_not_finite = False  # in the loss or the metrics of the newest micro-batch
        self._is_pushing = False  # between the first backward of an update and its step
        self._outputs: list[Tensor] = []  # of the newest forward pass with a gradient
        self._unreached: set[str] | None = None  # trained parameters that no backward of the first update has reached
        self._watches: list[Any] = []
        self._grad_norm = math.nan
        self.updates = 0  # optimizer steps taken in this process
        self._all: list[Engine] = beside._all if beside is not None else []  # the engines of this module
        self._all.append(self)
        if optim is None:
            module.requires_grad_(False)
            self.trained: dict[str, nn.Parameter] = {}
            config = zero.frozen_config(zero_block, bf16=bf16)
            self._engine = deepspeed.initialize(model=module, config=config, dist_init_required=False)[0]
            self._engine.eval()  # returns None: never chain it
        else:
            own = {id(parameter) for parameter in trained or [p for p in module.parameters() if p.requires_grad]}
            self.trained = {name: p for name, p in module.named_parameters() if id(p) in own}
            optimizer = _optimizer(self.trained.values(), optim)
            if zero_block.stage == 0:
                optimizer.register_step_pre_hook(self._clip_before_step)
            config = zero.trained_config(zero_block, optim, bf16=bf16)
            self._engine = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
            self._engine.train()
            self._engine.checkpoint_engine = self._files = CheckpointFiles()
            # Scripts that read the files without us: no code lies in a checkpoint, and rank 0 would fail alone.
            self._engine._copy_recovery_script = lambda _: None
            self._unreached = set(self.trained)
            self._watches = [p.register_hook(self._reach(name)) for name, p in self.trained.items()]
            if zero_block.stage:
                self._name_gradients_in_time()

    def pull_to_start(self, l1: float) -> None:
        """Hold the trained weights to what they are now, by an L1 penalty on the change. Call it before `load`."""
        optimizer = self._engine.optimizer
        if self.zero.stage == 0:
            weights = list(self.trained.values())
        elif self.zero.stage == 3:
            weights = optimizer.fp32_partitioned_groups_flat
        else:
            weights = optimizer.single_partition_of_fp32_groups
        base = optimizer if self.zero.stage == 0 else optimizer.optimizer
        pull = PullToStart(weights, l1)
        base.register_step_post_hook(lambda *step: None if self.is_skipped else pull(*step))

    @property
    def module(self) -> nn.Module:
        """The wrapped module. Under ZeRO-3 its weights are whole only inside `gathered()`."""
        return self._engine.module

    @property
    def device(self) -> torch.device:
        """Where inputs must be."""
        return self._engine.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.role is not None:
            kwargs = {"role": self.role, **kwargs}
        found = self._engine(*args, **kwargs)
        if self.optim is not None and torch.is_grad_enabled():
            parts = found if isinstance(found, tuple) else (found,)
            self._outputs = [part for part in parts if torch.is_tensor(part) and part.requires_grad]
            for part in self._outputs:
                part.register_hook(self._spoil)
        return found

    def _spoil(self, gradient: Tensor) -> Tensor | None:
        """A loss that is not finite may have a gradient that is: then the gradient must not be, on any rank."""
        return torch.full_like(gradient, math.nan) if self.not_finite else None

    def num_elements(self) -> tuple[int, int]:
        """(trained weights, all weights of the module), counted whole whatever this rank holds."""
        trained, every = self.trained.values(), self.module.parameters()
        return sum(zero.full_shape(p).numel() for p in trained), sum(zero.full_shape(p).numel() for p in every)

    def bytes_to_save(self) -> int:
        """About what `save` writes, over all ranks: trained weights, float32 copies of them, moments of AdamW.

        ZeRO-3 writes the copies alone, stage 0 in float32 the weights alone.
        """
        trained, stage = self.trained.values(), self.zero.stage
        weights = 0 if stage == 3 else sum(zero.full_shape(p).numel() * p.element_size() for p in trained)
        has_copies = stage > 0 or any(p.element_size() < 4 for p in trained)
        moments = 2 if self.optim is not None and self.optim.optimizer == "adamw" else 0
        return weights + self.num_elements()[0] * 4 * (moments + has_copies)

    def enter(self) -> None:
        """Put a module of several roles into this engine's role, for work that does not go through a call."""
        if self.role is not None:
            self.module.use(self.role)  # type: ignore[operator]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients and eval mode inside; the mode is restored afterwards."""
        was_training = self.module.training
        self._engine.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self._engine.train(was_training)

    def backward(self, loss: Loss, counts: dict[str, float]) -> float:
        """Add the gradient of one micro-batch. Returns this micro-batch's share of the global loss.

        counts: denominator name -> global count over all ranks and micro-batches of the optimizer step. A loss or a
        metric that is not finite makes the gradient NaN, so that every rank leaves out the step.
        """
        if not self._is_pushing:
            self._is_pushing, self.not_finite = True, {}
            self._note({f"{finite.WEIGHT}{name}": value for name, value in self.bad_weights(self.trained).items()})
        total = sum_terms(loss, counts)
        sums = [total, *(value for value, _ in loss.metrics.values())]
        numbers = torch.stack([each.detach().to(total.device, torch.float64) for each in sums])
        self.saw_not_finite = not numbers.isfinite().all()
        if self.saw_not_finite:
            found = {"loss": total} | {f"loss term {name}": value for name, (value, _, _) in loss.terms.items()}
            found |= {f"output {place} of the model": output for place, output in enumerate(self._outputs)}
            found |= {f"sum of {name}": value for name, (value, _) in loss.metrics.items()}
            self._note(finite.not_finite(found))
        self._outputs = []
        self.enter()  # checkpointed layers run once more
        # DeepSpeed averages gradients over ranks; the counts are global already, so the average is undone here.
        self._engine.backward(total * dist.world_size())
        return float(numbers[0])

    def step(self, lr: float) -> float:
        """Apply the accumulated gradient. Returns its global norm before clipping, NaN where the step is left out."""
        assert math.isfinite(lr), lr
        optimizer = self._engine.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        for watch in self._watches:
            watch.remove()
        self._watches, self.is_skipped = [], False
        self._engine.step()
        self.updates += 1
        if self.zero.stage:
            self.is_skipped = bool(optimizer.overflow)
            norm = optimizer._global_grad_norm
            self._grad_norm = math.nan if norm is None or self.is_skipped else float(norm)
        assert self.is_skipped or not self.not_finite, f"stepped with {self.not_finite}"
        if self.is_skipped and self.zero.stage == 3:
            # A parameter that the next backward does not reach would be given what is in here.
            optimizer.grad_partitions_flat_buffer.zero_()
        self._is_pushing = False
        return self._grad_norm

    def _note(self, found: dict[str, str]) -> None:
        self.not_finite |= {name: value for name, value in found.items() if name not in self.not_finite}

    def _note_gradients(self, named: Iterable[tuple[str, Tensor]]) -> None:
        if not self.not_finite:  # else they follow from it
            self._note(finite.not_finite((f"{finite.GRADIENT}{name}", gradient) for name, gradient in named))

    def bad_weights(self, parameters: dict[str, nn.Parameter] | None = None) -> dict[str, str]:
        """name -> value of the weights that are not finite, of those that this rank holds (of the module: all)."""
        chosen = dict(self.module.named_parameters()) if parameters is None else parameters
        return finite.not_finite(finite.held(chosen.items()))

    def bad_state(self) -> dict[str, str]:
        """The same of all that `save` writes: trained weights, and what the optimizer remembers."""
        state = finite.state_tensors(self._engine.optimizer, self.zero.stage)
        return self.bad_weights(self.trained) | finite.not_finite(state)

    def unreached(self) -> list[str] | None:
        """Before the first step: the trained parameters that no backward has given a gradient; later None."""
        found, self._unreached = self._unreached, None
        return None if found is None else sorted(found)

    def _reach(self, name: str) -> Callable[[Tensor], None]:
        def reached(gradient: Tensor) -> None:
            if self._unreached is not None:
                self._unreached.discard(name)

        return reached

    def _name_gradients_in_time(self) -> None:
        """Stages 1 to 3: DeepSpeed finds out in its step, by the norm over all ranks, and clears what it has found.

        Its clearing is the last moment to see which gradients they were.
        """
        optimizer = self._engine.optimizer
        clear, names = optimizer.zero_grad, {id(parameter): name for name, parameter in self.trained.items()}

        def named(set_to_none: bool = True) -> None:
            if optimizer.overflow and self._is_pushing:
                self._note_gradients((names[which], g) for which, g in finite.gradients(optimizer, self.zero.stage))
            clear(set_to_none)

        optimizer.zero_grad = named

    def _clip_before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Stage 0: see the norm, clip; without gradients the optimizer leaves all as it is."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):
            self.is_skipped, self._grad_norm = True, math.nan
            self._note_gradients((name, p.grad) for name, p in self.trained.items() if p.grad is not None)
            for parameter in parameters:
                parameter.grad = None
        elif self.optim is not None and self.optim.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.optim.max_grad_norm, norm)

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """The module with whole weights and no sharding hooks, for many forwards in a row (a rollout, an export).

        Gathering alone would not help: the hook after each layer's forward shards it again, once per token. Every
        engine of the module has hooks of its own.
        """
        self.enter()
        if self.zero.stage != 3:
            yield self.module
            return
        offloads = [engine._offload() for engine in self._all]
        parameters = list(self.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            for offload in offloads:
                for hook in offload.forward_hooks + offload.backward_hooks:
                    hook.remove()
                offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield self.module
            finally:
                for offload in offloads:
                    # The recorded order of layers is void after forwards that the hooks did not see.
                    if not offload.param_coordinator.is_invalid_trace():
                        offload.param_coordinator._invalidate_trace()
                    offload._register_deepspeed_module(offload.module)

    def _offload(self) -> Any:
        """DeepSpeed's keeper of sharded parameters; a frozen engine has it in the optimizer's place."""
        optimizer = self._engine.optimizer
        return optimizer.parameter_offload if self.optim is not None else optimizer

    def state_dict(self) -> dict[str, Tensor] | None:
        """All weights, whole and on the CPU, on rank 0; None elsewhere. Every rank must call it."""
        state: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero.stage == 3):
                if dist.is_main():
                    state[name] = parameter.detach().to("cpu", copy=True)
        return state if dist.is_main() else None

    def save(self, folder: Path) -> None:
        """Write the trained weights and their optimizer state; every rank must call it.

        The caller makes the folder durable. A rank whose files are refused by the disk says so when all have written.
        """
        with self._others_frozen():
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
        self._files.raise_failure()

    @contextmanager
    def _others_frozen(self) -> Iterator[None]:
        """Inside, what other engines of the module train looks frozen: DeepSpeed writes whatever does not."""
        own = {id(parameter) for parameter in self.trained.values()}
        others = [p for p in self.module.parameters() if p.requires_grad and id(p) not in own]
        try:
            for parameter in others:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with the same number of ranks and the same stage; every rank must call it."""
        files = sorted((folder / _TAG).glob("*.pt"))
        if not files:
            raise CheckpointError("expected a checkpoint, found none", where=str(folder))
        for file in files:
            refuse_code(file)
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        if loaded is None:
            raise CheckpointError("expected a checkpoint, found none that DeepSpeed can read", where=str(folder))


def sum_terms(loss: Loss, counts: dict[str, float]) -> Tensor:
    """The scalar that a loss stands for: sum_i weight_i * sum_i / count[denominator_i]."""
    return torch.stack([weight * total / counts[name] for total, name, weight in loss.terms.values()]).sum()


def _optimizer(trained: Iterable[nn.Parameter], optim: OptimBlock) -> torch.optim.Optimizer:
    trained = list(trained)
    # Norm gains and biases are not decayed: shrinking them regularises nothing.
    groups = [
        {"params": [p for p in trained if len(zero.full_shape(p)) >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in trained if len(zero.full_shape(p)) < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if optim.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
