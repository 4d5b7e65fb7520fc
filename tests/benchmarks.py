"""How fast the project is and how much memory it needs, mostly as ratios of two measurements.

Times of one machine say little about another, and those of a shared machine drift. So every ratio
is of two things that took turns in one run (A B A B ...). Most are compared with a plain loop as
the field writes it, which this file contains: PIL transforms in a DataLoader, contiguous tensors,
a temperature per sample in float64, gradients on while the pool is scored, results pulled to the
host batch by batch. All images are random pixels of CIFAR-100's size and number; nothing is
downloaded.

example:
  python -m tests.benchmarks --out benchmark.json
"""

import argparse
import contextlib
import hashlib
import json
import os
import pickle
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets as torchvision_datasets
from torchvision import transforms

import models
import utils
from datasets import DATASETS, OpenSetData, augment
from models import training
from query_strategies import STRATEGIES, PoolOutputs, select

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CIFAR = DATASETS["cifar100"]
K, QUERIED = CIFAR.defaults["known_class"], CIFAR.defaults["query_batch"]
BATCH, LABELED = CIFAR.defaults["batch_size"], 800  # images per step, and at the start
STYLE = transforms.ToTensor(), transforms.Normalize(CIFAR.mean, CIFAR.std)
AUGMENTED = (transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip())
AUGMENTED = transforms.Compose([*AUGMENTED, transforms.RandomRotation(15), *STYLE])
SCRIPT = "AL_center_temperature.py"


class Table:
    """The rows, printed as they come."""

    def __init__(self) -> None:
        self.rows = []
        print("| measure | ours | reference | ratio: median (min-max) | target | reached |")
        print("|---|---|---|---|---|---|", flush=True)

    def add(
        self,
        measure: str,
        unit: str,
        ours: list[float],
        reference: list[float] | None = None,
        target: str = "",
    ) -> None:
        """One row; the samples of `ours` and `reference` were taken in turn.

        The ratio is ours / reference. target: '<= x' or '>= x', of the ratio; without a
        reference, of ours.
        """
        ratios = [a / b for a, b in zip(ours, reference or [], strict=False)]
        middle, spread = statistics.median(ratios or ours), sorted(ratios or ours)
        reached = None
        if target:
            limit = float(target[3:])
            reached = middle <= limit if target.startswith("<=") else middle >= limit
        cells = [measure, *(f"{statistics.median(x):.4g} {unit}" if x else "" for x in
                            (ours, reference))]  # fmt: skip
        cells.append(f"{middle:.3g} ({spread[0]:.3g}-{spread[-1]:.3g})" if ratios else "")
        cells += [target, {None: "", True: "yes", False: "**no**"}[reached]]
        print(f"| {' | '.join(cells)} |", flush=True)
        row = dict(measure=measure, unit=unit, ours=ours, reference=reference, ratios=ratios)
        self.rows.append(row | dict(target=target, reached=reached))


def seconds(function: Callable) -> float:
    """What one call takes."""
    begin = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turn(repeats: int, *functions: Callable) -> list[list[float]]:
    """Seconds of each function, `repeats` samples each: A B C A B C ..."""
    rounds = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [list(samples) for samples in zip(*rounds, strict=True)]


def rates(work: float, samples: list[float]) -> list[float]:
    """Work per second."""
    return [work / s for s in samples]


# ---------------------------------------------------------------------------------------------
# The plain loop


class PlainImages(Dataset):
    """One PIL image at a time."""

    def __init__(self, pixels: np.ndarray, labels: list[int], transform: Callable) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i], i


