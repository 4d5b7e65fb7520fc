"""Measure how fast the project is and how much memory it needs.

Most figures are ratios of two things measured in turn (A B A B ...) in one run: the times of one
machine say little about another, and a shared machine drifts. The usual reference is a plain loop
as the field writes it: PIL transforms in a DataLoader, contiguous tensors, a temperature per sample
in float64, gradients on while the pool is scored, every result pulled to the host. All images are
random pixels of CIFAR-100's size and number. Nothing is downloaded.

example:
  python -m tests.benchmarks --out benchmark.json
"""

import argparse
import contextlib
import cProfile
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import pstats
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import AL_center_temperature
import models
import utils
from datasets import DATASETS, augment
from models import parallel, training
from query_strategies import STRATEGIES, PoolOutputs, select

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CIFAR = DATASETS["cifar100"]
K, QUERIED, BATCH = (CIFAR.defaults[k] for k in ("known_class", "query_batch", "batch_size"))
LABELED = 800  # images of the known classes at the start of a published run
# Floating-point operations of ResNet-18 per image, counted by torch.utils.flop_counter
FORWARD, FORWARD_AND_BACKWARD = 1.111e9, 3.329e9

# ---- rows, turns and processes ------------------------------------------------------------------

ROWS = []


def add_row(measure: str, unit: str, ours, reference=(), goal: str = "") -> None:
    """Print and keep a row: samples of ours and, taken in turn with them, of the reference.

    goal: "<= x" or ">= x", for the median of ours / reference, or of ours alone.
    """
    ratios = [a / b for a, b in zip(ours, reference, strict=False)]
    value, reached = median(ratios or ours), ""
    if goal:
        limit = float(goal[3:])
        kept = value <= limit if goal.startswith("<=") else value >= limit
        reached = "yes" if kept else "no"
    cells = [f"{median(x):.4g} {unit}" if x else "" for x in (ours, reference)]
    cells.append(f"{value:.3g} ({min(ratios):.3g}-{max(ratios):.3g})" if ratios else "")
    print("|", " | ".join([measure, *cells, goal, reached]), "|", flush=True)
    ROWS.append({"measure": measure, "unit": unit, "ours": ours, "reference": reference})
    ROWS[-1] |= {"ratios": ratios, "goal": goal, "reached": reached}


def seconds(function: Callable, *arguments: object) -> float:
    """Seconds that one call takes, with all that it asks of the device."""
    begin = time.perf_counter()
    function(*arguments)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turn(turns: int, *calls: Callable[[], float]) -> list[list[float]]:
    """What each call returns in each turn: A B C A B C ..."""
    samples = [[call() for call in calls] for _ in range(turns)]
    return [list(column) for column in zip(*samples, strict=True)]


@contextlib.contextmanager
def process(*initializer: Callable) -> Iterator[Callable]:
    """Yield run(function, *arguments), which has a new process call a function of this file."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, *initializer) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def set_up() -> None:
    """Do to this process what the scripts do: the C library keeps freed memory."""
    flags = dict.fromkeys(("use_cpu", "gpu", "compile", "deterministic"))
    parallel.setup_device(argparse.Namespace(**flags))


# ---- augmentation, training and scoring ---------------------------------------------------------


@functools.cache
def random_images() -> tuple[np.ndarray, list[int], augment.Images, Tensor, models.ResNet]:
    """2,048 images, for PIL and for the project, their targets for both, and a new detector."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8)
    targets = torch.from_numpy(random.integers(0, K + 1, 2048))
    images = augment.to_device(pixels, CIFAR.mean, CIFAR.std, 4, CIFAR.flip, DEVICE)
    network = models.create("resnet18", K + 1, 2, torch.Generator(), DEVICE)
    return pixels, targets.tolist(), images, targets.to(DEVICE), network


def our_augmentation(count: int) -> None:
    _, _, images, _, _ = random_images()
    order = torch.randperm(count).to(DEVICE)
    parameters = augment.draw(images, count, torch.Generator()).to(DEVICE)
    for rows, own in zip(order.split(BATCH), parameters.split(BATCH), strict=True):
        augment.augment(images, rows, own)


def our_training(count: int, compile: bool = False) -> None:
    _, _, images, targets, network = random_images()
    settings = {"temperature": [0.5] * (K + 1), "max_epoch": 1, "compile": compile}
    draws = partial(utils.generator, 1)
    models.train(network, images, targets, torch.arange(count), draws, **settings)


def our_scoring(count: int, compile: bool = False) -> None:
    _, _, images, _, network = random_images()
    models.predict(network, images, torch.arange(count), compile=compile)


AS_TENSOR = [transforms.ToTensor(), transforms.Normalize(CIFAR.mean, CIFAR.std)]
MOVED = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()]
MOVED += [transforms.RandomRotation(15), *AS_TENSOR]


