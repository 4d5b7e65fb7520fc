"""What a second process brings, and costs: python -m tests.scaling prints a Markdown table.

Two gloo processes with one thread each on this machine. Scoring by one process alone and by both
is measured in turns, so that whatever else the machine does weighs on both.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import models
import utils
from datasets import augment
from models import parallel

IMAGES = 2048  # scored per turn, 32x32, with resnet20 and 20 + 1 classes
TURNS = 7
POOL, QUERY = 1_000_000, 1500  # what is gathered, and the positions that go back
FLOATS = {"features": 2, "logits": 21}  # of one image of the pool


def seconds(call) -> float:
    """Wall time of `call` on this rank, all ranks starting together."""
    dist.barrier()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure() -> dict[str, list[float]]:
    """Seconds by what was done, one per turn (of rank 0)."""
    cpu = torch.device("cpu")
    network = models.create("resnet20", 21, 2, utils.generator(1, "init"), cpu)
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    images = augment.to_device(pixels, (0.5,) * 3, (0.25,) * 3, 4, True, cpu)
    args = Namespace(eval_batch_size=64, amp="off", compile=False)
    shares = np.diff(parallel.bounds(POOL)).tolist()
    outputs = [torch.rand(shares[parallel.rank()], width) for width in FLOATS.values()]

    def both() -> None:
        models.score(network, images, torch.arange(IMAGES), args, tuple(FLOATS))

    def alone() -> None:
        if parallel.rank() == 0:
            with mock.patch.multiple(parallel, rank=lambda: 0, world=lambda: 1):
                both()

    def gather() -> None:
        for output in outputs:
            parallel.gather_rows(output, shares, 0)

    def broadcast() -> None:
        parallel.from_rank0(lambda: torch.arange(QUERY))

    calls = {"alone": alone, "both": both, "gather": gather, "broadcast": broadcast}
    for call in calls.values():  # warm up
        call()
    times = {name: [] for name in calls}
    for _ in range(TURNS):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def table(times: dict[str, list[float]]) -> str:
    """The measurements in Markdown: median, lowest and highest of the turns."""
    rates = {name: [IMAGES / t for t in times[name]] for name in ("alone", "both")}
    ratios = [a / b for a, b in zip(times["alone"], times["both"], strict=True)]
    megabytes = 4 * POOL * sum(FLOATS.values()) / 1e6
    rows = [
        ("scoring, 1 process, images/s", rates["alone"], ".0f"),
        ("scoring, 2 processes, images/s", rates["both"], ".0f"),
        ("2 processes over 1", ratios, ".2f"),
        (
            f"gather {POOL:,} x {' + '.join(map(str, FLOATS.values()))} floats "
            f"({megabytes:.0f} MB), s",
            times["gather"],
            ".3f",
        ),
        (f"broadcast {QUERY:,} positions, s", times["broadcast"], ".5f"),
    ]
    lines = ["| what | median | lowest | highest |", "|---|---|---|---|"]
    for what, values, style in rows:
        numbers = [statistics.median(values), min(values), max(values)]
        lines.append(f"| {what} | " + " | ".join(f"{number:{style}}" for number in numbers) + " |")
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    lines.append(
        f"\n{TURNS} turns, 1 thread per process, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}; load average at the end {load}"
    )
    return "\n".join(lines)


def main() -> None:
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "tests.scaling"]
        sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
    torch.set_num_threads(1)
    parallel.join(cuda=False)
    times = measure()
    if parallel.rank() == 0:
        print(table(times))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
