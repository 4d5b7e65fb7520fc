"""The few collectives a run needs when torchrun starts it; with one process all are no-ops."""

import os
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

# How long one rank waits for another. A rank that dies ends the wait at once with gloo, which sees
# its connections close, and with NCCL through torchrun; these end it where a machine vanishes. In
# training and scoring all do the same work at the same time; what rank 0 does alone (a download,
# k-means over millions) takes longer.
STEP_TIMEOUT, ALONE_TIMEOUT = timedelta(minutes=30), timedelta(hours=12)

_control = None  # process group of gloo, on CUDA too: of Python objects and of long waits


class Elsewhere(Exception):
    """Another rank has failed and told so; the text is its error."""


def join(cuda: bool) -> None:
    """Join the other processes that torchrun started: NCCL on CUDA, gloo on the CPU."""
    global _control
    store, rank, world = next(rendezvous("env://", timeout=STEP_TIMEOUT))
    store = _store_of_this_start(store, rank, world)
    place = {"store": store, "rank": rank, "world_size": world}
    dist.init_process_group("nccl" if cuda else "gloo", timeout=STEP_TIMEOUT, **place)
    _control = dist.new_group(backend="gloo", timeout=ALONE_TIMEOUT)


def _store_of_this_start(store: dist.Store, rank: int, world: int) -> dist.Store:
    """The ranks' common `store`, without what earlier processes have left in it.

    After a restart torchrun's store still tells the addresses of the processes that are dead (seen
    with PyTorch 2.14), and machines may count restarts differently. So rank 0 draws a new name
    for this start, and tells it to whoever is alive to answer.
    """
    name = uuid4().hex

    def joined(other: int) -> bool:
        if store.check([f"hello {other}"]):
            store.set(f"welcome {store.get(f'hello {other}').decode()}", name)
        return store.check([f"{name} {other}"])

    if rank == 0:
        _poll(lambda: all(map(joined, range(1, world))))
    else:
        store.set(f"hello {rank}", name)
        _poll(lambda: store.check([f"welcome {name}"]))
        name = store.get(f"welcome {name}").decode()
        store.set(f"{name} {rank}", "joined")
    return dist.PrefixStore(name, store)


def _poll(condition: Callable[[], bool]) -> None:
    """Wait for `condition`, open to signals."""
    end = time.monotonic() + STEP_TIMEOUT.total_seconds()
    while not condition():
        if time.monotonic() > end:
            raise dist.DistError("the processes of this run did not find each other")
        time.sleep(0.02)


def launched() -> bool:
    """Whether this is one of several processes that torchrun, or what sets the same, started."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def local_rank() -> int:
    """This process among those of its machine, 0 in a run without torchrun."""
    return int(os.environ["LOCAL_RANK"]) if launched() else 0


def rank() -> int:
    """This process among all, 0 in a run without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 in a run without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def bounds(count: int) -> list[int]:
    """Where the ranks' shares of `count` things begin and end: world + 1 numbers from 0 to count.

    The larger shares come first, so rank 0 always has something to do.
    """
    base, extra = divmod(count, world())
    return [base * r + min(r, extra) for r in range(world() + 1)]


def share(begin: int, end: int) -> tuple[slice, float]:
    """This rank's share of a batch, and the weight of its summed loss.

    DistributedDataParallel averages gradients over ranks: with the weight world / batch, the
    average is the gradient of the mean over the whole batch, however unequal the shares. A rank
    without a share takes the first image at weight 0, since all ranks must take part: it adds
    nothing to the gradient, only to SyncBatchNorm's statistics of that batch.
    """
    edges = bounds(end - begin)
    mine = slice(begin + edges[rank()], begin + edges[rank() + 1])
    if mine.start == mine.stop:
        return slice(begin, begin + 1), 0.0
    return mine, world() / (end - begin)


def gather_rows(local: Tensor, counts: Sequence[int], dim: int) -> Tensor | None:
    """Concatenate every rank's part along `dim` on rank 0; None on the others.

    counts: the size along `dim` of each rank's part.
    """
    if world() == 1:
        return local
    padding = list(local.shape)
    padding[dim] = max(counts) - local.shape[dim]
    local = torch.cat([local, local.new_zeros(padding)], dim)  # a collective wants equal shapes
    parts = [torch.empty_like(local) for _ in counts] if rank() == 0 else None
    dist.gather(local, parts, dst=0)
    if parts is None:
        return None
    return torch.cat([p.narrow(dim, 0, c) for p, c in zip(parts, counts, strict=True)], dim)


def from_rank0(compute: Callable[[], object]) -> object:
    """Run `compute` on rank 0 and give its result, a picklable object, to every rank.

    Where it raises, rank 0 raises its error and every other rank Elsewhere with its text.
    """
    if world() == 1:
        return compute()
    result = error = None
    if rank() == 0:
        try:
            result = compute()
        except Exception as raised:
            error = raised
    box = [result, None if error is None else str(error)]
    dist.broadcast_object_list(box, src=0, group=_control)
    _raise_any(error, box[1:])
    return box[0]


def one_first(compute: Callable[[], object]) -> object:
    """Run `compute` on every rank, on each machine on one before all others; its own result.

    For what the first to come puts on the disk for the others. Where it raises on a rank, that
    rank raises its error, and every other rank Elsewhere with its text.
    """
    if world() == 1:
        return compute()
    result = error = None
    for mine in (local_rank() == 0, local_rank() > 0):
        if mine:
            try:
                result = compute()
            except Exception as raised:
                error = raised
        texts = [None] * world()
        dist.all_gather_object(texts, None if error is None else str(error), group=_control)
        _raise_any(error, texts)
    return result


def _raise_any(mine: Exception | None, texts: Sequence[str | None]) -> None:
    """Raise this rank's own error, or else Elsewhere with the text of another's."""
    if mine is not None:
        raise mine
    for text in texts:
        if text is not None:
            raise Elsewhere(text)


def copy_rank0(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors of every rank with those of rank 0."""
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def add(tensor: Tensor) -> None:
    """Add up `tensor` over all ranks, in place on each."""
    if world() > 1:
        dist.all_reduce(tensor)


def average(tensor: Tensor) -> None:
    """Average `tensor` over all ranks, in place on each."""
    add(tensor)
    tensor /= world()


def lost(error: RuntimeError) -> bool:
    """Whether `error` is that of a collective which another process has left."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank; the same answer on all of them."""
    if world() == 1:
        return flag
    total = torch.tensor(int(flag))
    dist.all_reduce(total, group=_control)
    return bool(total)