def plain_epoch(network, optimizer, images: PlainImages) -> None:
    """An epoch of the detector with temperature 0.5 for known and unknown images."""
    network.train()
    loss_sum, correct = 0.0, 0
    for batch, labels, _ in DataLoader(images, batch_size=BATCH, shuffle=True):
        batch, labels = batch.to(DEVICE), labels.to(DEVICE)
        temperature = torch.tensor([0.5 if y < K else 0.5 for y in labels.tolist()]).double()
        _, logits = network(batch)
        loss = F.cross_entropy(logits / temperature.to(DEVICE).unsqueeze(1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        correct += (logits.argmax(1) == labels).sum().item()


def plain_scores(network, images: PlainImages) -> None:
    """Max activation value and prediction of every image, as Python numbers."""
    network.eval()
    scores = []
    for batch, _, indices in DataLoader(images, batch_size=BATCH):
        _, logits = network(batch.to(DEVICE))
        mav, prediction = logits.max(1)
        scores += zip(indices.tolist(), mav.tolist(), prediction.tolist(), strict=True)


# ---------------------------------------------------------------------------------------------
# Measured in this process


def random_data(count: int) -> tuple[np.ndarray, list[int], OpenSetData]:
    """Random images and labels, for the plain loop and for the project."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, K + 1, count)
    images = augment.to_device(pixels, CIFAR.mean, CIFAR.std, CIFAR.padding, CIFAR.flip, DEVICE)
    targets = torch.from_numpy(labels)
    data = OpenSetData(images, targets.to(DEVICE), targets < K, images, targets.to(DEVICE))
    return pixels, labels.tolist(), data


def measure_augmentation(table: Table, repeats: int) -> None:
    """Images through crop, flip, rotation and normalisation, in batches as in training."""
    pixels, labels, data = random_data(2048)
    plain = PlainImages(pixels, labels, AUGMENTED)

    def ours() -> None:
        order = torch.randperm(2048).to(DEVICE)
        parameters = augment.draw(data.train, 2048, torch.Generator()).to(DEVICE)
        for rows in torch.arange(2048).split(BATCH):
            augment.augment(data.train, order[rows], parameters[rows])

    def theirs() -> None:
        for rows in torch.randperm(2048).split(BATCH):
            torch.stack([plain[i][0] for i in rows.tolist()])

    ours()
    fast, slow = (rates(2048, s) for s in in_turn(repeats, ours, theirs))
    table.add("augmentation, against PIL transforms", "images/s", fast, slow, ">= 12")


def flops_per_image() -> tuple[int, int]:
    """Floating-point operations of ResNet-18 per image: forward, and forward plus backward.

    Counted on the operations that run: the images need no gradient, so there is none of the
    first convolution's input. A multiply-add is two; batch norm and the like do not count.
    """
    network = models.create("resnet18", K + 1, 2, torch.Generator(), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        _, logits = network(torch.zeros(2, 3, 32, 32))
        forward = counter.get_total_flops() // 2
        logits.sum().backward()
    return forward, counter.get_total_flops() // 2


def measure_networks(table: Table, repeats: int, trained: int, scored: int, compiled: bool) -> None:
    """ResNet-18 with the published settings: `trained` images an epoch, `scored` of the pool."""
    pixels, labels, data = random_data(max(trained, scored))
    arguments = dict(max_epoch=1, batch_size=BATCH, lr_model=0.01, stepsize=20, gamma=0.5)
    arguments |= dict(weight_cent=0.0, lr_cent=0.5, amp="off", eval_batch_size=256)
    plain_network = models.create("resnet18", K + 1, 2, torch.Generator(), DEVICE)
    plain_network.to(memory_format=torch.contiguous_format)
    optimizer = torch.optim.SGD(plain_network.parameters(), 0.01, 0.9, weight_decay=5e-4)
    network = models.create("resnet18", K + 1, 2, torch.Generator(), DEVICE)
    matrices = torch.rand(2, 4096, 4096, device=DEVICE)

    def plain_train(count: int) -> None:
        images = PlainImages(pixels[:count], labels[:count], AUGMENTED)
        plain_epoch(plain_network, optimizer, images)

    def plain_score(count: int) -> None:
        images = PlainImages(pixels[:count], labels[:count], transforms.Compose(STYLE))
        plain_scores(plain_network, images)

    def train(compile: bool, count: int) -> None:
        args = Namespace(**arguments, compile=compile)
        temperature = [0.5] * (K + 1)
        models.train(network, data, torch.arange(count), args, torch.Generator, temperature)

    def score(compile: bool, count: int) -> None:
        args = Namespace(**arguments, compile=compile)
        models.score(network, data.train, torch.arange(count), args)

    forward, both = flops_per_image()
    sides = [("training", plain_train, train, trained, both, (">= 1.2", ">= 1.35", ">= 0.9"))]
    sides.append(("pool scoring", plain_score, score, scored, forward, (">= 1.25", ">= 1.5", "")))
    for name, plain, ours, count, flops, targets in sides:
        kinds = [plain, partial(ours, False)] + [partial(ours, True)] * compiled
        # Both batch sizes once, since code that meets a shape for the first time prepares for it.
        warm = [seconds(partial(kind, min(count, BATCH + count % BATCH))) for kind in kinds]
        calls = [partial(kind, count) for kind in kinds]
        samples = in_turn(repeats, *calls, partial(torch.mm, *matrices))
        slow, *fast = (rates(count, s) for s in samples[:-1])
        product = rates(2 * matrices[0].numel() * 4096 / 1e9, samples[-1])
        what = f"{name}, {count} images"
        for way, rate, target in zip(("", ", --compile"), fast, targets, strict=False):
            table.add(f"{what}{way}, against the plain loop", "images/s", rate, slow, target)
        targets = ("", targets[2])
        for way, rate, target in zip(("", ", --compile"), fast, targets, strict=False):
            rate = [r * flops / 1e9 for r in rate]
            row = f"{name}{way}, against a float32 matrix product"
            table.add(row, "GFLOP/s", rate, product, target)
        if compiled:
            table.add(f"first compilation, {name}", "s", [warm[2] - warm[1]])


def random_outputs(name: str, count: int) -> PoolOutputs:
    """Outputs of a pool for strategy `name`; logits with a mode per class, as trained ones have."""
    random, reads, fields = torch.Generator().manual_seed(0), STRATEGIES[name].READS, {}
    if "logits" in reads:
        fields["logits"] = torch.randn(count, K + 1, generator=random)
        strong = torch.randint(0, K + 1, (count,), generator=random)
        height = 2 + 4 * torch.randint(0, 2, (count,), generator=random)
        fields["logits"][torch.arange(count), strong] += height
    if "mc_logits" in reads:
        fields["mc_logits"] = torch.randn(20, count, K + 1, generator=random)
    if "features" in reads:
        fields["features"] = torch.randn(count, 512, generator=random)
    return PoolOutputs(count, **fields)


def measure_selection(table: Table, repeats: int, slow: bool) -> None:
    """Every strategy at 50 thousand and a million pool images; time is to grow linearly."""

    def call(name: str, count: int) -> Callable:
        return partial(select, name, random_outputs(name, count), QUERIED, torch.Generator())

    for name in STRATEGIES:
        if name == "KMeans":
            if slow:
                (ours,) = in_turn(1, call(name, 50_000))
                what = f"{name}, 50 thousand pool images, {QUERIED} centres, 512 features"
                table.add(what, "s", ours, target="<= 600")
            continue
        if name == "BALD" and not slow:
            continue
        small, large = in_turn(repeats, call(name, 50_000), call(name, 10**6))
        if name == "AV_temperature":
            table.add(f"{name}, 50 thousand pool images", "s", small, target="<= 0.3")
            table.add(f"{name}, 1 million pool images", "s", large, target="<= 6")
        linear = "<= 24" if name == "AV_temperature" else ""  # 20 times the images, 20 % grace
        table.add(f"{name}, 1 million against 50 thousand", "s", large, small, linear)


# ---------------------------------------------------------------------------------------------
# Measured in processes of their own


def child(function: Callable, *arguments: object) -> object:
    """What `function` of this file, called in a new process, returns."""
    call = f"from tests import benchmarks as b; print(b.json.dumps(b.{function.__name__}"
    command = [sys.executable, "-c", f"{call}(*{arguments!r})))"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if output.returncode:
        sys.exit(f"{output.stdout}{output.stderr}{function.__name__} failed")
    return json.loads(output.stdout.splitlines()[-1])


def run_script(*arguments: str) -> None:
    """Run LfOSA's script in this process; its lines go to stderr."""
    sys.argv = [SCRIPT, *arguments]
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")


def after(owner: object, name: str, function: Callable) -> None:
    """Call function() whenever owner.name(...) has returned."""
    original = getattr(owner, name)

    def replacement(*args, **options):
        result = original(*args, **options)
        function()
        return result

    setattr(owner, name, replacement)


def write_cifar100(folder: Path) -> dict[str, str]:
    """Files as torchvision's CIFAR100 reads them, of random pixels; MD5 sums by name."""
    random = np.random.default_rng(0)
    (folder / "cifar-100-python").mkdir()
    contents = {"meta": {"fine_label_names": [f"class {i}" for i in range(100)]}}
    for name, count in (("train", 50_000), ("test", 10_000)):
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        contents[name] = {"data": pixels, "fine_labels": [i % 100 for i in range(count)]}
    sums = {}
    for name, content in contents.items():
        file = folder / "cifar-100-python" / name
        file.write_bytes(pickle.dumps(content, protocol=2))  # as old as that of the real files
        sums[name] = hashlib.md5(file.read_bytes()).hexdigest()
    return sums


def peak_memory() -> float:
    """Of this process so far, in GB. (resource.getrusage would inherit the parent's peak.)"""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def cifar_round(folder: str, sums: dict[str, str], model: str, scored: int) -> dict:
    """One round of LfOSA with one epoch on the files of `write_cifar100`.

    Only the first `scored` images of the pool go through the network, and their outputs stand for
    the others'; the time of the networks and the augmentation in it is scaled up to the whole
    pool. Returns peak memory in GB and seconds, by what they were spent on.
    """
    source = torchvision_datasets.CIFAR100
    source.train_list, source.test_list = [["train", sums["train"]]], [["test", sums["test"]]]
    source.meta = source.meta | {"md5": sums["meta"]}
    clock, libraries = defaultdict(float), peak_memory()

    def timed(kind: str, owner: object, name: str) -> None:
        original = getattr(owner, name)

        def replacement(*args, **options):
            begin = time.perf_counter()
            result = original(*args, **options)
            clock[kind] += time.perf_counter() - begin
            return result

        setattr(owner, name, replacement)

    timed("networks", training, "batch_loss")
    timed("networks", training, "_forward")
    timed("networks", torch.Tensor, "backward")
    timed("networks", torch.optim.SGD, "step")
    for name in ("draw", "augment", "normalize"):
        timed("augmentation", augment, name)
    timed("selection", utils, "select")
    for name in ("write_atomically", "say"):
        timed("files", utils, name)
    whole_score = models.score

    def score(network, images, indices, *rest) -> PoolOutputs:
        before = dict(clock)
        outputs = whole_score(network, images, indices[:scored], *rest)
        for kind in ("networks", "augmentation"):
            more = (clock[kind] - before[kind]) * (len(indices) / scored - 1)
            clock[kind] += more
            clock["round"] += more
        logits = outputs.logits[torch.arange(len(indices)) % scored]
        return PoolOutputs(len(indices), logits=logits)

    models.score = score
    after(utils, "start", lambda: clock.update({"begin": time.perf_counter()}))
    settings = f"--dataset cifar100 --model {model} --max-epoch 1 --max-query 1".split()
    run_script(*settings, "--data-dir", folder, "--save-dir", folder, "--overwrite")
    clock["round"] += time.perf_counter() - clock.pop("begin")
    return {"memory": peak_memory() - libraries, **clock}


def measure_round(table: Table, repeats: int, model: str, scored: int) -> None:
    """Memory of a CIFAR-100-sized run, and what a round does besides running the networks."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = folder, write_cifar100(Path(folder)), model, scored
        results = [child(cifar_round, *arguments) for _ in range(repeats)]
    memory = [result["memory"] for result in results]
    what = f"CIFAR-100-sized round, {model}"
    table.add(f"peak memory above the libraries, {what}", "GB", memory, target="<= 1.6")
    whole = [result["round"] for result in results]
    outside = [result["round"] - result["networks"] for result in results]
    table.add(f"time outside the networks, {what}", "s", outside, whole, "<= 0.03")
    for kind in ("augmentation", "selection", "files"):
        table.add(f"- of it {kind}", "s", [result[kind] for result in results], whole)


def compiled_graphs(folder: str) -> list[int]:
    """Graphs compiled so far after each of three rounds, in which the pool shrinks."""
    counts = []
    stats = torch._dynamo.utils.counters["stats"]
    after(utils, "end_round", lambda: counts.append(stats["unique_graphs"]))
    run_script("--max-query", "3", "--max-epoch", "2", "--compile", "--save-dir", folder)
    return counts


def measure_compilations(table: Table) -> None:
    """With --compile: nothing is to be compiled after the first round."""
    with tempfile.TemporaryDirectory() as folder:
        first, *_, last = child(compiled_graphs, folder)
    table.add("graphs compiled, round 3 against round 1", "", [last], [first], "<= 1")


def measure_start(table: Table, repeats: int) -> None:
    """Until digits is at the end of its first training step's backward pass."""
    libraries = "import os, torch, torchvision, sklearn.mixture; os._exit(3)"
    script = "import os, runpy, sys, torch; torch.optim.SGD.step = lambda *_, **__: os._exit(3); "
    with tempfile.TemporaryDirectory() as folder:
        arguments = [SCRIPT, "--save-dir", folder, "--overwrite"]
        script += f"sys.argv = {arguments}; runpy.run_path('{SCRIPT}', run_name='__main__')"

        def run(code: str) -> None:
            command = [sys.executable, "-c", code]
            assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 3

        run(script)
        samples = in_turn(repeats, partial(run, script), partial(run, libraries))
    table.add("start to the first training step, against the imports", "s", *samples, "<= 1.5")


# ---------------------------------------------------------------------------------------------


def machine() -> dict:
    """What the numbers were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    packages = ("torch", "torchvision", "scikit-learn", "numpy", "pillow")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = "a minute instead of a quarter of an hour: less of everything, no --compile, no KMeans"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--out", help="also write machine and samples to this JSON file")
    names = ["augmentation", "networks", "selection", "round", "start", "compilations"]
    text = f"measure these alone, of {', '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="X", help=text)
    args = parser.parse_args()
    quick = args.quick
    print(" ".join(f"{key}={value}" for key, value in machine().items()), end="\n\n")
    table = Table()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # or an earlier run had compiled already
        measures = {
            "augmentation": lambda: measure_augmentation(table, 3 if quick else 7),
            "networks": lambda: measure_networks(
                table, *((1, 160, 256, False) if quick else (3, LABELED, 1024, True))
            ),
            "selection": lambda: measure_selection(table, 3, slow=not quick),
            "round": lambda: measure_round(
                table, *((1, "resnet20", 2048) if quick else (2, "resnet18", 1024))
            ),
            "start": lambda: measure_start(table, 2 if quick else 5),
            "compilations": lambda: measure_compilations(table),
        }
        for name in names:
            if name in args.only and not (quick and name == "compilations"):
                measures[name]()
    if args.out:
        result = {"machine": machine(), "quick": quick, "rows": table.rows}
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
