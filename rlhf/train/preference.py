"""Learning from judged answers: one objective for every loss on pairs, on single answers and on lists.

A batch of any of the three kinds is a number of answers that go through the policy together. What the losses see is the
record of their sequence log-probs (`PairLogprobs`, `AnswerLogprobs`, `ListLogprobs`) and what else they name as inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.algo.masked import row_sums
from rlhf.algo.registry import Entry
from rlhf.algo.unpaired import dro_value
from rlhf.batch import AnswerLogprobs, Answers, ListLogprobs, Lists, Loss, PairLogprobs, Pairs, TokenLogprobs, Tokens
from rlhf.engine.engine import Engine
from rlhf.models.head import Extras
from rlhf.recipe.loss_options import LossBlock
from rlhf.recipe.schema import OptimBlock
from rlhf.train.describe_preferences import describe
from rlhf.train.objectives import join, trained, trim
from rlhf.train.reference import Reference

Judged = Pairs | Answers | Lists
View = PairLogprobs | AnswerLogprobs | ListLogprobs


# --- the losses of a recipe ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One loss of the sum that a recipe asks for."""

    entry: Entry
    block: LossBlock
    function: Callable[..., Tensor | dict[str, Tensor]]  # its options are filled in
    couple: Callable[..., tuple[dict[str, Tensor], dict[str, float]]] | None

    @classmethod
    def of(cls, block: LossBlock) -> Term:
        """The registered loss that a block names, and what it needs of the whole batch."""
        entry = PREFERENCE_LOSSES[block.name]
        couple = entry.traits.couple
        return cls(entry, block, _bound(entry.function, block), None if couple is None else _bound(couple, block))

    @property
    def reward_scale(self) -> float:
        """What a log-ratio is multiplied with to be this loss's implicit reward."""
        scale = self.entry.traits.scale
        return 1.0 if scale is None else float(getattr(self.block, scale))

    @property
    def needs_mismatched(self) -> bool:
        """Whether its coupling looks at prompts with answers to others."""
        return self.couple is not None and "mismatched" in _parameters(self.couple)


def _bound(function: Callable[..., Any], block: LossBlock) -> Callable[..., Any]:
    return partial(function, **{name: getattr(block, name) for name in _options(function)})


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def _options(function: Callable[..., Any]) -> list[str]:
    return [name for name, p in _parameters(function).items() if p.kind is inspect.Parameter.KEYWORD_ONLY]


# --- from a batch to what losses see ---------------------------------------------------------------------------------


def flat(batch: Judged) -> Tokens:
    """All answers of a batch as rows (M, T): chosen above rejected, or lists one after the other without absences."""
    if isinstance(batch, Pairs):
        return trim(join(batch))
    if isinstance(batch, Answers):
        return trim(batch.tokens)
    return trim(batch.answers())


def folded(batch: Judged, values: Tensor) -> Tensor:
    """Numbers of `flat` answers (M,), by row: (B, 2) of pairs, (B,) of answers, (B, K) of lists (absent ones 0)."""
    if isinstance(batch, Pairs):
        return torch.stack(values.chunk(2), dim=-1)
    if isinstance(batch, Answers):
        return values
    present = batch.present.to(values.device)
    return values.new_zeros(present.shape).masked_scatter(present, values)


def view_of(batch: Judged, logprobs: Tensor, counted: Tensor) -> View:
    """The record that losses read. logprobs, counted: summed log-probs and tokens of the answers, `folded`."""
    ref = None if batch.ref is None else batch.ref.to(logprobs)
    if isinstance(batch, Pairs):
        refs = (None, None) if ref is None else (ref[:, 0], ref[:, 1])
        return PairLogprobs(logprobs[:, 0], logprobs[:, 1], *refs, counted[:, 0], counted[:, 1])
    if isinstance(batch, Answers):
        return AnswerLogprobs(logprobs, ref, counted, batch.is_good.to(logprobs.device))
    return ListLogprobs(logprobs, ref, counted, batch.scores.to(logprobs), batch.present.to(logprobs.device))