class PlainImages(Dataset):
    """The first `count` random images, one PIL image at a time."""

    def __init__(self, count: int, steps: list[Callable]) -> None:
        self.count, self.transform = count, transforms.Compose(steps)
        self.pixels, self.labels, *_ = random_images()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i], i


def plain_augmentation(count: int) -> None:
    images = PlainImages(count, MOVED)
    for rows in torch.randperm(count).split(BATCH):
        torch.stack([images[i][0] for i in rows.tolist()])


def plain_training(count: int, known_T: float = 0.5, unknown_T: float = 0.5) -> None:
    network = random_images()[-1].to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4)
    loss_sum, correct = 0.0, 0
    for batch, labels, _ in DataLoader(PlainImages(count, MOVED), BATCH, shuffle=True):
        T = [known_T if label < K else unknown_T for label in labels.tolist()]
        T = torch.tensor(T, dtype=torch.float64).unsqueeze(1).to(DEVICE)
        batch, labels = batch.to(DEVICE), labels.to(DEVICE)
        _, logits = network(batch)
        loss = F.cross_entropy(logits / T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        correct += (logits.argmax(1) == labels).sum().item()


def plain_scoring(count: int) -> None:
    network = random_images()[-1].to(memory_format=torch.contiguous_format).eval()
    scores = []
    for batch, _, index in DataLoader(PlainImages(count, AS_TENSOR), BATCH):  # gradients are on
        mav, prediction = network(batch.to(DEVICE))[1].max(1)
        scores += zip(index.tolist(), mav.tolist(), prediction.tolist(), strict=True)


def compare(what, plain, ours, count, turns, goals, flops=0, compile=False) -> None:
    """Take plain loop, ours, ours with --compile, and a float32 matrix product in turn.

    plain, ours: functions of the number of images, `count`. goals: of ours and of --compile
    against the plain loop, and of --compile against the product. flops: per image, or 0.
    """
    matrices = torch.rand(3, 4096, 4096, device=DEVICE)
    product_of = partial(seconds, partial(torch.mm, *matrices[:2], out=matrices[2]))
    ways = {"": (), ", --compile": (True,)} if compile else {"": ()}
    with process() as their_process, process(set_up) as our_process:

        def taken(turns: int, n: int, *more: Callable) -> list[list[float]]:
            calls = [partial(our_process, seconds, ours, n, *flag) for flag in ways.values()]
            return in_turn(turns, partial(their_process, seconds, plain, n), *calls, *more)

        # Once on few images: the first batch of each size prepares what later ones reuse.
        warm = taken(1, min(count, BATCH + count % BATCH))
        slow, *fast, product = taken(turns, count, product_of)
    for way, samples, goal in zip(ways, fast, goals, strict=False):
        rates = [[count / s for s in each] for each in (samples, slow)]
        add_row(f"{what}{way}, {count} images, against the plain loop", "images/s", *rates, goal)
        if flops:
            rates = [count * flops / s / 1e9 for s in samples], [2 * 4.096**3 / s for s in product]
            goal = goals[2] if way else ""
            add_row(f"{what}{way}, against a float32 matrix product", "GFLOP/s", *rates, goal)
    if compile:
        add_row(f"{what}, first compilation", "s", [warm[2][0] - warm[1][0]])


def operators(job: Callable, *arguments: object) -> dict[str, float]:
    """Seconds that each operator itself takes in a second run of `job`, by name."""
    job(*arguments)
    with torch.profiler.profile() as profile:
        job(*arguments)
    taken = defaultdict(float)
    for event in profile.key_averages():
        name = "fused by --compile" if "CompiledFxGraph" in event.key else event.key
        microseconds = f"self_{DEVICE.type.replace('cuda', 'device')}_time_total"
        taken[name] += getattr(event, microseconds) / 1e6
    return taken


def profile(what: str, job: Callable, count: int = 2 * BATCH, shown: int = 5) -> None:
    """Show which operators take the time: their share of all operators' own."""
    for way, compile in (("", False), (", --compile", True)):
        with process(set_up) as our_process:
            taken = our_process(operators, job, count, compile)
        for name in sorted(taken, key=taken.get, reverse=True)[:shown]:
            add_row(f"{what}{way}: {name}", "s", [taken[name]], [sum(taken.values())])


# ---- selection ----------------------------------------------------------------------------------

# Seconds for 50 thousand pool images.
GOALS = {"AV_temperature": 0.3, "Coreset": 60, "BADGE": 120, "KMeans": 600}
GOALS |= dict.fromkeys(("OpenMax", "margin", "certainty", "Max_AV"), 1)


def random_outputs(reads: tuple[str, ...], count: int) -> PoolOutputs:
    """The fields `reads` as of a detector, for `count` pool images and LABELED labeled ones."""
    rng, fields = torch.Generator().manual_seed(0), {}
    for prefix, n, classes in (("", count, K + 1), ("labeled_", LABELED, K)):
        targets = torch.randint(0, classes, (n,), generator=rng)
        sure = 2 + 4 * torch.randint(
            0, 2, (n, 1), generator=rng
        )  # sure and less sure of the target
        shapes = {"features": (n, 512), "logits": (n, K + 1), "mc_logits": (20, n, K + 1)}
        for name, shape in shapes.items():
            if prefix + name in reads:
                fields[prefix + name] = torch.randn(shape, generator=rng)
        if prefix + "logits" in reads:
            fields[prefix + "logits"] += sure * F.one_hot(targets, K + 1)
        if prefix + "targets" in reads:
            fields[prefix + "targets"] = targets
    return PoolOutputs(count, num_known=K, **fields)


def selection(turns: int, quick: bool) -> None:
    """Select with every strategy from 50 thousand and 1 million images.

    If 1 million would take more than two minutes, 100 thousand stand for them. The goal of growth
    is linear and a fifth for the caches. quick: only strategies that read no more than logits.
    """

    def call(name: str, count: int) -> Callable[[], float]:
        outputs = random_outputs(STRATEGIES[name].READS, count)
        return partial(seconds, select, name, outputs, QUERIED, torch.Generator())

    for name, strategy in STRATEGIES.items():
        if quick and {"features", "mc_logits"} & set(strategy.READS):
            continue
        fifty_thousand = call(name, 50_000)
        first = fifty_thousand()
        if first <= 6:
            times, words = 20, "1 million"
            small, large = in_turn(turns, fifty_thousand, call(name, times * 50_000))
        else:
            times, words = 2, "100 thousand"
            small, large = [first], [call(name, times * 50_000)()]
        goal = f"<= {GOALS[name]}" if name in GOALS else ""
        add_row(f"{name}, 50 thousand images", "s", small, goal=goal)
        if name == "AV_temperature":
            add_row(f"{name}, 1 million images", "s", large, goal="<= 6")
        goal = f"<= {1.2 * times:g}" if name in GOALS else ""
        add_row(f"{name}, {words} images against 50 thousand", "s", large, small, goal)


# ---- runs of LfOSA's script ---------------------------------------------------------------------


def run_lfosa(*arguments: str) -> None:
    """Run LfOSA's script in this process, without its lines."""
    sys.argv = ["AL_center_temperature.py", *arguments]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        AL_center_temperature.main()


def write_cifar100(folder: Path) -> dict[str, str]:
    """Write files like CIFAR-100's, with random pixels. Returns their MD5 sums by name."""
    random, sums = np.random.default_rng(0), {}
    contents = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}
    for name, count in (("train", 50_000), ("test", 10_000)):
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "fine_labels": [i % 100 for i in range(count)]}
    (folder / "cifar-100-python").mkdir()
    for name, content in contents.items():
        file = pickle.dumps(content, protocol=2)  # as old as that of the real files
        (folder / "cifar-100-python" / name).write_bytes(file)
        sums[name] = hashlib.md5(file).hexdigest()
    return sums


