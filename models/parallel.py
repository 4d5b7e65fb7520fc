"""The few collectives a run needs when torchrun starts it; with one process all are no-ops."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


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
    without a share takes one image at weight 0, since all ranks must take part.
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
    """Run `compute` on rank 0 and give its result, a picklable object, to every rank."""
    if world() == 1:
        return compute()
    box = [compute() if rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def add(tensor: Tensor) -> None:
    """Add up `tensor` over all ranks, in place on each."""
    if world() > 1:
        dist.all_reduce(tensor)


def average(tensor: Tensor) -> None:
    """Average `tensor` over all ranks, in place on each."""
    add(tensor)
    tensor /= world()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on any rank; the same answer on all of them."""
    total = torch.tensor(int(flag), device=device)
    add(total)
    return bool(total)