KINDS: dict[type, str] = {Pairs: "pairs", Answers: "answers", Lists: "lists"}
_FROM_DATA = ("scores", "win_rates", "rewards", "density")


def inputs_of(batch: Judged, measured: Measured) -> dict[str, Any]:
    """Everything that losses may name as an input, by name."""
    logprobs = measured.logprobs
    found: dict[str, Any] = {KINDS[type(batch)]: measured.view(batch)}
    for name in _FROM_DATA:
        if name in type(batch).__dataclass_fields__ and (value := getattr(batch, name)) is not None:
            found[name] = value.to(logprobs.device)
    for name, value in (batch.extras or {}).items():
        found[name] = value.to(logprobs.device)
    if isinstance(batch, Pairs):
        sides = [TokenLogprobs(*both) for both in zip(logprobs.chunk(2), measured.mask.chunk(2), strict=True)]
        found["chosen_tokens"], found["rejected_tokens"] = sides
    if measured.kl is not None:
        found["sequence_kl"] = folded(batch, measured.kl)
    if measured.contrast is not None:
        contrast = folded(batch, measured.contrast)
        found["contrast"] = contrast[:, 1] if isinstance(batch, Pairs) else contrast
    return found


@dataclass(frozen=True)
class Measured:
    """What the policy says of flat answers: tokens (M, R), and per answer (M,) what was asked for besides."""

    logprobs: Tensor  # (M, R)
    mask: Tensor  # (M, R)
    kl: Tensor | None = None  # (M,) of the reference to the policy, over the whole vocabulary
    contrast: Tensor | None = None  # (M,)

    def view(self, batch: Judged) -> View:
        """The record of their sequence log-probs, summed in float64.

        A sum is hundreds of nats and losses ask for differences of a few: in float32 its rounding would be the largest
        error of the gradient, and another one for every way to divide the batch.
        """
        lengths = self.mask.sum(-1).to(self.logprobs.dtype)
        return view_of(batch, folded(batch, row_sums(self.logprobs.double(), self.mask)), folded(batch, lengths))


@dataclass(frozen=True)
class Policy:
    """The trained policy, asked for what the losses need.

    whole: the reference, where losses compare whole distributions; contrast: tokens that CRINGE sets one against.
    """

    engine: Engine
    whole: Reference | None = None
    contrast: int = 0

    def __call__(self, answers: Tokens) -> Measured:
        """Log-probs of the answers' tokens, and the rest."""
        answers = answers.to(self.engine.device)
        mask = trained(answers.mask)
        extras = Extras(contrast=self.contrast)
        if self.whole is not None:
            with torch.no_grad():
                reference = self.whole(answers.ids, answers.attention, mask, extras=Extras(whole=True))
            extras = replace(extras, ref_distribution=reference)
        found = self.engine(answers.ids, answers.attention, mask, extras=extras)
        logprobs, *more = found if isinstance(found, tuple) else (found,)
        sums = [row_sums(values, mask) for values in more]
        kl = sums.pop(0) if self.whole is not None else None
        return Measured(logprobs, mask, kl, sums.pop(0) if self.contrast else None)


