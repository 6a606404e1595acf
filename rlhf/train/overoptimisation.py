"""Train score against test score: how far a policy gains on the reward it learns from and on one it never sees.

Optimising a proxy raises what it stands for first and lowers it later, while the proxy itself goes on rising.
[Gao 2023, arXiv:2210.10760; Bai 2022, arXiv:2204.05862 sec. 4.2: score against the square root of the KL]
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of the scores of one rollout, over all ranks."""

    mean: float
    std: float


def shift(mean: float, start: Scale) -> float:
    """(mean - mean at the start) / standard deviation at the start: makes scores of two rewards comparable."""
    return (mean - start.mean) / start.std


class Gap:
    """Shifts of the train and the test score since the first rollout in which both of them vary."""

    def __init__(self) -> None:
        self._starts: tuple[Scale, Scale] | None = None

    def look(self, train: Scale, test: Scale) -> dict[str, float]:
        """The metrics of a rollout; none before both scores vary, since there is no scale to tell them in.

        `test/gap` = `test/train_shift` - `test/shift`: what the train score has gained more than the test score.
        """
        if self._starts is None and train.std > 0 and test.std > 0:
            self._starts = (train, test)
        if self._starts is None:
            return {}
        train_shift, test_shift = shift(train.mean, self._starts[0]), shift(test.mean, self._starts[1])
        return {"test/train_shift": train_shift, "test/shift": test_shift, "test/gap": train_shift - test_shift}

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        if self._starts is None:
            return {}
        train, test = self._starts
        return {"train_mean": train.mean, "train_std": train.std, "test_mean": test.mean, "test_std": test.std}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a `state`."""
        self._starts = None
        if state:
            train = Scale(state["train_mean"], state["train_std"])
            self._starts = (train, Scale(state["test_mean"], state["test_std"]))
