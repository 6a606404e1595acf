"""The group of ranks: start and end it, and the few collectives the trainer needs. All work on one rank too."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed  # noqa: E402  reads DS_ACCELERATOR when it is imported

from rlhf import pulse  # noqa: E402
from rlhf.errors import UserError  # noqa: E402

T = TypeVar("T")
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def start(timeout_s: float = pulse.RANK_TIMEOUT_S) -> torch.device:
    """Join the group that the launcher describes in the environment, or a group of one. Returns this rank's device.

    The ranks of one machine find each other through a file, where the launcher names one, else over the network as
    MASTER_ADDR and MASTER_PORT say. timeout_s: how long a rank waits for the others in any collective.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Building the shared-memory op takes a compiler and 46 s, and it leaks a file in /dev/shm on every run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not torch_dist.is_initialized():
        _join("nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout_s))
    deepspeed.init_distributed(dist_backend=torch_dist.get_backend(), verbose=False)
    return device


def _join(backend: str, timeout: timedelta) -> None:
    # DeepSpeed makes groups of its own and says nothing of time: these take what torch has as its defaults.
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, size, file = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), pulse.rendezvous()
        store = None if file is None else torch_dist.FileStore(str(file), size)
        place = {} if store is None else {"store": store, "rank": rank, "world_size": size}
        torch_dist.init_process_group(backend, timeout=timeout, **place)
        return
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = "0"
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_SIZE"] = "1"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # alone it talks to nobody, and yet it listens
        os.environ.setdefault(name, _LOOPBACK)
    torch_dist.init_process_group(backend, store=torch_dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def finish() -> None:
    """Leave the group; without this gloo threads may abort the process at exit."""
    if torch_dist.is_initialized():
        torch_dist.barrier()
        torch_dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says that another rank is gone or does not answer."""
    text = str(error)
    told = any(
        words in text for words in ("Connection reset by peer", "Connection closed by peer", "Timed out waiting")
    )
    return isinstance(error, torch_dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text and told)


def rank() -> int:
    """This process's number."""
    return torch_dist.get_rank()


def world_size() -> int:
    """Number of processes."""
    return torch_dist.get_world_size()


def is_main() -> bool:
    """True on the one rank that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    torch_dist.barrier()


def device() -> torch.device:
    """The device that collectives of this group run on."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if torch_dist.get_backend() == "nccl" else torch.device("cpu")
    )


def sum_over_ranks(values: dict[str, Tensor]) -> dict[str, float]:
    """Scalars summed over ranks, in float64. Every rank must pass the same names in the same order."""
    if not values:
        return {}
    packed = torch.stack([value.detach().double().reshape(()).to(device()) for value in values.values()])
    torch_dist.all_reduce(packed)
    return dict(zip(values, packed.tolist(), strict=True))


def any_rank(flag: bool) -> bool:
    """True on all ranks as soon as one of them says so."""
    vote = torch.tensor([int(flag)], device=device())
    torch_dist.all_reduce(vote, op=torch_dist.ReduceOp.MAX)
    return bool(vote.item())


def max_over_ranks(value: int) -> int:
    """The largest value of any rank."""
    largest = torch.tensor([value], device=device())
    torch_dist.all_reduce(largest, op=torch_dist.ReduceOp.MAX)
    return int(largest.item())


def gather_rows(value: Tensor) -> Tensor:
    """Rows (B/world, ...) of every rank joined in rank order: (B, ...). Shapes must agree on all ranks."""
    local = value.contiguous().to(device())
    is_bool = local.dtype == torch.bool  # not a type that every backend can send
    parts = [torch.empty_like(local, dtype=torch.uint8 if is_bool else local.dtype) for _ in range(world_size())]
    torch_dist.all_gather(parts, local.to(torch.uint8) if is_bool else local)
    joined = torch.cat(parts)
    return (joined.bool() if is_bool else joined).to(value.device)


def placed(rows: Tensor, places: list[int], size: int) -> Tensor:
    """Rows (b, ...) of every rank at their places among all of them: (size, ...), on every rank.

    Every place is filled by one rank at most; what is filled by none is 0.
    """
    is_bool = rows.dtype == torch.bool  # not a type that every backend can add up
    whole = torch.zeros(size, *rows.shape[1:], dtype=torch.uint8 if is_bool else rows.dtype, device=device())
    whole[torch.tensor(places, dtype=torch.int64, device=whole.device)] = rows.detach().to(whole)
    torch_dist.all_reduce(whole)
    return (whole.bool() if is_bool else whole).to(rows.device)


def agreed(work: Callable[[], T]) -> T:
    """What `work` returns; where it fails on one rank for a reason to tell, every rank fails with that reason.

    Inside, ranks may meet only if none of them can fail before.
    """
    result, error = None, None
    try:
        result = work()
    except UserError as failed:
        error = failed
    for told in gather_objects(error):
        if told is not None:
            raise error or told
    return result  # type: ignore[return-value]


def gather_objects(value: T) -> list[T]:
    """A small picklable value of every rank, in rank order."""
    values: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(values, value)
    return values


def from_main(value: T | None) -> T:
    """Rank 0's value on every rank (small and picklable)."""
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]
