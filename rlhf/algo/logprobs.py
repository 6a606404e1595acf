"""Log-probabilities of tokens, one position at a time: temperature, truncation (top-k, top-p), entropy.

Sampling and training call the same functions with the same options, so that both sides mean the same distribution.
V is the vocabulary size; a `(..., V)` tensor is by far the largest thing in training, so none is copied without need.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from rlhf.algo.masked import at_least_float32, row_sums


def scale_logits(logits: Tensor, *, temperature: float) -> Tensor:
    """Logits divided by the temperature, at least float32; the same tensor where there is nothing to do."""
    logits = at_least_float32(logits)
    return logits if temperature == 1 else logits / temperature


def truncate_logits(logits: Tensor, *, top_k: int, top_p: float, keep: Tensor | None = None) -> Tensor:
    """Logits (..., V) with -inf on every token outside of top-k and top-p; 0 and 1 switch them off.

    top-k first, then top-p in what is left: the smallest set of most likely tokens whose probability reaches top_p.
    Tokens that tie with the last one of the set stay too, so the set never depends on an order of sorting.
    keep: (...,) token ids that stay in any case (see `token_logprobs`).
    """
    smallest = _smallest_kept(logits, top_k, top_p)
    if smallest is None:
        return logits
    dropped = logits < smallest
    if keep is not None:
        dropped = dropped.scatter(-1, keep.unsqueeze(-1), False)
    return logits.masked_fill(dropped, -torch.inf)


def mixed_logits(logits: Tensor, others: Tensor, *, mixture: float) -> Tensor:
    """Logits of policy^(1 - mixture) * other^mixture, normalised, token by token: (..., V) twice -> (..., V).

    [Nash-MD, arXiv:2312.00886 sec. 7] Logits are log-probabilities up to a constant, so their weighted sum is all that
    there is to it. With 0 or 1 it is one of the two as it came in, at least float32; a token that is impossible under
    either is impossible under a true mixture.
    """
    weighted = [(1 - mixture, logits), (mixture, others)]
    return torch.stack([weight * at_least_float32(each) for weight, each in weighted if weight]).sum(0)


def token_logprobs(logits: Tensor, targets: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """log softmax(truncate(logits / temperature))[target]: (..., V), (...,) -> (...,) in nats, at least float32.

    The target always stays in the truncated set. A sampled token was inside when it was drawn, but it may fall out when
    the log-prob is computed again, through rounding or because the weights moved: its log-prob would be -inf and the
    ratio 0 or NaN. Kept, it is finite, and on fresh samples, where keeping changes nothing, the ratio is exactly 1.
    Does not shift: logits[..., t, :] must be the prediction of targets[..., t].
    Computed as logit - logsumexp; has a first derivative only.
    """
    logprobs: Tensor = _TokenLogprobs.apply(logits, targets, temperature, top_k, top_p)  # type: ignore[no-untyped-call]
    return logprobs


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sum of the selected tokens' log-probs per row: (B, R) -> (B,), nats per sequence."""
    return row_sums(logprobs, mask)


def entropy(logits: Tensor, total: Tensor | None = None) -> Tensor:
    """logsumexp(z) - sum softmax(z) z: (..., V) -> (...,) in nats. Tokens at -inf contribute 0.

    Neither scales nor truncates; for the distribution that was sampled from, do both first.
    total: (..., 1) the logsumexp, where it is known.
    """
    logits = at_least_float32(logits)
    finite = torch.where(logits == -torch.inf, logits.new_zeros(()), logits)
    if total is None:
        total = logits.logsumexp(-1, keepdim=True)
    mean: Tensor = torch.linalg.vecdot((logits - total).exp(), finite)
    return total.squeeze(-1) - mean


