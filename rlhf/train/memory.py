"""Memory: which phase ran out of it, and how many tokens go through the models at once where a recipe says `auto`."""

from __future__ import annotations

import ctypes
import logging
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from rlhf import pulse
from rlhf.data.dealing import Unit, deal
from rlhf.engine import dist
from rlhf.errors import ResourceError, WorkerLostError
from rlhf.train.objectives import Objective
from rlhf.train.pool import CAREFUL, Budget, Micro, Pool

logger = logging.getLogger("rlhf.memory")
SHARE = 0.8  # of the free memory: allocators leave gaps, and later rows may be longer


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of glibc's mallopt


def keep_freed() -> None:
    """Let the C library hold on to large blocks that were freed. For training on a CPU.

    By default a tensor of more than 32 MB is new memory of the system each time, whose pages are cleared one by one at
    first use. Where such tensors are common this takes a tenth of a training step; kept, memory stays at its peak.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):  # another C library
        return


# --- running out of it ------------------------------------------------------------------------------------------------


@contextmanager
def phase(what: str, lower: str) -> Iterator[None]:
    """Say what ran out of memory, and which key of the recipe to lower, or where another rank was lost.

    what: "out of memory in" it; the command that started the ranks is told of it, too.
    """
    try:
        with pulse.doing(what):
            yield
    except (MemoryError, RuntimeError) as error:
        if dist.is_lost_peer(error):
            told = str(error).splitlines()[0][:200]
            lost = f"rank {dist.rank()} has lost another rank, in {what}: {told}"
            raise WorkerLostError(lost, fix="The same command resumes.") from error
        if not is_out_of_memory(error):
            raise
        told = str(error).splitlines()[0] if str(error) else "no room"
        raise ResourceError(
            f"out of memory in {what}, on rank {dist.rank()}: {told}",
            fix=f"Lower {lower}; where that is not enough, turn on model.gradient_checkpointing, raise zero.stage, or"
            " use more devices. The same command resumes from the last checkpoint.",
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocation that failed, on a GPU or a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


# --- finding the largest micro-batch ----------------------------------------------------------------------------------


def settle(budget: Budget, objectives: Sequence[Objective], pool: Pool) -> None:
    """Set an open budget to the most tokens that fit, and say why. The same on every rank.

    Two forward and backward passes of the heaviest rows, the second of twice the tokens, tell what a token takes:
    activations are linear in the number of tokens. Gradients are multiplied by 0, so nothing is learned. To be called
    when optimizers have all their state, after a first step.
    """
    small = heaviest(pool.units, CAREFUL)
    large = heaviest(pool.units, 2 * tokens_of(pool.units, small))
    tokens = [tokens_of(pool.units, rows) for rows in (small, large)]
    if tokens[1] <= tokens[0]:
        budget.settle(budget.tokens)
        logger.info("micro_tokens: %d; a minibatch has no rows to measure more with", budget.tokens)
        return
    gauge = _on_gpu if objectives[0].engine.device.type == "cuda" else _on_cpu
    with torch.random.fork_rng():
        taken = [gauge(lambda n=n: _pass(objectives, pool, n)) for n in tokens]
    free = _free_on_gpu() if gauge is _on_gpu else _free_on_cpu()
    mine = fitting(tokens, taken, int(SHARE * free))
    agreed = min((number for number in dist.gather_objects(mine) if number is not None), default=None)
    longest = max(unit.shared + max(unit.own) for unit in pool.units)
    budget.settle(budget.tokens if agreed is None else min(max(agreed, 1), _most(pool.units)))
    per_token = (taken[1] - taken[0]) / (tokens[1] - tokens[0]) / 1e6
    logger.info(
        "micro_tokens: %d; passes of %d and %d tokens took %.1f and %.1f MB here, %.3f MB per token, with %.1f MB free"
        " (%.0f%% of it is used); a minibatch could use %d",
        budget.tokens,
        *tokens,
        *(each / 1e6 for each in taken),
        per_token,
        free / 1e6,
        100 * SHARE,
        _most(pool.units),
    )
    if agreed is None:
        logger.warning("the passes took no measurable memory: micro_tokens stays %d; set it in train", budget.tokens)
    elif budget.tokens < longest:
        logger.warning("a row of %d tokens may not fit: turn on model.gradient_checkpointing", longest)


def fitting(tokens: Sequence[int], taken: Sequence[int], room: int) -> int | None:
    """Tokens that fit into `room` bytes, by the line through two measurements; None where it does not rise."""
    slope = (taken[1] - taken[0]) / (tokens[1] - tokens[0])
    if slope <= 0:
        return None
    constant = max(0.0, taken[0] - slope * tokens[0])
    return int((room - constant) / slope)


def heaviest(units: Sequence[Unit], budget: int) -> list[int]:
    """The rows of the heaviest micro-batch of these."""
    return deal(units, budget, 1)[0][0]


def tokens_of(units: Sequence[Unit], rows: list[int]) -> int:
    """What one pass over some rows costs."""
    wanted = set(rows)
    parts = [unit.part([i for i, row in enumerate(unit.rows) if row in wanted]) for unit in units]
    return sum(part.tokens for part in parts if part.rows)


def _most(units: Sequence[Unit]) -> int:
    """What a rank could use for its share of a minibatch, were all of it as heavy as the heaviest part."""
    return max(unit.tokens for unit in units) * -(-len(units) // dist.world_size())


def _pass(objectives: Sequence[Objective], pool: Pool, tokens: int) -> None:
    """Forward and backward of every objective, which changes no gradient."""
    for objective in objectives:
        part = pool.of(objective.group)
        rows = heaviest(part.units, tokens)
        micro = Micro(part.batch(rows), rows, False)
        loss = micro.weighed(objective.loss(micro.rows))
        objective.engine.backward(loss, {unit: 1.0 for _, unit, _ in loss.terms.values()})


def _on_gpu(work: Callable[[], None]) -> int:
    """Bytes that work allocates at its peak."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def _free_on_gpu() -> int:
    """Bytes that this process can still allocate."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _on_cpu(work: Callable[[], None]) -> int:
    """Bytes by which the process grows at its peak, where the system tells; else 0."""
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
        before = _status("/proc/self/status", "VmRSS")
    except OSError:
        work()
        return 0
    work()
    return _status("/proc/self/status", "VmHWM") - before


def _free_on_cpu() -> int:
    """Bytes that are available, shared by the ranks of this machine."""
    _give_back()
    hosts = dist.gather_objects(platform.node())
    try:
        return _status("/proc/meminfo", "MemAvailable") // hosts.count(platform.node())
    except OSError:
        return 0


def _give_back() -> None:
    """Return freed memory to the system, which the allocator would keep and use again, unseen."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        return


def _status(path: str, name: str) -> int:
    """A number of kB in a file of /proc, in bytes."""
    lines = Path(path).read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024
