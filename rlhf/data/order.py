"""Which rows a step learns from: pure functions of (seed, step), never of the rank."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")


def generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A random generator for one purpose."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big"))


@functools.lru_cache(maxsize=4)  # a step touches one epoch, or two
def _epoch(num_rows: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return generator(seed, "order", epoch).permutation(num_rows)


def rows(num_rows: int, size: int, step: int, seed: int) -> list[int]:
    """Row numbers of the global batch of a step (0, 1, ...): consecutive slices of one seeded permutation per epoch.

    Every row comes once per epoch. A batch at the end of an epoch is filled from the next epoch's permutation.
    """
    assert num_rows > 0, num_rows
    places = range(step * size, (step + 1) * size)
    return [int(_epoch(num_rows, place // num_rows, seed)[place % num_rows]) for place in places]


def share(items: Sequence[Item], rank: int, world: int) -> list[Item]:
    """A rank's part of a global batch: contiguous, and as long as every other rank's."""
    assert len(items) % world == 0, (len(items), world)
    size = len(items) // world
    return list(items[rank * size : (rank + 1) * size])