# --- objectives -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceObjective:
    """A weighted sum of preference losses, each averaged over what it counts."""

    group: ClassVar[str] = "train"
    optional: ClassVar[frozenset[str]] = frozenset({"good", "bad", "good_tokens", "bad_tokens", "selected"})
    policy: Policy
    optim: OptimBlock
    terms: tuple[Term, ...]

    @classmethod
    def of(cls, policy: Policy, optim: OptimBlock, *blocks: LossBlock) -> PreferenceObjective:
        """The sum of the losses that these blocks name."""
        return cls(policy, optim, tuple(Term.of(block) for block in blocks))

    @property
    def engine(self) -> Engine:
        """The trained policy's."""
        return self.policy.engine

    def counts(self, batch: Judged) -> dict[str, Tensor]:
        return counts_of(batch)

    def loss(self, micro: Judged) -> Loss:
        compares = any(term.entry.traits.reference for term in self.terms)
        assert micro.ref is not None or not compares, "reference log-probs are missing"
        measured = self.policy(flat(micro))
        given = inputs_of(micro, measured)
        terms: dict[str, tuple[Tensor, str, float]] = {}
        for term in self.terms:
            if micro.extras is None and not set(term.entry.inputs) <= set(given):
                continue  # held-out rows: there is no batch that it could look at
            values = term.function(*(given[name] for name in term.entry.inputs))
            for denominator, losses in (values if isinstance(values, dict) else {"rows": values}).items():
                weighted = micro.weighted(losses) if isinstance(micro, Pairs) else losses
                terms[part_name(term, denominator)] = (weighted.sum(), denominator, term.block.weight)
        found = describe(given[KINDS[type(micro)]], self.terms[0].entry.traits, self.terms[0].reward_scale)
        return Loss(terms, found | {name: (total, unit) for name, (total, unit, _) in terms.items()})

    def total(self, means: dict[str, float]) -> dict[str, float]:
        """The loss as one number, where the means of all its parts are known; their names begin as in `means`."""
        found = [
            (prefix, term.block.weight * value)
            for name, value in means.items()
            for prefix, _, part in [name.rpartition("/")]
            for term in self.terms
            if part == f"loss_{term.entry.name}" or part.startswith(f"loss_{term.entry.name}_per_")
        ]
        return {f"{found[0][0]}/loss": sum(value for _, value in found)} if found else {}


def part_name(term: Term, denominator: str) -> str:
    """The metric of one part of the sum, e.g. loss_dpo or loss_cpo_per_chosen_tokens."""
    return f"loss_{term.entry.name}" + ("" if denominator == "rows" else f"_per_{denominator}")


def counts_of(batch: Judged) -> dict[str, Tensor]:
    """Every denominator that a loss or a metric may name, of this rank's rows."""
    counts = {"rows": torch.tensor(len(batch))}
    if isinstance(batch, Pairs):
        counts |= {f"{side}_tokens": getattr(batch, side).mask.sum() for side in ("chosen", "rejected")}
        if batch.extras is not None and "selected" in batch.extras:
            counts["selected"] = batch.extras["selected"].sum()
    if isinstance(batch, Answers):
        good, tokens = batch.is_good, batch.tokens.mask.sum(-1)
        counts |= {"good": good.sum(), "bad": (~good).sum()}
        counts |= {"good_tokens": tokens[good].sum(), "bad_tokens": tokens[~good].sum()}
    return counts


@dataclass(frozen=True)
class ValueOfPromptObjective:
    """DRO's second network: the value of a prompt, fitted beside the policy.         [arXiv:2405.19107 Algorithm 1]"""

    group: ClassVar[str] = "value"
    optional: ClassVar[frozenset[str]] = frozenset()
    engine: Engine
    optim: OptimBlock
    tau: float

    def counts(self, batch: Answers) -> dict[str, Tensor]:
        return {"rows": torch.tensor(len(batch))}

    def loss(self, micro: Answers) -> Loss:
        assert micro.extras is not None, "log-ratios are missing"
        values = prompt_values(self.engine, micro)
        losses = dro_value(values, micro.rewards.to(values), micro.extras["log_ratios"].to(values), tau=self.tau)
        total = losses.sum()
        return Loss({"value": (total, "rows", 1.0)}, {"loss": (total, "rows"), "mean": (values.sum(), "rows")})


def prompt_values(engine: Engine, batch: Answers) -> Tensor:
    """The value of every row's prompt, (B,): of the state before the answer's first token."""
    tokens = trim(batch.tokens).to(engine.device)
    mask = tokens.mask[:, 1:]
    first = mask & (mask.cumsum(-1) == 1)  # of every answer's tokens
    values: Tensor = engine(tokens.ids, tokens.attention, first)  # (B, T - 1)
    return values.sum(-1)
