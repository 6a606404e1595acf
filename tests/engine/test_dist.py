"""The collectives on a group of one; with two ranks they are tested by what is built on them."""

from __future__ import annotations

import os

import torch

from rlhf.engine import dist


def test_a_group_of_one(forked):
    def body():
        assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
        assert dist.start() == dist.device()  # a second start joins the group that is there
        assert os.environ["WORLD_SIZE"] == "1"
        dist.barrier()

    forked(body)


def test_sums_keep_names_and_precision(forked):
    def body():
        sums = dist.sum_over_ranks({"b": torch.tensor(2**53 + 1), "a": torch.tensor(0.1), "flag": torch.tensor(True)})
        assert list(sums) == ["b", "a", "flag"]
        assert sums["a"] == float(torch.tensor(0.1).double()) and sums["flag"] == 1.0
        assert dist.sum_over_ranks({}) == {}
        gradient = torch.ones(1, requires_grad=True)
        assert dist.sum_over_ranks({"x": gradient * 3}) == {"x": 3.0}

    forked(body)


def test_votes_and_values(forked):
    def body():
        assert dist.any_rank(True) is True and dist.any_rank(False) is False
        assert dist.max_over_ranks(7) == 7
        assert dist.gather_objects({"a": 1}) == [{"a": 1}]
        assert dist.from_main("x") == "x"

    forked(body)


def test_gathered_rows_keep_shape_and_type(forked):
    def body():
        for rows in (torch.arange(6).view(3, 2), torch.tensor([True, False]), torch.randn(2, 3, dtype=torch.float64)):
            gathered = dist.gather_rows(rows)
            assert gathered.dtype == rows.dtype and torch.equal(gathered, rows)
        assert torch.equal(dist.gather_rows(torch.arange(6).view(2, 3).T), torch.arange(6).view(2, 3).T)

    forked(body)


def test_errors_of_a_lost_peer_are_told_from_others():
    gloo = "[../gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:902: Connection reset by peer"
    assert dist.is_lost_peer(RuntimeError(gloo))
    assert dist.is_lost_peer(torch.distributed.DistBackendError("NCCL communicator was aborted"))
    assert not dist.is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not dist.is_lost_peer(ValueError("Connection reset by peer"))
