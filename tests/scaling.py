"""What a second process brings, and costs: python -m tests.scaling prints a Markdown table.

Two gloo processes with one thread each on this machine; prediction by one and by both in turn.
"""

import os
import subprocess
import sys
import time
from argparse import Namespace
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import models
from experiment.run import generator
from models import Settings, augment, parallel

IMAGES = 2048  # predicted per turn, 32x32, with resnet20 and 20 + 1 classes
TURNS = 7
POOL = 1_000_000  # images whose outputs are gathered
FLOATS = {"features": 2, "logits": 21}  # of one image of the pool


def measure() -> dict[str, list[float]]:
    """Seconds by what was done, one per turn (of rank 0)."""
    flags = {"use_cpu": True, "compile": False, "deterministic": False, "amp": "off"}
    device = parallel.setup_device(Namespace(**flags))
    parallel.keep_memory(device)
    network = models.create("resnet20", 21, 2, generator(1, "init"), device)
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)
    images = augment.to_device(pixels, (0.5,) * 3, (0.25,) * 3, 4, True, 15, device)
    counts = np.diff(parallel.bounds(POOL)).tolist()
    outputs = [torch.rand(counts[parallel.rank()], width) for width in FLOATS.values()]

    def both() -> None:
        settings = Settings(eval_batch_size=64)
        models.predict(network, images, torch.arange(IMAGES), tuple(FLOATS), settings)

    def alone() -> None:
        if parallel.rank() == 0:
            with mock.patch.multiple(parallel, rank=lambda: 0, world=lambda: 1):
                both()

    def gather() -> None:
        for output in outputs:
            parallel.gather_rows(output, counts)

    times = {call.__name__: [] for call in (alone, both, gather)}
    for _ in range(TURNS + 1):
        for call in (alone, both, gather):
            dist.barrier()
            begin = time.perf_counter()
            call()
            times[call.__name__].append(time.perf_counter() - begin)
    return {name: each[1:] for name, each in times.items()}  # the first turn warms up


def main() -> None:
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node=2", "-m", "tests.scaling"]
        sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)
    times = measure()
    if parallel.rank() == 0:
        rows = {
            "scoring, 2 processes over 1": np.divide(times["alone"], times["both"]),
            f"gather {POOL:,} x {sum(FLOATS.values())} floats, s": times["gather"],
        }
        print("| what | median | lowest | highest |\n|---|---|---|---|")
        for what, values in rows.items():
            print(f"| {what} | {np.median(values):.4g} | {min(values):.4g} | {max(values):.4g} |")
        print(f"\n{TURNS} turns, {os.cpu_count()} cores, PyTorch {torch.__version__}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
