"""Invariants that every run checks, most of them on every fresh rollout before its first update.

They cost nothing and catch what trains wrong in silence. What a run may pass through is an alarm (`alarms.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from rlhf.batch import Rows
from rlhf.errors import NotFiniteError, NumericsError

# Largest mean difference, in nats per token, between two passes of the same weights over the same tokens.
_SAME_WEIGHTS = {"fp32": 1e-3, "bf16": 0.1}
# The same between the sampler, which reads a token at a time from its cache, and the trainer, which reads whole rows.
_SAME_SAMPLER = {"fp32": 1e-3, "bf16": 0.05}
_MOST_NAMED = 2


def check_same_weights(found: float, dtype: str, what: str) -> None:
    """Refuse to train when two log-probs that must agree do not.

    found: mean absolute difference in nats per token. what: the sentence's subject, e.g. "fresh samples of step 3".
    """
    allowed = _SAME_WEIGHTS[dtype]
    if not math.isfinite(found) or found > allowed:
        raise NumericsError(
            f"{what}: log-probabilities differ by {found:.3g} nats per token, expected at most {allowed:g}",
            fix="The policy that samples or the reference is not the policy that is trained: check dropout, dtype and"
            " the models named in the recipe.",
        )


def check_sampler(gap: float, dtype: str, step: int) -> None:
    """Refuse a rollout that another distribution was sampled from than the one that is trained.

    gap: `rollout/sampler_gap`, mean |old - sample| log-probability over the rollout's tokens, nats per token.
    dtype: the narrower one of the two.
    """
    allowed = _SAME_SAMPLER[dtype]
    if not math.isfinite(gap) or gap > allowed:
        raise NumericsError(
            f"expected sampler and trainer to agree within {allowed:g} nats per token, found {gap:.3g}",
            where=f"rollout {step + 1}",
            fix="Either the sampler holds other weights than the trainer (not copied after the last update, or merged"
            " in another precision), or sampling.temperature, top_p or top_k applies on one side only.",
        )


def active_dropout(module: nn.Module) -> list[str]:
    """What drops at random in a forward pass of `module` as it stands now, by name; empty where nothing does.

    Looks at submodules in training mode: dropout layers (those of LoRA too), rates that a layer keeps as a number
    (attention), and rates in a configuration that a layer may read while it runs. A rate of 0 drops nothing.
    """
    found: list[str] = []
    configs: set[int] = set()
    for name, part in module.named_modules():
        if not part.training:
            continue
        where = name or type(part).__name__
        if isinstance(part, _DropoutNd) and part.p > 0:
            found.append(f"{where} ({part.p:g})")
        found += [f"{where}.{rate}" for rate in _rates(part)]
        config = vars(part)["config"] if "config" in vars(part) else None
        if id(config) not in configs:  # layers share one
            configs.add(id(config))
            found += [f"{where}.config.{rate}" for rate in _rates(config)]
    return found


def _rates(owner: object) -> list[str]:
    values = vars(owner) if hasattr(owner, "__dict__") else {}
    return [f"{name} ({v:g})" for name, v in values.items() if "drop" in name and isinstance(v, float) and v > 0]


def check_no_dropout(module: nn.Module, what: str) -> None:
    """Refuse to train with dropout where two passes over the same tokens must agree: everywhere but in SFT.

    what: the sentence's subject, e.g. "policy".
    """
    if found := active_dropout(module):
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        raise NumericsError(
            f"expected no dropout, found {', '.join(found[:_MOST_NAMED])}{more}",
            where=what,
            fix="Leave model.dropout and model.lora.dropout at 0; if they are, the model brings a dropout of its own.",
        )


def check_ids(ids: Tensor, vocabulary: int, step: int) -> None:
    """Refuse token ids that no row of the embedding stands for. ids: (B, T)."""
    outside = (ids < 0) | (ids >= vocabulary)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise NumericsError(
            f"expected token ids from 0 to {vocabulary - 1}, found {int(outside.sum())} outside, the first"
            f" {int(ids[row, column])} in row {row}, column {column}",
            where=f"rollout {step + 1}",
            fix="Tokenizer and model do not belong together: check model.tokenizer and the models named in the recipe.",
        )


def bad_fields(record: Rows) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """name -> (values, where they count, where they count and are not finite) of fields that are not as they must be.

    record: with a `response_mask`, (B, R), it is an `Experience` or a scored rollout: looks at every field of floats
    of shape (B, R), under the mask, and (B,), in rows with a token under the mask: an unscored answer has none, its
    score may be NaN. Padding may hold anything. Without one, at every field of floats.
    """
    mask: Tensor | None = record.response_mask if hasattr(record, "response_mask") else None
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name in (field.name for field in fields(record)):  # type: ignore[arg-type]
        values = getattr(record, name)
        if not torch.is_tensor(values) or not values.is_floating_point():
            continue
        if mask is None:
            counted = torch.ones_like(values, dtype=torch.bool)
        elif values.shape in (mask.shape, mask.shape[:1]):
            counted = mask if values.shape == mask.shape else mask.any(-1)
        else:
            continue
        bad = counted & ~values.isfinite()
        if bad.any():
            found[name] = (values, counted, bad)
    return found


def check_finite(experience: Rows, step: int, records: Sequence[int] = ()) -> None:
    """Refuse a rollout with a number that is not finite where it counts, see `bad_fields`. records: of its prompts."""
    found = bad_fields(experience)
    places = {place[0] for _, _, bad in found.values() for place in bad.nonzero().tolist()}
    for name, (values, counted, bad) in found.items():
        first = bad.nonzero()[0].tolist()
        token = f", token {first[1]}" if len(first) > 1 else ""
        raise NotFiniteError(
            f"expected finite {name}, found {int(bad.sum())} of {int(counted.sum())} that are not, the first"
            f" {float(values[tuple(first)])} in row {first[0]}{token}",
            found={name: str(float(values[bad][0])) for name, (values, _, bad) in found.items()},
            rows=[records[place] for place in sorted(places)] if records else [],
            where=f"rollout {step + 1}",
            fix="Log-probabilities and values come from the models (a learning rate too high, bf16), scores from"
            " the rewards; advantages and returns inherit it from them. The weights are as after the last step.",
        )


def check_scored(scored: int, answers: int, step: int) -> None:
    """Refuse a rollout without a single score: there is nothing to learn from, and nothing to report."""
    if not scored:
        raise NumericsError(
            f"expected scores in rollout {step + 1}, found all {answers} answers unscored",
            where="rewards",
            fix="A reward that returns None leaves an answer out: see why it does so for every one.",
        )


def check_judged(scored: int, answers: int, step: int) -> None:
    """Refuse a step in which a judge had nothing to say anything about."""
    if not scored:
        raise NumericsError(
            f"expected answers to judge in step {step + 1}, found none among {answers}: they were cut off, or all"
            " answers to a prompt are the same text",
            where="judge",
            fix="Raise sampling.max_new_tokens or sampling.temperature, or have what was cut off judged too:"
            " label.unfinished=keep.",
        )


def check_counts(counts: Mapping[str, float], step: int, index: int) -> None:
    """Refuse an optimizer step whose mean would be taken over nothing."""
    for name, count in counts.items():
        if not count:
            raise NumericsError(
                f"expected {name} to learn from in minibatch {index + 1} of step {step + 1}, found none",
                fix="All its answers are unscored, or unfinished and left out by scores.drop_unfinished: use fewer"
                " train.minibatches, a reward that scores more answers, or a larger sampling.max_new_tokens.",
            )


def check_weights(bad: Mapping[str, str], what: str, fix: str) -> None:
    """Refuse weights (or what an optimizer remembers) that are not finite. bad: name of a tensor -> a value in it.

    what: the sentence's place, e.g. "policy". fix: what to do.
    """
    if bad:
        (name, value), more = next(iter(bad.items())), len(bad) - 1
        further = f" and in {more} more tensors" if more else ""
        raise NumericsError(f"expected finite weights, found {value} in {name}{further}", where=what, fix=fix)


def check_padding(gap: float, dtype: str, what: str) -> None:
    """Refuse a model whose numbers depend on the padding beside a row. gap: by `RoleModule.padding_gap`."""
    if not gap <= _SAME_WEIGHTS[dtype]:
        raise NumericsError(
            f"expected a row's numbers to be the same with padding and without, found a difference of {gap:.3g}",
            where=what,
            fix="The model's code does not look at its attention mask or positions: it cannot be trained in batches.",
        )


def check_reached(unreached: Sequence[str], trained: int, what: str) -> None:
    """Refuse to go on where a trained parameter has got no gradient in the first update, on any rank.

    unreached: names of such parameters. An adapter's first matrix is reached, by a gradient of 0, while its second is
    still 0. what: who is trained, e.g. "policy".
    """
    if unreached:
        more = f" and {len(unreached) - _MOST_NAMED} more" if len(unreached) > _MOST_NAMED else ""
        raise NumericsError(
            f"expected a gradient for all {trained} trained tensors in the first update, found none for"
            f" {len(unreached)}: {', '.join(unreached[:_MOST_NAMED])}{more}",
            where=what,
            fix="They would never learn: what the model computes does not depend on them. Freeze them, or train an"
            " adapter on the layers that are used.",
        )


def check_start_loss(metrics: Mapping[str, float], beta: float, dtype: str) -> None:
    """The sigmoid loss of DPO is ln 2 while policy and reference are the same.     [arXiv:2305.18290 eq. 7, ratios 1]

    It may differ by what the log-probs of all tokens of both answers may.
    """
    found = metrics["loss_dpo"]
    allowed = beta * _SAME_WEIGHTS[dtype] * (metrics["length_chosen"] + metrics["length_rejected"]) / 2
    if abs(found - math.log(2)) > allowed:
        raise NumericsError(
            f"expected ln 2 = {math.log(2):.4f} up to {allowed:.2g} as the first loss, found {found:.4f}",
            where="policy and reference at the start",
            fix="The reference is not the policy that is trained: check dropout, dtype and the models named in the"
            " recipe.",
        )
