"""A running average of the weights that an engine trains, on the CPU in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.engine import dist, finite
from rlhf.engine.engine import Engine
from rlhf.engine.zero import is_sharded
from rlhf.errors import CheckpointError


class Ema:
    """ema_0 = w_0, ema_t = decay * ema_{t-1} + (1 - decay) * w_t after each optimizer step; no bias correction.

    w are the weights as the model uses them: in bf16, rounded. Under ZeRO-3 every rank averages its own shards, else
    all ranks have the same weights and rank 0 averages them. Nothing is communicated.
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        assert 0 <= decay < 1, f"decay: expected 0 <= decay < 1, found {decay}"
        self.decay = decay
        self.engine = engine
        self._is_mine = engine.zero.stage == 3 or dist.is_main()
        self.average = {name: _held(p).float().cpu().clone() for name, p in self._parameters()}

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.engine.trained.items()) if self._is_mine else []

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights; call it after every optimizer step, on every rank."""
        for name, parameter in self._parameters():
            self.average[name].lerp_(_held(parameter).float().cpu(), 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the engine's `state_dict` is of the averaged weights; afterwards the weights are as before, exactly.

        Every rank must enter it. Not for training or sampling: outside ZeRO-3 only rank 0's weights change.
        """
        live = {name: _held(parameter).clone() for name, parameter in self._parameters()}
        self._put(self.average)
        try:
            yield
        finally:
            self._put(live)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters():
            # A small parameter that ZeRO-3 keeps whole has both: the shard is changed, then it is gathered again.
            is_whole = is_sharded(parameter) and parameter.ds_status.name == "AVAILABLE"
            if is_whole:
                parameter.partition(has_been_updated=False)
            _held(parameter).copy_(values[name])
            if is_whole:
                parameter.all_gather()

    def bad_state(self) -> dict[str, str]:
        """name -> value of this rank's averages that are not finite."""
        return finite.not_finite({f"average of {name}": value for name, value in self.average.items()})

    def bytes_to_save(self) -> int:
        """What `save` writes, over all ranks."""
        return self.engine.num_elements()[0] * 4

    def save(self, folder: Path) -> None:
        """Write this rank's part; every rank must call it. The caller makes the folder durable."""
        if self._is_mine:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.average, self._file(folder))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote with the same number of ranks and the same stage."""
        if not self._is_mine:
            return
        file = self._file(folder)
        if not file.is_file():
            raise CheckpointError("expected an average of the weights, found none", where=str(file))
        try:
            found = load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"expected safetensors, found damage: {error}", where=str(file)) from error
        shapes, wanted = ({name: value.shape for name, value in part.items()} for part in (found, self.average))
        if shapes != wanted:
            wrong = sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name))
            raise CheckpointError(
                f"expected the trained weights, found other names or shapes ({wrong[0]}; {len(wrong)} in all)",
                where=str(file),
                fix="Resume with the same number of devices and the same zero.stage, or begin again with --restart.",
            )
        self.average = found

    def _file(self, folder: Path) -> Path:
        return folder / f"ema-rank{dist.rank()}.safetensors"


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its shard, or all of it."""
    held: Tensor = parameter.ds_tensor if is_sharded(parameter) else parameter
    return held.detach()