def peak_memory() -> float:
    """Peak memory of this process, in GB; resource.getrusage would inherit that of its parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def cifar_round(folder: str, sums: dict[str, str], model: str, batches: int) -> list[float]:
    """Run one round of LfOSA with one epoch on the files of `write_cifar100`.

    The networks see only the first `batches` batches of the pool and of the test images. Their
    outputs and their mean time stand for those of the others; all else is done for every image.
    Returns the peak memory above the imported libraries in GB, the seconds that the round takes
    outside the networks, and those of the whole round.
    """
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # the profile is to charge each function for its own
    source = torchvision.datasets.CIFAR100
    source.train_list, source.test_list = [["train", sums["train"]]], [["test", sums["test"]]]
    source.meta = source.meta | {"md5": sums["meta"]}
    forward, seen, skipped = training._forward, defaultdict(list), []

    def forward_few(network, images, *more) -> dict[str, Tensor]:
        first = seen[network.fc.out_features]  # detector and classifier differ in it
        if len(first) < batches:
            first.append(forward(network, images, *more))
            return first[-1]
        skipped.append(len(images))
        return {name: tensor[: len(images)] for name, tensor in first[0].items()}

    training._forward = forward_few
    libraries, profile, taken = peak_memory(), cProfile.Profile(), defaultdict(float)
    settings = f"--dataset cifar100 --model {model} --max-epoch 1 --max-query 1".split()
    settings += ["--data-dir", folder, "--save-dir", folder]
    profile.runcall(run_lfosa, *settings)
    for (file, _, function), (*_, cumulative, _) in pstats.Stats(profile).stats.items():
        taken[f"{Path(file).name} {function}"] += cumulative
    round_alone = taken["AL_center_temperature.py main"] - taken["utils.py start"]
    network = (
        "training.py batch_loss",
        "_tensor.py backward",
        "sgd.py step",
        "training.py _forward",
    )
    outside = round_alone - sum(taken[name] for name in network)
    more = taken["training.py _forward"] / sum(map(len, seen.values())) * len(skipped)
    return [peak_memory() - libraries, outside, round_alone + more]


def cifar_sized_round(turns: int, model: str, batches: int) -> None:
    """Measure the memory of a CIFAR-100-sized run, and what a round does outside the networks."""
    results, what = [], f"CIFAR-100-sized round, {model}"
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder, process() as fresh:
            results.append(fresh(cifar_round, folder, write_cifar100(Path(folder)), model, batches))
    memory, outside, whole = zip(*results, strict=True)
    add_row(f"{what}: memory above the libraries", "GB", memory, goal="<= 1.6")
    add_row(f"{what}: outside the networks", "s", outside, whole, "<= 0.03")


def graphs_compiled(folder: str, rounds: int) -> int:
    """Count the graphs that a run with --compile compiles in so many rounds."""
    run_lfosa("--max-query", str(rounds), "--max-epoch", "2", "--compile", "--save-dir", folder)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compilations() -> None:
    """Check that --compile compiles nothing after the first round."""
    counts = []
    for rounds in (3, 1):
        with tempfile.TemporaryDirectory() as folder, process() as fresh:
            counts.append([fresh(graphs_compiled, folder, rounds)])
    add_row("graphs compiled in 3 rounds, against 1 round", "", *counts, "<= 1")


def start(turns: int) -> None:
    """Measure the time until digits has done the backward pass of its first training step."""

    def run(code: str) -> None:
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 3

    with tempfile.TemporaryDirectory() as folder:
        script = "import os, sys, torch; torch.optim.SGD.step = lambda *_, **__: os._exit(3); "
        script += f"sys.argv[1:] = ['--overwrite', '--save-dir', {folder!r}]; "
        script += "import AL_center_temperature; AL_center_temperature.main()"
        libraries = "import os, torch, torchvision, sklearn.mixture; os._exit(3)"
        run(script)
        samples = in_turn(turns, *(partial(seconds, run, code) for code in (script, libraries)))
    add_row("start to the first training step, against the imports", "s", *samples, "<= 1.5")


# ---- all of it ----------------------------------------------------------------------------------


def machine() -> dict[str, object]:
    """What the numbers were measured on, and of which code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "processor": next((x.split(": ")[1] for x in lines if "model name" in x), "unknown"),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def main() -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    text = "two minutes instead of twenty-five: fewer and smaller samples, a smaller network in "
    text += "the round, no strategy that reads more than logits, no profile, nothing compiled"
    parser.add_argument("--quick", action="store_true", help=text)
    text = "also write machine and samples to this JSON file"
    parser.add_argument("--out", type=argparse.FileType("w"), metavar="FILE", help=text)
    names = ["augmentation", "networks", "profile", "selection", "round", "start", "compilations"]
    text = f"measure these alone: {', '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="X", help=text)
    args = parser.parse_args()
    quick, only, where = args.quick, args.only, machine()
    print(", ".join(f"{key} {value}" for key, value in where.items()))
    print("\n| measure | ours | reference | ratio: median (min-max) | goal | reached |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # or an earlier run had compiled already
        if "augmentation" in only:
            turns = 3 if quick else 9
            compare("augmentation", plain_augmentation, our_augmentation, 2048, turns, [">= 12"])
        if "networks" in only:
            turns, trained, scored = (1, 160, 256) if quick else (5, LABELED, 1024)
            ends = (">= 1.2", ">= 1.35", ">= 0.9"), FORWARD_AND_BACKWARD, not quick
            compare("training", plain_training, our_training, trained, turns, *ends)
            ends = (">= 1.25", ">= 1.5", ""), FORWARD, not quick
            compare("pool scoring", plain_scoring, our_scoring, scored, turns, *ends)
        if "profile" in only and not quick:
            profile("training", our_training)
            profile("pool scoring", our_scoring)
        if "selection" in only:
            selection(3, quick)
        if "round" in only:
            cifar_sized_round(*((1, "resnet20", 4) if quick else (2, "resnet18", 4)))
        if "start" in only:
            start(2 if quick else 5)
        if "compilations" in only and not quick:
            compilations()
    if args.out:
        json.dump({"machine": where, "quick": quick, "rows": ROWS}, args.out, indent=1)


if __name__ == "__main__":
    main()
