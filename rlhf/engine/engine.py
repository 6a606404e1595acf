"""One model under DeepSpeed: call it, push a loss back through it, step it, look at it whole, save and load it.

The engine knows nothing of losses or language models. A loss arrives as sums (`rlhf.batch.Loss`) together with the
global count of each denominator, taken over all ranks and micro-batches before the first backward; so the update does
not depend on how the rows were spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from rlhf.batch import Loss
from rlhf.engine import dist, zero
from rlhf.engine.files import WeightsOnly, refuse_code
from rlhf.engine.proximal import PullToStart
from rlhf.errors import CheckpointError, NumericsError
from rlhf.recipe.schema import OptimBlock, ZeroBlock

_TAG = "deepspeed"


class Engine:
    """A module that DeepSpeed shards. With `optim` it is trained, without it is frozen and in eval mode.

    Several engines may train parts of one module: each says which `role` the module plays when it is called through
    the engine, and which parameters are `trained` for it. They must be all that the role's loss reaches: ZeRO-3 gives
    a trained parameter without a gradient the one of the step before. beside: an engine that has the module already.
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
        self._grad_norm = math.nan
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
            optimizer.register_step_pre_hook(self._refuse_before_step if zero_block.stage else self._clip_before_step)
            config = zero.trained_config(zero_block, optim, bf16=bf16)
            self._engine = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )[0]
            self._engine.checkpoint_engine = WeightsOnly()
            self._engine.train()

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
        base.register_step_post_hook(PullToStart(weights, l1))

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
        return self._engine(*args, **kwargs)

    def num_elements(self) -> tuple[int, int]:
        """(trained weights, all weights of the module), counted whole whatever this rank holds."""
        trained, every = self.trained.values(), self.module.parameters()
        return sum(zero.full_shape(p).numel() for p in trained), sum(zero.full_shape(p).numel() for p in every)

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

        counts: denominator name -> global count over all ranks and micro-batches of the optimizer step.
        """
        total = sum_terms(loss, counts)
        if not torch.isfinite(total):
            raise NumericsError(
                f"the loss is {total.item()} on rank {dist.rank()}",
                fix="The weights were not changed. Lower train.lr, or look at the last rows of metrics.jsonl.",
            )
        self.enter()  # checkpointed layers run once more
        # DeepSpeed averages gradients over ranks; the counts are global already, so the average is undone here.
        self._engine.backward(total * dist.world_size())
        return float(total.detach())

    def step(self, lr: float) -> float:
        """Apply the accumulated gradient. Returns its global norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if self.zero.stage:
            self._refuse_before_step()  # again: in fp32 DeepSpeed itself has skipped the step, without a word
        return self._grad_norm

    def _refuse_before_step(self, *_: Any) -> None:
        """Stages 1 to 3: DeepSpeed has taken the norm over all ranks, so all of them stop where it is not finite."""
        norm = self._engine.optimizer._global_grad_norm
        self._grad_norm = math.nan if norm is None or norm < 0 else float(norm)  # -1 stands for not finite
        if not math.isfinite(self._grad_norm):
            raise _bad_gradient(self._grad_norm)

    def _clip_before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Stage 0: see the norm, refuse a non-finite one before any weight changes, clip."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        self._grad_norm = float(norm)
        if not math.isfinite(self._grad_norm):
            raise _bad_gradient(self._grad_norm)
        if self.optim is not None and self.optim.max_grad_norm > 0:
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

        The caller makes the folder durable.
        """
        with self._others_frozen():
            self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

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


def _bad_gradient(norm: float) -> NumericsError:
    return NumericsError(
        f"the gradient norm is {norm}",
        fix="The weights were not changed. Lower train.lr, or look at the last rows of metrics.jsonl.",
    )


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
