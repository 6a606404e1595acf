"""What a practised eye would see in a stage's curves, said in words: first where to look, then what usually helps."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rlhf.recipe.guard_options import GuardsBlock
from rlhf.report.charts import ALARM, moving_average
from rlhf.report.collect import Series, StagePage, pick

_ENOUGH = 5  # points; a shorter curve says nothing
_FALL = 0.25  # deviations of the scores at the start; below it is noise


@dataclass(frozen=True)
class Finding:
    """Something to look at. `is_bad`: it stopped the stage, or its numbers cannot be trusted."""

    text: str
    is_bad: bool = False


def findings(stage: StagePage) -> list[Finding]:
    """Everything worth a look in one stage, the worst first."""
    found = [*_state(stage), *_gaps(stage), *_data(stage), *_alarms(stage), *_over_optimised(stage)]
    for metric, rule in RULES:
        if metric in stage.series and len(stage.series[metric]) >= _ENOUGH and (text := rule(stage.series[metric])):
            found.append(Finding(text))
    found += [Finding(problem) for problem in stage.problems]
    return sorted(found, key=lambda finding: not finding.is_bad)


# --- beyond the curves ---------------------------------------------------------------------------------------------


def _state(stage: StagePage) -> Iterator[Finding]:
    summary = stage.summary
    if summary.state in ("failed", "damaged", "interrupted", "stopped", "unknown"):
        step = f" at step {summary.step} of {summary.total_steps}" if summary.total_steps else ""
        yield Finding(
            f"{summary.state}{step}: {summary.reason or 'no reason was recorded'}", summary.state != "stopped"
        )
    for parent in summary.stale:
        yield Finding(f"{parent} has changed or gone since this stage was made from it: make this stage again", True)


def _gaps(stage: StagePage) -> Iterator[Finding]:
    for metric, steps in stage.gaps.items():
        more = f" and {len(steps) - 3} more" if len(steps) > 3 else ""
        yield Finding(f"{metric} was not a finite number at step {', '.join(map(str, steps[:3]))}{more}", True)


def _data(stage: StagePage) -> Iterator[Finding]:
    for source in pick(pick(stage.provenance, "data", dict), "sources", list) or []:
        read, dropped = pick(source, "read", int), pick(source, "dropped", dict)
        if read and dropped and sum(dropped.values()) > 0.1 * read:
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            yield Finding(f"{sum(dropped.values()) / read:.0%} of {pick(source, 'path', str)} was dropped: {reasons}")


def _alarms(stage: StagePage) -> Iterator[Finding]:
    for name, field in GuardsBlock.model_fields.items():
        if ALARM + name in stage.series:
            guard = type(field.default)
            on = [step for step, _ in stage.series[ALARM + name]]
            recorded = [step for step, _ in stage.series[guard.metric]] if guard.metric in stage.series else on
            text = (guard.__doc__ or "").rstrip(".")
            yield Finding(f"{text}: alarm {name} at step {stretches(on, recorded)}, look at {guard.metric}")


def stretches(steps: Sequence[int], recorded: Sequence[int]) -> str:
    """Steps as stretches without a gap among the recorded ones: [3, 4, 5, 9] of 1 to 10 are "3 to 5, 9"."""
    place = {step: number for number, step in enumerate(sorted({*recorded, *steps}))}
    runs: list[list[int]] = []
    for step in sorted(set(steps)):
        if runs and place[step] == place[runs[-1][1]] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


def _over_optimised(stage: StagePage) -> Iterator[Finding]:
    """The test score has fallen from its peak while the train score went on rising. [arXiv:2210.10760]"""
    both = [dict(stage.series[name]) if name in stage.series else {} for name in ("test/train_shift", "test/shift")]
    steps = sorted(both[0].keys() & both[1].keys())
    if len(steps) < _ENOUGH:
        return
    width = max(3, len(steps) // 10)
    train, test = (moving_average([values[step] for step in steps], width) for values in both)
    peak = max(range(len(steps)), key=lambda i: test[i])
    if test[-1] < test[peak] - _FALL and train[-1] > train[peak]:
        yield Finding(
            f"the test score fell from {test[peak]:.2f} around step {steps[peak]} to {test[-1]:.2f} while the train"
            f" score rose from {train[peak]:.2f} to {train[-1]:.2f} (deviations at the start): the policy exploits the"
            " reward; stop earlier, raise kl.coef, or train the reward on newer answers"
        )


# --- curves --------------------------------------------------------------------------------------------------------


def ends(series: Series) -> tuple[float, float]:
    """Means of the first and of the last tenth of a curve (at least one point)."""
    values = [value for _, value in series]
    tenth = max(1, len(values) // 10)
    return statistics.fmean(values[:tenth]), statistics.fmean(values[-tenth:])


def _did_not_fall(name: str) -> Callable[[Series], str | None]:
    def rule(series: Series) -> str | None:
        before, after = ends(series)
        text = f"{name} did not fall ({before:.4g} to {after:.4g}): learning rate, too few steps, or nothing to learn"
        return text if after >= before else None

    return rule


def _rose_again(series: Series) -> str | None:
    step, lowest = min(series, key=lambda point: point[1])
    last = series[-1][1]
    if step == series[-1][0] or last <= lowest + 0.02 * abs(lowest):
        return None
    return f"eval/loss was lowest at step {step} ({lowest:.4g}) and is {last:.4g} now: overfitting, fewer epochs may do"


def _near_chance(series: Series) -> str | None:
    after = ends(series)[1]
    return (
        f"eval/accuracy is {after:.3f}, near chance: more or cleaner pairs, or a larger model" if after < 0.53 else None
    )


def _reward_flat(series: Series) -> str | None:
    before, after = ends(series)
    text = f"reward/score_mean did not rise ({before:.4g} to {after:.4g}): learning rate, KL weight, or a flat reward"
    return text if after <= before else None


def _far(series: Series) -> str | None:
    after = ends(series)[1]
    text = f"{after:.1f} nats per answer from the reference: read the samples for reward hacking, or raise kl.coef"
    return text if after > 20 else None


def _collapse(series: Series) -> str | None:
    before, after = ends(series)
    text = f"entropy fell from {before:.3g} to {after:.3g} nats per token: answers become alike, raise kl.coef"
    return text if after < 0.3 * before else None


def _cut_off(series: Series) -> str | None:
    after = ends(series)[1]
    text = f"{1 - after:.0%} of the answers are cut off: raise sampling.max_new_tokens or scores.missing_eos_penalty"
    return text if after < 0.9 else None


def _length(series: Series) -> str | None:
    before, after = ends(series)
    if before <= 0 or 1 / 1.5 < after / before < 1.5:
        return None
    return f"answers went from {before:.0f} to {after:.0f} tokens: is length what the reward pays for?"


def _clipped(series: Series) -> str | None:
    after = ends(series)[1]
    text = f"{after:.0%} of the tokens are clipped: updates are too large; lower train.lr or train.inner_epochs"
    return text if after > 0.3 else None


def _critic(series: Series) -> str | None:
    after = ends(series)[1]
    text = f"the critic explains {after:.2f} of the returns' variance, less than a constant would: raise critic.lr"
    return text if after < 0 else None


def _spike(name: str) -> Callable[[Series], str | None]:
    def rule(series: Series) -> str | None:
        step, largest = max(series, key=lambda point: point[1])
        usual = statistics.median(value for _, value in series)
        text = f"{name} jumped to {largest:.3g} at step {step} (usually {usual:.3g}): look at what happened there"
        return text if usual > 0 and largest > 20 * usual else None

    return rule


def _unscored(series: Series) -> str | None:
    total = sum(value for _, value in series)
    return f"{total:.0f} answers could not be scored and were left out" if total else None


def _flat_groups(series: Series) -> str | None:
    after = ends(series)[1]
    text = (
        f"in {after:.0%} of the groups all answers score the same: these prompts teach nothing (too easy or too hard)"
    )
    return text if after > 0.5 else None


def _sampler(series: Series) -> str | None:
    step, largest = max(series, key=lambda point: point[1])
    text = f"sampling and training disagree by {largest:.2g} nats per token at step {step}: precision or temperature"
    return text if largest > 0.05 else None


def _displaced(series: Series) -> str | None:
    after = ends(series)[1]
    text = (
        f"{after:.0%} of the chosen answers are less likely than under the reference: raise loss.beta or lower train.lr"
    )
    return text if after > 0.8 else None


RULES: tuple[tuple[str, Callable[[Series], str | None]], ...] = (
    ("train/loss", _did_not_fall("train/loss")),
    ("eval/loss", _rose_again),
    ("eval/accuracy", _near_chance),
    ("reward/score_mean", _reward_flat),
    ("rollout/kl_ref", _far),
    ("policy/entropy", _collapse),
    ("rollout/finished", _cut_off),
    ("rollout/length_mean", _length),
    ("policy/clipfrac", _clipped),
    ("value/explained_variance", _critic),
    ("train/grad_norm", _spike("train/grad_norm")),
    ("policy/grad_norm", _spike("policy/grad_norm")),
    ("value/grad_norm", _spike("value/grad_norm")),
    ("reward/unscored", _unscored),
    ("reward/flat_groups", _flat_groups),
    ("rollout/sampler_gap", _sampler),
    ("train/chosen_displaced", _displaced),
)
