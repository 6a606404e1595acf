"""The language-model head: from hidden states to numbers about tokens, without ever holding all logits at once.

(M, V) logits are by far the largest tensor of a training step. They are made in pieces of some positions; backward
makes each piece again, or finds it kept where all of them are small. Everything happens inside the head's own forward,
because sharded weights are whole only there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from rlhf.algo.logprobs import entropy as distribution_entropy
from rlhf.algo.logprobs import (
    gradient_of_logits_,
    scale_logits,
    target_and_total,
    token_contrast,
    token_forward_kl,
    token_logprobs,
    truncate_logits,
)
from rlhf.models.linear import FastLinear, is_for_onednn, product
from rlhf.recipe.schema import SamplingBlock

PIECE = 2**22  # logits that exist at a time
KEPT = 2**26  # logits that are kept for backward rather than made again, which costs a fourth matrix product


@dataclass(frozen=True)
class Extras:
    """What else there is to know of M positions than the log-prob of a token.

    entropy: of its distribution, without or with gradient.
    ref_distribution: a reference's log-probs (M, V): KL(reference || policy).
    contrast: the CRINGE loss of the token against this many others, see `token_contrast`.
    whole: instead of all this, the log-probs of every token of the vocabulary, (M, V).
    """

    entropy: Literal["none", "value", "gradient"] = "none"
    ref_distribution: Tensor | None = None
    contrast: int = 0
    whole: bool = False

    @property
    def are_plain(self) -> bool:
        """Whether the entropy's value is all that is asked for, if anything."""
        return not (self.whole or self.contrast or self.entropy == "gradient") and self.ref_distribution is None

    def part(self, cut: slice) -> Extras:
        """Those of some of the positions."""
        return self if self.ref_distribution is None else replace(self, ref_distribution=self.ref_distribution[cut])


NO_EXTRAS = Extras()


@dataclass(frozen=True)
class Question:
    """What is asked of M positions."""

    targets: Tensor  # (M,)
    sampling: SamplingBlock
    extras: Extras = NO_EXTRAS

    def part(self, cut: slice) -> Question:
        """The question about some of the positions."""
        return Question(self.targets[cut], self.sampling, self.extras.part(cut))

    def answer(self, logits: Tensor) -> tuple[Tensor, ...]:
        """From logits (M, V): (M,) log-probs and, in the order of `Extras`, what else is asked for; float32."""
        extras = self.extras
        if extras.whole:
            return (logits.float().log_softmax(-1),)
        cut = {"top_k": self.sampling.top_k, "top_p": self.sampling.top_p}
        found = [token_logprobs(logits, self.targets, temperature=self.sampling.temperature, **cut)]
        if extras.entropy != "none":
            with torch.set_grad_enabled(torch.is_grad_enabled() and extras.entropy == "gradient"):
                scaled = scale_logits(logits, temperature=self.sampling.temperature)
                found.append(distribution_entropy(truncate_logits(scaled, **cut)))
        if extras.ref_distribution is not None:
            found.append(token_forward_kl(extras.ref_distribution, logits.float().log_softmax(-1)))
        if extras.contrast:
            found.append(token_contrast(logits, self.targets, k=extras.contrast))
        return tuple(found)


class TokenHead(FastLinear):
    """A linear language-model head that also answers a `Question`. Heads become one by `adopt`."""

    def forward(self, hidden: Tensor, question: Question | None = None) -> Any:
        """Logits (..., V) of hidden states (..., H); with a question about (M, H), its answer."""
        if question is None:
            return super().forward(hidden)
        if question.extras.are_plain:
            return _plain_answer(hidden, self.weight, self.bias, question)
        return in_pieces(super().forward, hidden, question, self.out_features)


def adopt(head: nn.Module) -> None:
    """Make a plain linear layer a `TokenHead`, in place; any other module stays as it is."""
    if type(head) in (nn.Linear, FastLinear):
        head.__class__ = TokenHead


