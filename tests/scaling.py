"""What a second process brings, and costs: python -m tests.scaling prints a Markdown table.

Two gloo processes with one thread each on this machine. Prediction by one process alone and by
both is measured in turns, so that whatever else the machine does weighs on both.
"""

import os
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

IMAGES = 2048  # predicted per turn, 32x32, with resnet20 and 20 + 1 classes
TURNS = 7
POOL, QUERY = 1_000_000, 1500  # what is gathered, and the positions that go back
FLOATS = {"features": 2, "logits": 21}  # of one image of the pool


def measure() -> dict[str, list[float]]:
    """Seconds by what was done, one per turn (of rank 0)."""
    device = parallel.setup_device(Namespace(use_cpu=True, compile=False, deterministic=False))
    network = models.create("resnet20", 21, 2, utils.generator(1, "init"), device)
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    images = augment.to_device(pixels, (0.5,) * 3, (0.25,) * 3, 4, True, device)
    counts = np.diff(parallel.bounds(POOL)).tolist()
    outputs = [torch.rand(counts[parallel.rank()], width) for width in FLOATS.values()]

    def both() -> None:
        models.predict(network, images, torch.arange(IMAGES), tuple(FLOATS), eval_batch_size=64)

    def alone() -> None:
        if parallel.rank() == 0:
            with mock.patch.multiple(parallel, rank=lambda: 0, world=lambda: 1):
                both()

    def gather() -> None:
        for output in outputs:
            parallel.gather_rows(output, counts)

    def broadcast() -> None:
        parallel.from_rank0(lambda: torch.arange(QUERY))

    times = {call.__name__: [] for call in (alone, both, gather, broadcast)}
    for turn in range(TURNS + 1):  # the first one warms up
        for call in (alone, both, gather, broadcast):
            dist.barrier()
            begin = time.perf_counter()
            call()
            if turn:
                times[call.__name__].append(time.perf_counter() - begin)
    return times


def main() -> None:
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "tests.scaling"]
        sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
    times = measure()
    if parallel.rank() == 0:
        alone, both = ([IMAGES / t for t in times[name]] for name in ("alone", "both"))
        width = sum(FLOATS.values())
        rows = {
            "prediction, 1 process, images/s": alone,
            "prediction, 2 processes, images/s": both,
            "2 processes over 1": [b / a for a, b in zip(alone, both, strict=True)],
            f"gather {POOL:,} x {width} floats ({4 * POOL * width / 1e6:.0f} MB), s": times[
                "gather"
            ],
            f"broadcast {QUERY:,} positions, s": times["broadcast"],
        }
        print("| what | median | lowest | highest |\n|---|---|---|---|")
        for what, values in rows.items():
            numbers = statistics.median(values), min(values), max(values)
            print(f"| {what} | " + " | ".join(f"{number:.4g}" for number in numbers) + " |")
        machine = f"{os.cpu_count()} cores, torch {torch.__version__}"
        print(f"\n{TURNS} turns, {machine}; load average at the end {os.getloadavg()[0]:.1f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
