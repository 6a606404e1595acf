"""All randomness is a function of (seed, purpose, step, row, ...), never of the rank or of what was drawn before."""

from __future__ import annotations

import hashlib
import random

import torch


def derive(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for one purpose, e.g. derive(recipe.train.seed, "sample", step, row, answer)."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def permutation(size: int, seed: int) -> list[int]:
    """A seeded order of range(size), the same on every rank."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


def seed_everything(seed: int) -> None:
    """Seed the global generators, which only dropout and libraries draw from: at the start, and before every step.

    So a step draws the same whether the steps before it were made in this process or not.
    """
    random.seed(seed)
    torch.manual_seed(seed)
