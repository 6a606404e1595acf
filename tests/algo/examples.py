"""Random inputs for any preference loss, by what its entry says of itself, and its loss over a batch of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlhf.algo.losses import PREFERENCE_LOSSES
from rlhf.algo.registry import Entry
from rlhf.batch import AnswerLogprobs, ListLogprobs, PairLogprobs, TokenLogprobs
from rlhf.recipe.fields import shape_of
from rlhf.recipe.loss_options import LossBlock
from rlhf.recipe.options import PreferenceLoss

BLOCKS: dict[str, type[LossBlock]] = {
    block.model_fields["name"].default: block for block in shape_of(PreferenceLoss).blocks
}
CHANGED: dict[str, list[dict[str, Any]]] = {
    "f_dpo": [{"divergence": name} for name in ("reverse_kl", "forward_kl", "js")]
    + [{"divergence": "alpha", "alpha": 0.3}],
    "aot": [{"label_smoothing": 0.1}],
    "aot_unpaired": [{"label_smoothing": 0.1}],
    "kto": [{"lambda_d": 1.33, "lambda_u": 0.7}],
}
ROWS, ANSWERS = 8, 4
Record = PairLogprobs | AnswerLogprobs | ListLogprobs


@dataclass(frozen=True)
class Choice:
    """A loss with options that a recipe can give it."""

    entry: Entry
    options: dict[str, Any]

    def __str__(self) -> str:
        values = CHANGED.get(self.entry.name, [{}])
        return self.entry.name if len(values) == 1 else f"{self.entry.name} {self.options['divergence']}"

    def at_reference(self) -> float | None:
        found = self.entry.traits.at_reference
        return None if found is None else found(**self.options)


def choices() -> list[Choice]:
    """Every loss with its default options, or those under which its traits show."""
    return [
        Choice(entry, options_of(BLOCKS[entry.name](**changed)))
        for entry in PREFERENCE_LOSSES
        for changed in CHANGED.get(entry.name, [{}])
    ]


def options_of(block: LossBlock) -> dict[str, Any]:
    return block.model_dump(exclude={"name", "weight", *block.not_arguments})


@dataclass(frozen=True)
class Example:
    """A batch: the record of log-probs, and whatever else a loss may ask for."""

    view: Record
    others: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        others = {key: x.map(change) if isinstance(x, TokenLogprobs) else change(x) for key, x in self.others.items()}
        return Example(self.view.map(change), others)

    def to(self, dtype: torch.dtype) -> Example:
        return self.map(lambda x: x.to(dtype) if x.is_floating_point() else x)

    def leaf(self) -> Example:
        """The same numbers with a gradient on the policy's log-probs."""
        names = ("chosen", "rejected") if isinstance(self.view, PairLogprobs) else ("logprobs",)
        leaves = {name: getattr(self.view, name).detach().clone().requires_grad_() for name in names}
        return replace(self, view=replace(self.view, **leaves))


def example(entry: Entry, seed: int, *, size: float = 3.0, at_reference: bool = False) -> Example:
    """Log-ratios of about `size` nats; at the reference, equal lengths and as many good answers as bad ones."""
    torch.manual_seed(seed)
    kind = entry.inputs[0]
    shape = (ROWS, ANSWERS) if kind == "lists" else (ROWS,)

    def logprobs() -> Tensor:
        return -2 - 30 * torch.rand(shape, dtype=torch.float64)

    def reference(of: Tensor) -> Tensor | None:
        if not entry.traits.reference:
            return None
        return of.clone() if at_reference else of + size * torch.randn(shape, dtype=torch.float64)

    def length() -> Tensor:
        return torch.full(shape, 6) if at_reference else torch.randint(1, 13, shape)

    first, second = logprobs(), logprobs()
    view: Record
    if kind == "pairs":
        view = PairLogprobs(first, second, reference(first), reference(second), length(), length())
    elif kind == "answers":
        view = AnswerLogprobs(first, reference(first), length(), (torch.arange(ROWS) % 2 == 0)[torch.randperm(ROWS)])
    else:
        present = torch.rand(shape) < 0.7
        present[:, :2] = True
        view = ListLogprobs(first, reference(first), length(), torch.rand(shape, dtype=torch.float64), present)
    return Example(view, others(view))


