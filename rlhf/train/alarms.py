"""Running alarms: what one looks at a run's numbers for, looked at after every rollout.

An alarm goes off where a metric is beyond its bound (in some cases for several rollouts in a row). It is said once,
and again only after the metric was within bounds; while it lasts, the row of metrics holds `alarm/<name>` = 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rlhf.errors import NumericsError
from rlhf.recipe.guard_options import Guard, GuardsBlock

_ROUNDING = 1e-6  # a deviation of equal scores is not exactly 0 in float32


@dataclass(frozen=True)
class Alarm:
    """An alarm that has just gone off. `stops`: the recipe ends the run for it."""

    name: str
    text: str
    stops: bool


@dataclass(frozen=True)
class Watch:
    """How an alarm judges: `seen(value, value of the first rollout, its options)` -> what is wrong, or None."""

    seen: Callable[[float, float, Any], str | None]
    causes: tuple[str, str, str]


class Alarms:
    """Everything that the recipe's `guards` watch. The metrics must be the same on every rank."""

    def __init__(self, guards: GuardsBlock) -> None:
        self._guards: dict[str, Guard] = {name: getattr(guards, name) for name in type(guards).model_fields}
        self._first: dict[str, float] = {}  # metric -> its value in the first rollout that had it
        self._counts = dict.fromkeys(self._guards, 0)  # rollouts in a row beyond the bound

    def look(self, metrics: dict[str, float]) -> list[Alarm]:
        """The alarms that go off with this rollout. Where a metric is missing, its alarms stay as they are."""
        raised = []
        for name, guard in self._guards.items():
            if guard.metric not in metrics:
                continue
            value = metrics[guard.metric]
            seen = WATCHES[name].seen(value, self._first.setdefault(guard.metric, value), guard)
            self._counts[name] = self._counts[name] + 1 if seen is not None else 0
            if seen is not None and self._counts[name] == needed(guard):
                raised.append(Alarm(name, describe(name, guard, seen), guard.on_alarm == "stop"))
        return raised

    def marks(self) -> dict[str, float]:
        """`alarm/<name>` = 1 for every alarm that is on: for the row of metrics of the rollout just looked at."""
        return {f"alarm/{name}": 1.0 for name, guard in self._guards.items() if self._counts[name] >= needed(guard)}

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold, so that a resumed run neither repeats an alarm nor forgets one."""
        counts = {f"count/{name}": float(count) for name, count in self._counts.items()}
        return counts | {f"first/{metric}": value for metric, value in self._first.items()}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a `state`."""
        self._counts = {name: int(state[f"count/{name}"]) for name in self._guards}
        self._first = {key.removeprefix("first/"): value for key, value in state.items() if key.startswith("first/")}


def needed(guard: Guard) -> int:
    """Rollouts in a row that an alarm takes."""
    return guard.rollouts if "rollouts" in type(guard).model_fields else 1  # type: ignore[attr-defined]


def describe(name: str, guard: Guard, seen: str) -> str:
    """An alarm in words: what was seen against what bound, what usually is behind it, and where to look."""
    option = "rollouts" if "rollouts" in type(guard).model_fields else "threshold"
    first, second, third = WATCHES[name].causes
    return (
        f"alarm {name}: {seen} (guards.{name}.{option}: {getattr(guard, option):g})."
        f" Likely causes: (1) {first}; (2) {second}; (3) {third}. Look at {guard.metric}."
    )


def stop_error(alarms: Sequence[Alarm], step: int) -> NumericsError:
    """What to raise, once a checkpoint is written, where an alarm `stops`. step: finished steps."""
    stopping = [alarm for alarm in alarms if alarm.stops]
    names = ", ".join(f"guards.{alarm.name}.on_alarm" for alarm in stopping)
    return NumericsError(
        "\n".join(alarm.text for alarm in stopping),
        where=f"stopped after step {step} as {names} says",
        fix="The state is in a checkpoint: read the samples and the curves first. The same command goes on from there,"
        " and stops again only if the alarm goes off and comes back.",
    )


