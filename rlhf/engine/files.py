"""DeepSpeed's own files: written so that ranks fail together, read without running anything in them.

It is the only place that unpickles.

DeepSpeed keeps optimizer state as pickles and reads them with torch's full unpickler, which calls whatever they name.
Here torch's weights-only unpickler reads the very file that is used, and builds nothing but tensors, plain values and
the three inert classes below. Every rank looks through all files first, so that all refuse together.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from rlhf.errors import CheckpointError, UnsafeError

INERT = [LossScaler, ZeroStageEnum, fragment_address]
_FIX = "Delete this checkpoint; an older one is used then."


class CheckpointFiles(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's way to its files: written as zip archives, read as weights only.

    The first failure of a save is kept for its end: between the files ranks meet, also those that have none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.zipfile_serialization = True
        self._failure: Exception | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        self._keep_failure(lambda: super(CheckpointFiles, self).makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write a file; after a failure nothing more."""
        if self._failure is None:
            self._keep_failure(lambda: super(CheckpointFiles, self).save(state_dict, path))

    def raise_failure(self) -> None:
        """Raise what went wrong on this rank since the last call."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _keep_failure(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where the disk refuses
            self._failure = self._failure or error

    def load(self, path: str, map_location: Any = None) -> Any:
        """What a file holds; UnsafeError where it asks for more than tensors and plain values."""
        try:
            with torch.serialization.safe_globals(INERT):
                return torch.load(path, map_location=map_location, weights_only=True)
        except torch.OutOfMemoryError:
            raise
        except pickle.UnpicklingError as error:
            raise _code(path, _reason(error)) from None
        except Exception as error:  # noqa: BLE001  a hostile file may raise anything
            raise _damaged(path, error) from error


def refuse_code(path: Path) -> None:
    """Look through a file without building anything: one that names code, or is no file of torch.save, is refused."""
    try:
        with torch.serialization.safe_globals(INERT):
            strange = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except pickle.UnpicklingError as error:
        raise _code(str(path), _reason(error)) from None
    except Exception as error:  # noqa: BLE001  the same
        raise _damaged(str(path), error) from error
    if strange:
        raise _code(str(path), ", ".join(sorted(strange)))


def _code(path: str, what: str) -> UnsafeError:
    return UnsafeError(f"expected weights or optimizer state, found code ({what})", where=path, fix=_FIX)


def _damaged(path: str, error: Exception) -> CheckpointError:
    what = f"expected a file as torch.save writes it, found another ({_reason(error)})"
    return CheckpointError(what, where=path, fix=_FIX)


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    named = [line.strip() for line in lines if "global" in line.lower() or "unsupported" in line.lower()]
    return ([*named, *lines] or [type(error).__name__])[0][:200]