def others(view: Record) -> dict[str, Any]:
    rows = len(view)
    two = torch.rand(rows, 2, dtype=torch.float64).sort(-1, descending=True).values
    tokens = TokenLogprobs(-3 * torch.rand(rows, 5, dtype=torch.float64), torch.rand(rows, 5) < 0.8)
    return {
        "scores": two,
        "win_rates": torch.stack([1 + two[:, 0], 1 - two[:, 0]], -1) / 2,
        "rewards": view.is_good.double() if isinstance(view, AnswerLogprobs) else two[:, 0],
        "rejected_tokens": tokens,
        "sequence_kl": torch.rand(rows, 2, dtype=torch.float64),
        "contrast": 5 * torch.rand(rows, dtype=torch.float64),
        "values": 0.9 * torch.rand(rows, dtype=torch.float64),
        "density": 0.1 + 0.8 * torch.rand(rows, dtype=torch.float64),
        "mismatched": torch.randn(rows, dtype=torch.float64),
        "draws": torch.rand(rows, dtype=torch.float64),
    }


def coupled(choice: Choice, given: Example) -> Example:
    """The example with what the loss's coupling, if it has one, makes of the whole of it."""
    couple = choice.entry.traits.couple
    if couple is None:
        return given
    positional = list(inspect.signature(couple).parameters)
    more = [given.others["mismatched"]] if "mismatched" in positional else []
    found, _ = couple(given.view.map(Tensor.detach), {}, *more, given.others["draws"], **keywords(choice, couple))
    return replace(given, others={**given.others, **found})


def losses(choice: Choice, given: Example) -> dict[str, Tensor]:
    """Denominator -> (B,), on an example that has its coupling's inputs."""
    inputs = [given.view if name == choice.entry.inputs[0] else given.others[name] for name in choice.entry.inputs]
    found = choice.entry.function(*inputs, **keywords(choice, choice.entry.function))
    return found if isinstance(found, dict) else {"rows": found}


def keywords(choice: Choice, function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    names = [each.name for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY]
    return {name: choice.options[name] for name in names}


def counts(given: Example) -> dict[str, Tensor]:
    """The denominators of a batch."""
    view = given.view
    found = {"rows": torch.tensor(len(view))}
    if isinstance(view, PairLogprobs):
        found |= {"chosen_tokens": view.chosen_len.sum(), "rejected_tokens": view.rejected_len.sum()}
    if isinstance(view, AnswerLogprobs):
        found |= {"good": view.is_good.sum(), "bad": (~view.is_good).sum()}
        found |= {"good_tokens": view.length[view.is_good].sum(), "bad_tokens": view.length[~view.is_good].sum()}
    if "selected" in given.others:
        found["selected"] = given.others["selected"].sum()
    return found


def mean_loss(choice: Choice, given: Example) -> Tensor:
    """The loss of a batch, its coupling included: what a trainer minimises."""
    given = coupled(choice, given)
    number = counts(given)
    terms = [values.sum() / number[name] for name, values in losses(choice, given).items()]
    return torch.stack(terms).sum()


def gradients(choice: Choice, given: Example) -> tuple[Tensor, Tensor]:
    """Of the mean loss: on better and on worse answers (the best and the worst of each list)."""
    view = given.view
    if isinstance(view, PairLogprobs):
        chosen, rejected = torch.autograd.grad(
            mean_loss(choice, given), [view.chosen, view.rejected], allow_unused=True, materialize_grads=True
        )
        return chosen, rejected
    (grad,) = torch.autograd.grad(mean_loss(choice, given), [view.logprobs])
    if isinstance(view, AnswerLogprobs):
        return grad[view.is_good], grad[~view.is_good]
    best = view.scores.masked_fill(~view.present, -1).argmax(-1, keepdim=True)
    worst = view.scores.masked_fill(~view.present, 2).argmin(-1, keepdim=True)
    return grad.gather(-1, best), grad.gather(-1, worst)
