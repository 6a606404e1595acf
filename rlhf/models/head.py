"""The language-model head: from hidden states to numbers about tokens, without ever holding all logits at once.

(M, V) logits are by far the largest tensor of a training step. They are made in pieces of some positions; backward
makes each piece again, or finds it kept where all of them are small. Everything happens inside the head's own forward,
because sharded weights are whole only there.
"""

from __future__ import annotations

from collections.abc import Callable
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
from rlhf.recipe.schema import SamplingBlock

PIECE = 2**20  # logits that exist at a time: a few MB, which a CPU's cache still holds
KEPT = 2**25  # logits that are kept for backward rather than made again


@dataclass(frozen=True)
class Question:
    """What is to be known of M positions: the log-prob of a token, and with it what else is asked for.

    entropy: of its distribution, without or with gradient.
    ref_distribution: a reference's log-probs (M, V): KL(reference || policy).
    contrast: the CRINGE loss of the token against this many others, see `token_contrast`.
    whole: instead of all this, the log-probs of every token of the vocabulary, (M, V).
    """

    targets: Tensor  # (M,)
    sampling: SamplingBlock
    entropy: Literal["none", "value", "gradient"] = "none"
    ref_distribution: Tensor | None = None
    contrast: int = 0
    whole: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether log-probs, and the entropy's value, are all that is asked for."""
        return not (self.whole or self.contrast or self.entropy == "gradient") and self.ref_distribution is None

    def part(self, start: int, stop: int) -> Question:
        """The question about some of the positions."""
        ref = None if self.ref_distribution is None else self.ref_distribution[start:stop]
        return replace(self, targets=self.targets[start:stop], ref_distribution=ref)

    def answer(self, logits: Tensor) -> tuple[Tensor, ...]:
        """From logits (M, V): (M,) log-probs and, in the order above, what else is asked for; float32."""
        if self.whole:
            return (logits.float().log_softmax(-1),)
        cut = {"top_k": self.sampling.top_k, "top_p": self.sampling.top_p}
        found = [token_logprobs(logits, self.targets, temperature=self.sampling.temperature, **cut)]
        if self.entropy != "none":
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.entropy == "gradient"):
                scaled = scale_logits(logits, temperature=self.sampling.temperature)
                found.append(distribution_entropy(truncate_logits(scaled, **cut)))
        if self.ref_distribution is not None:
            found.append(token_forward_kl(self.ref_distribution, logits.float().log_softmax(-1)))
        if self.contrast:
            found.append(token_contrast(logits, self.targets, k=self.contrast))
        return tuple(found)


class TokenHead(nn.Linear):
    """A linear language-model head that also answers a `Question`. Heads become one by `adopt`."""

    def forward(self, hidden: Tensor, question: Question | None = None) -> Any:
        """Logits (..., V) of hidden states (..., H); with a question about (M, H), its answer."""
        if question is None:
            return super().forward(hidden)
        if question.is_plain:
            return _plain_answer(hidden, self.weight, self.bias, question)
        return in_pieces(super().forward, hidden, question, self.out_features)


def adopt(head: nn.Module) -> None:
    """Make a plain linear layer a `TokenHead`, in place; any other module stays as it is."""
    if type(head) is nn.Linear:
        head.__class__ = TokenHead


def in_pieces(
    head: Callable[[Tensor], Tensor], hidden: Tensor, question: Question, vocabulary: int
) -> tuple[Tensor, ...]:
    """The answer from a head of any kind; a piece's logits are made again in backward."""

    def piece(start: int, stop: int) -> tuple[Tensor, ...]:
        return question.part(start, stop).answer(head(hidden[start:stop]))

    rows = max(1, PIECE // vocabulary)
    cuts = [(start, min(start + rows, len(hidden))) for start in range(0, max(1, len(hidden)), rows)]
    if torch.is_grad_enabled() and len(cuts) > 1:
        found = [checkpoint(piece, *cut, use_reentrant=False) for cut in cuts]
    else:
        found = [piece(*cut) for cut in cuts]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _plain_answer(hidden: Tensor, weight: Tensor, bias: Tensor | None, question: Question) -> tuple[Tensor, ...]:
    logprobs, entropy = _LinearLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, question.targets, question.sampling, question.entropy != "none"
    )
    return (logprobs,) if question.entropy == "none" else (logprobs, entropy)


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
        keep = any(ctx.needs_input_grad) and len(hidden) * len(weight) <= KEPT
        chosen, total, entropy, kept, smallest = [], [], [], [], []
        for hiddens, wanted in zip(*_pieces(len(weight), hidden, targets), strict=True):
            logits = nn.functional.linear(hiddens, weight, bias)
            scaled = scale_logits(logits, temperature=sampling.temperature)
            found = target_and_total(scaled, wanted.unsqueeze(-1), top_k=sampling.top_k, top_p=sampling.top_p)
            for each, into in zip(found, (chosen, total, smallest), strict=True):
                into.append(each)
            if wants_entropy:
                if found[2] is None:
                    entropy.append(distribution_entropy(scaled, total=found[1]))
                else:
                    entropy.append(distribution_entropy(scaled.masked_fill(scaled < found[2], -torch.inf)))
            if keep:
                kept.append(logits)
        ctx.kept, ctx.smallest, ctx.sampling = kept, smallest, sampling
        columns = torch.cat(chosen), torch.cat(total)
        ctx.save_for_backward(hidden, weight, bias, targets, *columns)
        numbers = torch.cat(entropy) if wants_entropy else None
        if numbers is not None:
            ctx.mark_non_differentiable(numbers)
        return (columns[0] - columns[1]).squeeze(-1), numbers

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *columns = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight else None
        grad_bias = torch.zeros_like(bias) if needs_bias else None
        place = 0
        for i, (hiddens, *each) in enumerate(zip(*_pieces(len(weight), hidden, *columns, grad), strict=True)):
            logits = ctx.kept[i] if ctx.kept else nn.functional.linear(hiddens, weight, bias)
            wanted, chosen, total, slope = each
            scaled = scale_logits(logits, temperature=ctx.sampling.temperature)
            slopes = slope.unsqueeze(-1) / ctx.sampling.temperature
            by_logits = gradient_of_logits_(
                scaled, wanted.unsqueeze(-1), chosen, total, ctx.smallest[i], slopes
            ).to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(by_logits, weight, out=grad_hidden[place : place + len(hiddens)])
            if grad_weight is not None:
                grad_weight.addmm_(by_logits.T, hiddens)
            if grad_bias is not None:
                grad_bias += by_logits.sum(0)
            place += len(hiddens)
        ctx.kept = []
        return grad_hidden, grad_weight, grad_bias, None, None, None


def _pieces(vocabulary: int, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return [tensor.split(max(1, PIECE // vocabulary)) for tensor in tensors]
