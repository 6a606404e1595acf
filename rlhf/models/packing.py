"""Rows of tokens as one flat row: no padding, and what rows begin with in common only once.

Rows that share a beginning (two answers to a prompt, the answers of a group) become a tree: the shared tokens, the
trunk, stand once and every row's own tokens, its branch, attend to the trunk and to themselves. What a model computes
of a token depends only on the tokens before it, so every number, and every gradient, is the one of separate rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhf.models.tree_attention import Span, Tree, TreeLayout

# A trunk costs further calls of the attention kernel in every layer; for fewer tokens than these it is not worth them.
_LEAST_SAVED = 32


@dataclass(frozen=True)
class Packed:
    """B rows of up to T tokens as N flat ones."""

    ids: Tensor  # (1, N)
    positions: Tensor  # (1, N) of each token in its row
    place: Tensor  # (B, T) where each token stands among the N; 0 for padding
    layout: TreeLayout


def pack(ids: Tensor, attention: Tensor, *, share: bool = True) -> Packed:
    """ids, attention (B, T), padding on either side but not inside -> the same tokens flat, on the same device.

    share: whether common beginnings stand once.
    """
    real = attention.bool().cpu().numpy()
    first, lengths = real.argmax(1), real.sum(1)
    table = ids.cpu().numpy()
    rows = [table[i, start : start + length] for i, (start, length) in enumerate(zip(first, lengths, strict=True))]
    trees, order = [], []  # of every flat token: (row, place in the row)
    place = np.zeros(real.shape, np.int64)
    done = 0
    for members, trunk in shared_beginnings(rows) if share else [([i], 0) for i in range(len(rows))]:
        branches = []
        order.append((members[0], 0, trunk))
        done, root = done + trunk, Span(done, done + trunk)
        for row in members:
            own = int(lengths[row]) - trunk
            order.append((row, trunk, trunk + own))
            place[row, first[row] : first[row] + trunk] = np.arange(root.start, root.stop)
            place[row, first[row] + trunk : first[row] + trunk + own] = np.arange(done, done + own)
            if own:
                branches.append(Span(done, done + own))
            done += own
        trees.append(Tree(root, tuple(branches)))
    flat = np.concatenate([rows[row][start:stop] for row, start, stop in order])
    positions = np.concatenate([np.arange(start, stop) for _, start, stop in order])

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(ids.device)

    return Packed(tensor(flat)[None], tensor(positions)[None], tensor(place), TreeLayout(tuple(trees), ids.device))


def shared_beginnings(rows: list[np.ndarray]) -> list[tuple[list[int], int]]:
    """Groups of rows with the number of tokens that all of a group begin with: what saves most tokens over all.

    Every row is in one group, alone with 0 where nothing is worth sharing. Only rows that are neighbours in
    alphabetical order can begin alike, so the groups are runs of that order, and the best cuts are found from left to
    right.
    """
    keys = [row.astype(">u4").tobytes() for row in rows]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    common = np.array([_common(rows[a], rows[b]) for a, b in zip(order, order[1:], strict=False)], np.int64)
    best, starts = (
        np.zeros(len(rows) + 1, np.int64),
        [0],
    )  # of the first j rows: tokens saved; where the last run starts
    for j in range(1, len(rows) + 1):
        # The run that ends with row j - 1 starts at i = j - 1, j - 2, ..., 0 and shares the least of the neighbours'.
        shared = np.concatenate([[0], np.minimum.accumulate(common[: j - 1][::-1])])
        saved = np.arange(j) * shared
        total = best[j - 1 :: -1] + np.where(saved >= _LEAST_SAVED, saved, np.where(np.arange(j) == 0, 0, -1))
        back = int(total.argmax())
        best[j] = total[back]
        starts.append(j - 1 - back)
    groups = []
    stop = len(rows)
    while stop:
        start = starts[stop]
        groups.append((order[start:stop], int(common[start : stop - 1].min()) if stop - start > 1 else 0))
        stop = start
    return groups[::-1]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two rows begin with in common."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    return int(different.argmax()) if different.any() else length
