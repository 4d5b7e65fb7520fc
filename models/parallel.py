"""Device, signals and processes. The collectives do nothing without torchrun."""

import contextlib
import ctypes
import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError, tell

# torchrun notices a crashed process at once; the timeout matters only if a whole machine
# disappears. It must be longer than whatever the others wait for: k-means over a million images.
TIMEOUT = timedelta(hours=2)

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Inside, the first signal to stop is only noted; a second one ends the process at once.

    Under torchrun a scheduler's signal arrives twice, directly and through torchrun: later ones
    are ignored.
    """
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        noted.append(number)
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_IGN if launched() else signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def setup_device(args: Namespace) -> torch.device:
    """The device to use; under torchrun this process joins the others first.

    Raises UserError if there are too few devices, and for what does not work under torchrun.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available() and not args.use_cpu:
        device = torch.device("cuda", args.gpu + local_rank())
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--gpu: there is no device {device.index}, counted from 0")
        torch.cuda.set_device(device)
    if launched():
        if args.compile:
            raise UserError("--compile is for one process: leave it out under torchrun")
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    if args.amp != "off" and not _is_fast(args.amp, device):
        what = f"PyTorch is slow in {args.amp} on this device"
        tell(f"note: {what}: --amp {args.amp} may take many times as long as float32")
    return device


def _is_fast(amp: str, device: torch.device) -> bool:
    """Whether PyTorch has kernels of its own for "bf16" or "fp16"; true where it does not say."""
    if device.type == "cuda":
        return amp == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    return getattr(torch.ops.mkldnn, f"_is_mkldnn_{amp}_supported", lambda: True)()


def keep_memory(device: torch.device) -> None:
    """On a CPU, have the C library keep what is freed for the next step, as PyTorch does on CUDA.

    glibc hands every block above 32 MiB back to the kernel, which clears it page by page when it is
    used again. With the published batch that happens to most activations in every step.
    """
    if device.type != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nor does the heap shrink


def _join(backend: str) -> None:
    """Join the other processes that torchrun started."""
    prefix = ""
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True":
        # torchrun's store outlives a restart and still tells the dead processes' addresses
        # (PyTorch's issue 135712). Each machine counts restarts in its own way.
        several = os.environ["GROUP_WORLD_SIZE"] != "1"
        if several and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
            needs = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and torchrun's --rdzv-backend=c10d"
            raise UserError(f"restarts on several machines need {needs}")
        prefix = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store, rank, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    place = {"store": dist.PrefixStore(prefix, store), "rank": rank, "world_size": world}
    dist.init_process_group(backend, timeout=TIMEOUT, **place)


def launched() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


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
    """Where the shares of `count` things begin and end: world + 1 numbers from 0 to count."""
    base, extra = divmod(count, world())
    return [base * r + min(r, extra) for r in range(world() + 1)]


def share(begin: int, end: int) -> tuple[slice, float]:
    """This rank's share of a batch, and the weight of its summed loss.

    DistributedDataParallel averages gradients over ranks: with the weight world / batch, the
    average is the gradient of the mean over the whole batch, however unequal the shares. A rank
    without a share takes the first image at weight 0, since all ranks must take part.
    """
    edges = bounds(end - begin)
    mine = slice(begin + edges[rank()], begin + edges[rank() + 1])
    if mine.start == mine.stop:
        return slice(begin, begin + 1), 0.0
    return mine, world() / (end - begin)


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor | None:
    """Concatenate the first counts[r] rows of each rank r on rank 0; None on the others.

    rows: (..., n, C), of the same shape on every rank, n >= max(counts).
    """
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in counts] if rank() == 0 else None
    dist.gather(rows, parts, dst=0)
    if parts is None:
        return None
    return torch.cat([part[..., :n, :] for part, n in zip(parts, counts, strict=True)], -2)


def from_rank0(compute: Callable[[], object]) -> object:
    """Run `compute` on rank 0 and give its result, a picklable object, to every rank."""
    box = [compute() if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def distributed(network: nn.Module) -> nn.Module:
    """The network, or under torchrun what averages its gradients over the ranks."""
    if world() == 1:
        return network
    device = next(network.parameters()).device
    return DistributedDataParallel(network, [device] if device.type == "cuda" else None)


def copy_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Copy each tensor of rank 0 to all ranks, in place.

    DistributedDataParallel copies the statistics of batch norm before a step, not after it.
    """
    if world() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def average(tensors: Sequence[Tensor]) -> None:
    """Average each tensor over all ranks, in place on each."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= world()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank. All wait for each other and get the same answer."""
    total = torch.tensor(int(flag))
    if world() > 1:
        dist.all_reduce(total)
    return bool(total)