def log1mexp(logprobs: Tensor) -> Tensor:
    """log(1 - e^x) of x < 0: (...) -> (...), at least float32.

    From expm1 above -log 2 and log1p below, so that no digits are lost on either side. x is kept 8 roundings away from
    0, at which the value is -inf; above, it has no gradient.
    """
    x = at_least_float32(logprobs)
    x = x.clamp(max=-8 * torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def token_contrast(logits: Tensor, targets: Tensor, *, k: int) -> Tensor:
    """E log(1 + e^(z_target - z_s)) over s drawn from the softmax of the k best tokens that are not the target.

    (..., V), (...,) -> (...,) >= 0, at least float32, of raw logits z; no gradient through the odds of s. A target far
    below those tokens has none left. The paper draws one s: the expectation has the draw's mean value and mean gradient
    with less noise, and does not depend on which rank draws.                                        [arXiv:2211.05826]
    """
    num_best = min(k + 1, logits.shape[-1])
    best, tokens = logits.topk(num_best)
    best = at_least_float32(best)  # (..., k + 1): with the target among them, or with one too many
    is_target = tokens == targets.unsqueeze(-1)
    is_last = torch.arange(num_best, device=logits.device) == num_best - 1
    dropped = is_target | (is_last & (num_best > k) & ~is_target.any(-1, keepdim=True))
    odds = best.detach().masked_fill(dropped, -torch.inf).softmax(-1)
    target = at_least_float32(logits.gather(-1, targets.unsqueeze(-1)))
    return (odds * softplus(target - best)).sum(-1)


def token_forward_kl(ref_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """KL(reference || policy) of each token's distribution: (..., V) twice -> (...,), nats, at least float32.

    Both are log-softmaxed and untruncated. Summed over an answer it is tdpo's D, the sequential forward KL.
    """
    reference = at_least_float32(ref_logprobs)
    return (reference.exp() * (reference - at_least_float32(logprobs))).sum(-1)


def _smallest_kept(logits: Tensor, top_k: int, top_p: float) -> Tensor | None:
    """The smallest logit of the truncated set, (..., 1); None if nothing is cut off. V is sorted only without top-k."""
    has_top_k = 0 < top_k < logits.shape[-1]
    if not has_top_k and top_p >= 1:
        return None
    logits = logits.detach()
    largest = logits.topk(top_k).values if has_top_k else logits.sort(dim=-1, descending=True).values  # (..., k or V)
    if top_p >= 1:
        return largest[..., -1:]
    probs = at_least_float32(largest).softmax(-1)
    mass_before = probs.cumsum(-1) - probs
    num_kept = (mass_before < top_p).sum(-1, keepdim=True).clamp(min=1)
    return largest.gather(-1, num_kept - 1)


def target_and_total(
    scaled: Tensor, columns: Tensor, *, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(target's logit, logsumexp of the truncated set with the target in it, smallest kept logit), (..., 1) each.

    scaled: (..., V) after `scale_logits`; columns: (..., 1) target ids. None where nothing is cut off.
    """
    chosen = scaled.gather(-1, columns)
    smallest = _smallest_kept(scaled, top_k, top_p)
    if smallest is not None:
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf).scatter_(-1, columns, chosen)
    return chosen, scaled.logsumexp(-1, keepdim=True), smallest


def gradient_of_logits_(
    scaled: Tensor, columns: Tensor, chosen: Tensor, total: Tensor, smallest: Tensor | None, slopes: Tensor
) -> Tensor:
    """slopes (..., 1) times the gradient onehot(target) - softmax of `token_logprobs`, written over `scaled` (..., V).

    chosen, total, smallest: what `target_and_total` gave.
    """
    dropped = None if smallest is None else scaled < smallest
    probs = scaled.sub_(total).exp_()
    if dropped is not None:
        probs.masked_fill_(dropped, 0).scatter_(-1, columns, (chosen - total).exp())
    return probs.mul_(-slopes).scatter_add_(-1, columns, slopes)


class _TokenLogprobs(Function):
    """`token_logprobs` with a hand-written gradient, (onehot(target) - softmax) / temperature on the truncated set.

    Autograd's own would hold three more (..., V) tensors at the peak of backward. This one recomputes the softmax from
    the logits as they came in and needs one, plus one in float32 if there is a temperature or the logits are narrower.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
        scaled = scale_logits(logits, temperature=temperature)
        columns = targets.unsqueeze(-1)
        chosen, total, smallest = target_and_total(scaled, columns, top_k=top_k, top_p=top_p)
        ctx.temperature = temperature
        ctx.save_for_backward(logits, columns, chosen, total, smallest)
        return (chosen - total).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, columns, chosen, total, smallest = ctx.saved_tensors
        scaled = scale_logits(logits, temperature=ctx.temperature)
        owned = scaled.clone() if scaled is logits else scaled
        slopes = grad.unsqueeze(-1) / ctx.temperature
        found = gradient_of_logits_(owned, columns, chosen, total, smallest, slopes)
        return found.to(logits.dtype), None, None, None, None
