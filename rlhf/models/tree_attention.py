"""Attention within a flat row of trees: a trunk's tokens see the trunk up to themselves, a branch's also the branch.

A branch's attention is computed in two parts, over the trunk and over itself, whose results are joined by their
normalisers. So the trunk is read for all its branches at once, and nothing is copied or masked:

    out = sum_i exp(lse_i - lse) out_i,    lse = log sum_i exp(lse_i)

The gradient of a part, given the joined output and normaliser, is that of ordinary attention [FlashAttention,
arXiv:2205.14135 appendix B.2: dS = P (dP - rowsum(dO O))], which needs of the other parts nothing but these two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Span(NamedTuple):
    """Flat tokens start..stop - 1."""

    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """These tokens of (1, H, N, ...)."""
        return tensor[:, :, self.start : self.stop]


class Tree(NamedTuple):
    """A trunk, which may be empty, and its branches, which stand behind it one after the other."""

    trunk: Span
    branches: tuple[Span, ...]

    @property
    def crown(self) -> Span:
        """All branches."""
        return Span(self.trunk.stop, self.branches[-1].stop if self.branches else self.trunk.stop)


class Part(NamedTuple):
    """Queries that attend to keys: to all of them, or each up to its own place."""

    queries: Span
    keys: Span
    causal: bool


class Sequences(NamedTuple):
    """What a kernel for sequences of unequal length is told."""

    keys: Tensor  # (K,) flat tokens, sequence after sequence
    query_ends: Tensor  # (S + 1,) int32 cumulative lengths
    key_ends: Tensor  # (S + 1,) int32
    most_queries: int
    most_keys: int


def kernel_for(query: Tensor) -> Literal["spans", "varlen", "masked"]:
    """Which kernel computes attention, by device and type.

    spans: PyTorch's flash kernel for CPUs, span by span. varlen: its FlashAttention for CUDA, which knows 16-bit types
    only. masked: SDPA with a mask, span by span, anywhere.
    """
    if query.device.type == "cpu":
        return "spans"
    has_flash = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    return "varlen" if has_flash and query.dtype in (torch.bfloat16, torch.float16) else "masked"


@dataclass(frozen=True)
class TreeLayout:
    """The trees that fill a flat row. The row's tokens attend as `rlhf.models.attention.Layout` asks."""

    trees: tuple[Tree, ...]
    device: torch.device  # of the row

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None,
        window: int | None,
        dropout: float = 0.0,
    ) -> Tensor:
        """See `rlhf.models.attention.Layout`; B is 1."""
        if window is not None and window >= self.longest:
            window = None
        kernel = kernel_for(query)
        if kernel == "spans" and window is None and not dropout:
            out: Tensor = _TreeAttention.apply(query, key, value, self, scale)  # type: ignore[no-untyped-call]
            return out
        if kernel == "varlen" and not dropout:
            return self._varlen(query, key, value, scale, window)
        return self._masked(query, key, value, scale, window, dropout)

    def parts(self) -> Iterator[Part]:
        """What attends to what: trunks and branches to themselves, branches to their trunk."""
        for tree in self.trees:
            for span in (tree.trunk, *tree.branches):
                if span.stop > span.start:
                    yield Part(span, span, causal=True)
            if self.has_both(tree):
                yield Part(tree.crown, tree.trunk, causal=False)

    @staticmethod
    def has_both(tree: Tree) -> bool:
        """Whether there are branches that see a trunk."""
        return bool(tree.branches) and tree.trunk.stop > tree.trunk.start

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(
            tree.trunk.stop - tree.trunk.start + max((b.stop - b.start for b in tree.branches), default=0)
            for tree in self.trees
        )

    @cached_property
    def sequences(self) -> Sequences:
        """Every span as a sequence of queries with its own keys: the trunk's, then its own."""
        keys: list[Tensor] = []
        lengths = []
        for tree in self.trees:
            for span in (tree.trunk, *tree.branches):
                if span.stop > span.start:
                    before = Span(span.start, span.start) if span is tree.trunk else tree.trunk
                    own = [torch.arange(*part) for part in (before, span)]
                    keys += own
                    lengths.append((len(own[1]), len(own[0]) + len(own[1])))
        ends = torch.tensor([(0, 0), *lengths]).cumsum(0).to(torch.int32).T.contiguous().to(self.device)
        most = [max(column) for column in zip(*lengths, strict=True)]
        return Sequences(torch.cat(keys).to(self.device), ends[0], ends[1], most[0], most[1])

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
        """FlashAttention over sequences of unequal length; its causal mask ends with the last key of each."""
        from torch.nn.attention.varlen import varlen_attn

        index, ends_q, ends_k, most_q, most_k = self.sequences
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, H, D)
        out: Tensor = varlen_attn(
            q.contiguous(),
            k[index],
            v[index],
            ends_q,
            ends_k,
            most_q,
            most_k,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out[None]

    def _masked(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, dropout: float
    ) -> Tensor:
        """Span by span with a mask over trunk and span: for windows, and where there is no kernel that tells lse."""
        found = []
        for tree in self.trees:
            for span in (tree.trunk, *tree.branches):
                if span.stop == span.start:
                    continue
                before = tree.trunk if span is not tree.trunk else Span(span.start, span.start)
                keys, values = (torch.cat([before.of(t), span.of(t)], 2) for t in (key, value))
                mask = _causal(span.stop - span.start, keys.shape[2], window, query.device)
                options = {"dropout_p": dropout, "scale": scale, "enable_gqa": True}
                found.append(scaled_dot_product_attention(span.of(query), keys, values, mask, **options))
        return torch.cat(found, 2).transpose(1, 2)


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last tokens of `keys` see themselves and what is before, at most `window` tokens."""
    places = torch.arange(keys, device=device)
    own = places[keys - queries :, None]
    seen = places <= own
    return seen if window is None else seen & (places > own - window)


class _TreeAttention(Function):
    """`TreeLayout` with PyTorch's flash kernel for CPUs, one node of the graph a layer.

    In float32, whatever comes in: the kernel takes many times as long for narrower types.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float | None) -> Tensor:
        ctx.save_for_backward(query, key, value)
        q, k, v = query.float(), key.float(), value.float()
        _, heads, tokens, width = query.shape
        out = q.new_empty(1, tokens, heads, width).transpose(1, 2)  # as the caller wants it, in memory
        lse = q.new_empty(1, heads, tokens)
        for queries, keys, causal in layout.parts():
            found, total = _flash(queries.of(q), keys.of(k), keys.of(v), 0.0, causal, scale=scale)
            if causal:
                queries.of(out).copy_(found)
                queries.of(lse).copy_(total)
            else:
                _join(queries.of(out), queries.of(lse), found, total)
        ctx.layout, ctx.scale, ctx.out, ctx.lse = layout, scale, out, lse
        return out.transpose(1, 2).to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dtype = grad.dtype
        q, k, v = (saved.float() for saved in ctx.saved_tensors)
        out, lse, grad = ctx.out, ctx.lse, grad.transpose(1, 2).float()
        grads = [torch.empty_like(each) for each in (q, k, v)]
        for queries, keys, causal in ctx.layout.parts():
            given = (queries.of(grad), queries.of(q), keys.of(k), keys.of(v), queries.of(out), queries.of(lse))
            found = _flash_backward(*given, 0.0, causal, scale=ctx.scale)
            for whole, part, span in zip(grads, found, (queries, keys, keys), strict=True):
                # Every token is first the query and the key of its own span, then of others.
                span.of(whole).copy_(part) if causal else span.of(whole).add_(part)
        return *(each.to(dtype) for each in grads), None, None


def _join(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """Take a further part into attention's output (1, H, n, D) and normaliser (1, H, n), in place."""
    share = torch.sigmoid(other_lse - lse)
    lse.copy_(torch.logaddexp(lse, other_lse))
    out.lerp_(other, share.unsqueeze(-1))