def repeated_share(ids: Tensor, mask: Tensor) -> float:
    """Share of answers that another answer of the rollout repeats token by token; 0 where there is no answer.

    ids, mask: (B, R), the answers' tokens and where they count; every row is a draw of its own. Rows without a token
    are left out, of the count as of the total.
    """
    rows = zip(ids.tolist(), mask.tolist(), strict=True)
    answers = [tuple(token for token, counts in zip(*row, strict=True) if counts) for row in rows]
    times = Counter(answer for answer in answers if answer)
    total = sum(times.values())
    return sum(count for count in times.values() if count > 1) / total if total else 0.0


# --- what each alarm sees --------------------------------------------------------------------------------------------


def _kl_spike(value: float, first: float, guard: Any) -> str | None:
    seen = f"the policy is {value:.3g} nats per answer away from the reference"
    return seen if value > guard.threshold else None


def _entropy_collapse(value: float, first: float, guard: Any) -> str | None:
    seen = f"the policy's entropy is {value:.3g} nats per token, {_share(value, first)} of the first rollout's"
    return seen if value < guard.threshold * first else None


def _eos_rate(value: float, first: float, guard: Any) -> str | None:
    seen = f"{value:.0%} of the answers end by themselves, {first:.0%} did in the first rollout"
    return seen if value < guard.threshold * first else None


def _length_drift(value: float, first: float, guard: Any) -> str | None:
    seen = f"answers have {value:.3g} tokens, {first:.3g} in the first rollout"
    return seen if value > guard.threshold * first or value < first / guard.threshold else None


def _flat_reward(value: float, first: float, guard: Any) -> str | None:
    return f"all answers have had the same score for {guard.rollouts} rollouts" if value <= _ROUNDING else None


def _all_clipped(value: float, first: float, guard: Any) -> str | None:
    return f"no answer has ended by itself for {guard.rollouts} rollouts" if value == 0 else None


def _explained_variance(value: float, first: float, guard: Any) -> str | None:
    seen = f"the critic has predicted worse than a constant for {guard.rollouts} rollouts, {value:.2f} now"
    return seen if value < 0 else None


def _repeated_answers(value: float, first: float, guard: Any) -> str | None:
    return f"{value:.0%} of the answers are another answer's word for word" if value > guard.threshold else None


def _share(value: float, first: float) -> str:
    return f"{value / first:.0%}" if first else "none"


WATCHES: dict[str, Watch] = {
    "kl_spike": Watch(
        _kl_spike,
        ("kl.coef is too small", "train.lr is too high", "the reward pays for something the reference never says"),
    ),
    "entropy_collapse": Watch(
        _entropy_collapse,
        ("train.lr is too high", "kl.coef is too small", "one kind of answer wins whatever the prompt is"),
    ),
    "eos_rate": Watch(
        _eos_rate,
        (
            "the reward pays for length",
            "scores.missing_eos_penalty is too small",
            "the end token of the chat template is not the one that the model learned",
        ),
    ),
    "length_drift": Watch(
        _length_drift,
        (
            "length is what the reward pays for",
            "the aggregation weighs long answers differently from short ones",
            "answers end too early because the missing end is what costs most",
        ),
    ),
    "flat_reward": Watch(
        _flat_reward,
        (
            "the prompts are too hard or too easy for the reward to tell answers apart",
            "the rule or marker of the reward never matches",
            "the policy gives one answer only",
        ),
    ),
    "all_clipped": Watch(
        _all_clipped,
        (
            "sampling.max_new_tokens is too small",
            "the model never learned its end token",
            "sampling.stop lacks the token that ends a turn",
        ),
    ),
    "explained_variance": Watch(
        _explained_variance,
        (
            "critic.lr is too low, or so high that the critic swings",
            "the critic starts from a new head: give it critic.warmup_rollouts",
            "returns are mostly noise that no prompt explains",
        ),
    ),
    "repeated_answers": Watch(
        _repeated_answers,
        (
            "the policy has collapsed onto one answer",
            "sampling.temperature is too low",
            "prompts repeat, or have only one short answer (raise the threshold then)",
        ),
    ),
}
