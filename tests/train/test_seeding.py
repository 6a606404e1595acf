"""Randomness is a function of what it is for, on every machine."""

from __future__ import annotations

import random

import torch

from rlhf.train.seeding import derive, permutation, seed_everything


def test_seeds_are_frozen():
    """Another value would give every published run other samples."""
    assert derive(0, "sample", 3, 5, 1) == 2641202910769055587
    assert permutation(8, derive(0, "minibatch", 0, 0)) == [3, 7, 6, 1, 2, 5, 4, 0]


def test_every_part_of_the_purpose_counts():
    calls = [(0, "sample", 1, 2, 3), (1, "sample", 1, 2, 3), (0, "show", 1, 2, 3), (0, "sample", 12, 3), (0, "sample")]
    calls += [(0, "sample", 1, 2, n) for n in range(4, 100)]
    seeds = {derive(*call) for call in calls}
    assert len(seeds) == len(calls)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_permutations_hold_every_row_once():
    for size in (1, 2, 17):
        assert sorted(permutation(size, 5)) == list(range(size))
    assert permutation(50, 1) == permutation(50, 1) != permutation(50, 2)


def test_a_permutation_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    permutation(50, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_global_generators_are_seeded():
    drawn = []
    for _ in range(2):
        seed_everything(11)
        drawn.append((random.random(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
