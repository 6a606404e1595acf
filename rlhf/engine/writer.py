"""How DeepSpeed writes the files of a checkpoint."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine


class CheckpointWriter(TorchCheckpointEngine):  # type: ignore[misc]
    """Keeps the first failure of a save for its end: between the files ranks meet, also those that have none."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._failure: Exception | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        self._keep_failure(lambda: super(CheckpointWriter, self).makedirs(path, exist_ok=exist_ok))

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write a file; after a failure nothing more."""
        if self._failure is None:
            self._keep_failure(lambda: super(CheckpointWriter, self).save(state_dict, path))

    def raise_failure(self) -> None:
        """Raise what went wrong on this rank since the last call."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _keep_failure(self, write: Any) -> None:
        try:
            write()
        except (OSError, RuntimeError) as error:  # torch says RuntimeError where the disk refuses
            self._failure = self._failure or error