def in_pieces(
    head: Callable[[Tensor], Tensor], hidden: Tensor, question: Question, vocabulary: int
) -> tuple[Tensor, ...]:
    """The answer from a head of any kind; a piece's logits are made again in backward."""

    def piece(cut: slice) -> tuple[Tensor, ...]:
        return question.part(cut).answer(head(hidden[cut]))

    cuts = _pieces(len(hidden), vocabulary)
    if torch.is_grad_enabled() and len(cuts) > 1:
        found = [checkpoint(piece, cut, use_reentrant=False) for cut in cuts]
    else:
        found = [piece(cut) for cut in cuts]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _plain_answer(hidden: Tensor, weight: Tensor, bias: Tensor | None, question: Question) -> tuple[Tensor, ...]:
    wants_entropy = question.extras.entropy != "none"
    logprobs, entropy = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, question.targets, question.sampling, wants_entropy
    )
    return (logprobs, entropy) if wants_entropy else (logprobs,)


class _LinearLogprobs(Function):
    """`token_logprobs` (and the entropy's value) of hidden @ weight.T + bias, piece by piece.

    The gradient of logits, (onehot(target) - softmax) / temperature, is written over the logits themselves.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        sampling: SamplingBlock,
        wants_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows, vocabulary = len(hidden), len(weight)
        keep = any(ctx.needs_input_grad) and rows * vocabulary <= KEPT
        kept = _logits(hidden, weight, bias) if keep else None
        found: list[tuple[Tensor | None, ...]] = []
        for piece in _pieces(rows, vocabulary):
            logits = _logits(hidden[piece], weight, bias) if kept is None else kept[piece]
            scaled = scale_logits(logits, temperature=sampling.temperature)
            columns = targets[piece].unsqueeze(-1)
            known = target_and_total(scaled, columns, top_k=sampling.top_k, top_p=sampling.top_p)
            found.append((*known, _entropy(scaled, *known[1:]) if wants_entropy else None))
        chosen, total, smallest, entropy = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)
        )
        ctx.kept, ctx.sampling = kept, sampling
        ctx.save_for_backward(hidden, weight, bias, targets, chosen, total, smallest)
        if entropy is not None:
            ctx.mark_non_differentiable(entropy)
        return (chosen - total).squeeze(-1), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, chosen, total, smallest = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        temperature = ctx.sampling.temperature
        slopes = grad.unsqueeze(-1) / temperature
        grads = _Gradients(hidden, weight, ctx.needs_input_grad[:3])
        for piece in _pieces(len(hidden), len(weight)):
            logits = _logits(hidden[piece], weight, bias) if kept is None else kept[piece]
            by_logits = gradient_of_logits_(
                scale_logits(logits, temperature=temperature),
                targets[piece].unsqueeze(-1),
                chosen[piece],
                total[piece],
                None if smallest is None else smallest[piece],
                slopes[piece],
            )
            if kept is None:
                grads.add(by_logits.to(weight.dtype), hidden[piece])
            elif by_logits.data_ptr() != logits.data_ptr():
                logits.copy_(by_logits)
        if kept is not None:
            grads.add(kept, hidden)
        return torch.cat(grads.hidden) if grads.hidden else None, grads.weight, grads.bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(m, H) -> (m, V)."""
    multiply = product if is_for_onednn(hidden) else nn.functional.linear
    return multiply(hidden, weight, bias)


def _entropy(scaled: Tensor, total: Tensor, smallest: Tensor | None) -> Tensor:
    """(m,) of the truncated distribution, without the target where that fell out of it."""
    if smallest is None:
        return distribution_entropy(scaled, total=total)
    return distribution_entropy(scaled.masked_fill(scaled < smallest, -torch.inf))


class _Gradients:
    """Of hidden states (piece by piece), weight and bias, those that are wanted, from the gradients of logits."""

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> None:
        self._factor, self._wanted = weight.T, wanted
        self._multiply = product if is_for_onednn(hidden) else nn.functional.linear
        self.hidden: list[Tensor] = []
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, by_logits: Tensor, hidden: Tensor) -> None:
        """Take in some positions: (m, V) and (m, H)."""
        if self._wanted[0]:
            self.hidden.append(self._multiply(by_logits, self._factor))
        if self._wanted[1]:
            found = self._multiply(by_logits.T, hidden.T)
            self.weight = found if self.weight is None else self.weight.add_(found)
        if self._wanted[2]:
            found = by_logits.sum(0)
            self.bias = found if self.bias is None else self.bias.add_(found)


def _pieces(rows: int, vocabulary: int) -> list[slice]:
    """Consecutive rows whose logits are PIECE numbers or less; one piece, though empty, of no rows."""
    size = max(1, PIECE // vocabulary)
    return [slice(start, min(start + size, rows)) for start in range(0, max(1, rows), size)]
