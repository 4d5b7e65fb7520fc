"""How fast the project is and how much memory it needs, mostly as ratios of two measurements.

Times of one machine say little about another, and those of a shared machine drift. So a ratio is
of two things that took turns in one run: A B A B ... Most are compared with a plain loop as the
field writes it, which is in this file: PIL transforms in a DataLoader, contiguous tensors, a
temperature per sample in float64, gradients on while the pool is scored, every result pulled to
the host. All images are random pixels of CIFAR-100's size and number; nothing is downloaded.

example:
  python -m tests.benchmarks --out benchmark.json
"""

import argparse
import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import pickle
import platform
import runpy
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import models
import utils
from datasets import DATASETS, OpenSetData, augment
from models import training
from query_strategies import STRATEGIES, PoolOutputs, select

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "AL_center_temperature.py"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CIFAR = DATASETS["cifar100"]
K, QUERIED, BATCH = (CIFAR.defaults[k] for k in ("known_class", "query_batch", "batch_size"))
LABELED = 800  # images of the known classes at the start of a published run


class Table:
    """The rows, printed as they come."""

    def __init__(self) -> None:
        self.rows = []
        print("| measure | ours | reference | ratio: median (min-max) | target | reached |")
        print("|---|---|---|---|---|---|", flush=True)

    def add(self, measure, unit, ours, reference=(), target="") -> None:
        """One row: samples of ours and, taken in turn with them, of the reference.

        The ratio is ours / reference. target: '<= x' or '>= x' of it, or of ours if that is all.
        """
        ratios = [a / b for a, b in zip(ours, reference, strict=False)]
        value, reached = median(ratios or ours), None
        if target:
            limit = float(target[3:])
            reached = value <= limit if target.startswith("<=") else value >= limit
        cells = [measure, *(f"{median(x):.4g} {unit}" if x else "" for x in (ours, reference))]
        spread = f" ({min(ratios):.3g}-{max(ratios):.3g})" if len(ratios) > 1 else ""
        cells.append(f"{value:.3g}{spread}" if ratios else "")
        print("|", " | ".join([*cells, target, {None: "", True: "yes", False: "no"}[reached]]), "|")
        sys.stdout.flush()
        names = ("measure", "unit", "ours", "reference", "ratios", "target", "reached")
        row = (measure, unit, ours, reference, ratios, target, reached)
        self.rows.append(dict(zip(names, row, strict=True)))


def now() -> float:
    """Seconds on a clock, when all that was asked of the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable) -> float:
    """What one call takes."""
    begin = now()
    function()
    return now() - begin


def in_turn(repeats: int, *functions: Callable) -> list[list[float]]:
    """Seconds of each function, `repeats` samples of each: A B C A B C ..."""
    samples = [[seconds(function) for function in functions] for _ in range(repeats)]
    return [list(column) for column in zip(*samples, strict=True)]


def rates(work: float, samples: list[float]) -> list[float]:
    """Work per second."""
    return [work / s for s in samples]


# ---------------------------------------------------------------------------------------------
# The plain loop

AS_TENSOR = [transforms.ToTensor(), transforms.Normalize(CIFAR.mean, CIFAR.std)]
MOVED = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip()]
MOVED += [transforms.RandomRotation(15)]


class PlainImages(Dataset):
    """One PIL image at a time."""

    def __init__(self, pixels: np.ndarray, labels: list[int], steps: list[Callable]) -> None:
        self.pixels, self.labels, self.transform = pixels, labels, transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int]:
        return self.transform(Image.fromarray(self.pixels[i])), self.labels[i], i


def plain_epoch(network, optimizer, images: PlainImages, known_T=0.5, unknown_T=0.5) -> None:
    """An epoch of the detector."""
    network.train()
    loss_sum, correct = 0.0, 0
    for batch, labels, _ in DataLoader(images, batch_size=BATCH, shuffle=True):
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


def plain_scores(network, images: PlainImages) -> None:
    """Max activation value and prediction of every image, as Python numbers."""
    network.eval()
    scores = []
    for batch, _, index in DataLoader(images, batch_size=BATCH):
        mav, prediction = network(batch.to(DEVICE))[1].max(1)
        scores += zip(index.tolist(), mav.tolist(), prediction.tolist(), strict=True)


# ---------------------------------------------------------------------------------------------
# Measured in this process


def random_data(count: int) -> tuple[np.ndarray, list[int], OpenSetData]:
    """Random images and labels, for the plain loop and for the project."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    labels = torch.from_numpy(random.integers(0, K + 1, count))
    images = augment.to_device(pixels, CIFAR.mean, CIFAR.std, CIFAR.padding, CIFAR.flip, DEVICE)
    targets = labels.to(DEVICE)
    return pixels, labels.tolist(), OpenSetData(images, targets, labels < K, images, targets)


def flops_per_image() -> tuple[int, int]:
    """Floating-point operations of ResNet-18 per image: forward, and forward plus backward.

    Counted on the operations that run: the images need no gradient, so there is none of the
    first convolution's input. A multiply-add is two; batch norm and the like do not count.
    """
    network = models.create("resnet18", K + 1, 2, torch.Generator(), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        _, logits = network(torch.zeros(2, 3, 32, 32))
        forward = counter.get_total_flops()
        logits.sum().backward()
    return forward // 2, counter.get_total_flops() // 2


@functools.cache
def jobs(plain: bool, kept: int) -> dict[str, Callable]:
    """augment(count), train(count) and score(count): the first `count` of `kept` random images.

    With ResNet-18 and the published settings. plain: as the field writes it; otherwise the
    project's, train and score with a second argument --compile.
    """
    pixels, labels, data = random_data(kept)
    network = models.create("resnet18", K + 1, 2, torch.Generator(), DEVICE)
    if plain:
        network.to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4)

        def images(count: int, steps: list[Callable]) -> PlainImages:
            return PlainImages(pixels[:count], labels[:count], steps)

        def move_plainly(count: int) -> None:
            moved = images(count, MOVED + AS_TENSOR)
            for rows in torch.randperm(count).split(BATCH):
                torch.stack([moved[i][0] for i in rows.tolist()])

        return {
            "augment": move_plainly,
            "train": lambda n: plain_epoch(network, optimizer, images(n, MOVED + AS_TENSOR)),
            "score": lambda n: plain_scores(network, images(n, AS_TENSOR)),
        }
    if DEVICE.type == "cpu":
        utils.keep_memory()
    args = Namespace(max_epoch=1, batch_size=BATCH, lr_model=0.01, stepsize=20, gamma=0.5)
    args = Namespace(**vars(args), weight_cent=0.0, amp="off", eval_batch_size=256)

    def move(count: int) -> None:
        order = torch.randperm(count).to(DEVICE)
        parameters = augment.draw(data.train, count, torch.Generator()).to(DEVICE)
        for rows, own in zip(order.split(BATCH), parameters.split(BATCH), strict=True):
            augment.augment(data.train, rows, own)

    def train(count: int, compile: bool = False) -> None:
        args.compile, T = compile, [0.5] * (K + 1)
        draws = partial(utils.generator, 1)
        models.train(network, data, torch.arange(count), args, draws, T)

    def score(count: int, compile: bool = False) -> None:
        args.compile = compile
        models.score(network, data.train, torch.arange(count), args)

    return {"augment": move, "train": train, "score": score}


def profiled(job: Callable) -> dict[str, float]:
    """Seconds that the operators themselves take in a second run of `job`, by their names."""
    job()
    with torch.profiler.profile() as profile:
        job()
    taken = defaultdict(float)
    for event in profile.key_averages():
        name = "fused by --compile" if "CompiledFxGraph" in event.key else event.key
        microseconds = f"self_{DEVICE.type.replace('cuda', 'device')}_time_total"
        taken[name] += getattr(event, microseconds) / 1e6
    return taken


def run_job(measure: Callable, plain: bool, kept: int, name: str, *arguments: int):
    """What measure, `seconds` or `profiled`, says of one of the `jobs`."""
    return measure(partial(jobs(plain, kept)[name], *arguments))


@contextlib.contextmanager
def workers(kept: int, measure: Callable = seconds) -> Iterator[Callable[..., Callable]]:
    """call(plain, name, *arguments): a function that has `run_job` run by one of two processes.

    One is for the plain jobs, one for the project's: they ask the C library for different things.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as ours, ProcessPoolExecutor(1, spawn) as theirs:

        def call(plain: bool, *arguments: str | int) -> Callable:
            worker = theirs if plain else ours
            return lambda: worker.submit(run_job, measure, plain, kept, *arguments).result()

        yield call


def measure_augmentation(table: Table, repeats: int, count: int = 2048) -> None:
    """Images through crop, flip, rotation and normalisation, in batches as in training."""
    with workers(count) as call:
        kinds = call(True, "augment", count), call(False, "augment", count)
        in_turn(2, *kinds)
        slow, fast = (rates(count, s) for s in in_turn(repeats, *kinds))
    table.add("augmentation, against PIL transforms", "images/s", fast, slow, ">= 12")


def measure_networks(table: Table, repeats: int, trained: int, scored: int, compile: bool) -> None:
    """Epochs of `trained` images and a pool of `scored`: the plain loop and the project in turn."""
    kept, (forward, both) = max(trained, scored), flops_per_image()
    matrices = torch.rand(2, 4096, 4096, device=DEVICE)
    product_of = partial(torch.mm, *matrices, out=torch.empty_like(matrices[0]))
    with workers(kept) as call:
        for name, what, count, flops, targets in (
            ("train", "training", trained, both, (">= 1.2", ">= 1.35", "", ">= 0.9")),
            ("score", "pool scoring", scored, forward, (">= 1.25", ">= 1.5", "", "")),
        ):
            kinds = [(True, ()), (False, ()), (False, (True,))][: 2 + compile]
            # Once on few images, since the first batch of each size prepares for what follows.
            few = min(count, BATCH + count % BATCH)
            warm = [call(plain, name, few, *more)() for plain, more in kinds]
            calls = [call(plain, name, count, *more) for plain, more in kinds]
            slow, *fast, product = in_turn(repeats, *calls, product_of)
            ways = ["", ", --compile"]
            for way, samples, target in zip(ways, fast, targets[:2], strict=False):
                row = f"{what}, {count} images{way}, against the plain loop"
                table.add(row, "images/s", rates(count, samples), rates(count, slow), target)
            product = rates(2 * 4096**3 / 1e9, product)
            for way, samples, target in zip(ways, fast, targets[2:], strict=False):
                row = f"{what}{way}, against a float32 matrix product"
                table.add(row, "GFLOP/s", rates(count * flops / 1e9, samples), product, target)
            if compile:
                table.add(f"{what}, first compilation", "s", [warm[2] - warm[1]])


def measure_profile(table: Table, count: int = 2 * BATCH, shown: int = 5) -> None:
    """Which operators take the time: their share of all operators' own."""
    with workers(count, profiled) as call:
        for name, what in (("train", "training"), ("score", "pool scoring")):
            for way, more in (("", ()), (", --compile", (True,))):
                taken = call(False, name, count, *more)()
                total = sum(taken.values())
                for operator in sorted(taken, key=taken.get, reverse=True)[:shown]:
                    table.add(f"{what}{way}: {operator}", "s", [taken[operator]], [total])


def random_outputs(name: str, count: int) -> PoolOutputs:
    """What strategy `name` reads, of a pool of `count`; each image's logits have a mode."""
    random, reads, fields = torch.Generator().manual_seed(0), STRATEGIES[name].READS, {}
    if "logits" in reads:
        fields["logits"] = torch.randn(count, K + 1, generator=random)
        mode = torch.randint(0, K + 1, (count,), generator=random)
        height = 2 + 4 * torch.randint(0, 2, (count,), generator=random)
        fields["logits"][torch.arange(count), mode] += height
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
        if name == "KMeans" and slow:
            (samples,) = in_turn(1, call(name, 50_000))
            what = f"{name}, 50 thousand images, {QUERIED} centres, 512 features"
            table.add(what, "s", samples, target="<= 600")
        elif name != "KMeans" and (slow or name != "BALD"):
            small, large = in_turn(repeats, call(name, 50_000), call(name, 10**6))
            targets = "", "", ""
            if name == "AV_temperature":
                targets = "<= 0.3", "<= 6", "<= 24"  # linear: 20, and a fifth for the caches
            table.add(f"{name}, 50 thousand images", "s", small, target=targets[0])
            table.add(f"{name}, 1 million images", "s", large, target=targets[1])
            what = f"{name}, 1 million images against 50 thousand"
            table.add(what, "s", large, small, targets[2])


# ---------------------------------------------------------------------------------------------
# Measured in processes of their own


def child(function: Callable, *arguments: object) -> object:
    """What `function` of this file returns (as JSON) when called in a new process."""
    call = f"benchmarks.{function.__name__}(*{arguments!r})"
    code = f"import json; from tests import benchmarks; print(json.dumps({call}))"
    command = [sys.executable, "-c", code]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if output.returncode:
        sys.exit(f"{output.stdout}{output.stderr}{call} failed")
    return json.loads(output.stdout.splitlines()[-1])


def run_script(*arguments: str) -> None:
    """Run LfOSA's script in this process; its lines go to stderr."""
    sys.argv = [SCRIPT, *arguments]
    with contextlib.redirect_stdout(sys.stderr), contextlib.suppress(SystemExit):
        runpy.run_path(str(ROOT / SCRIPT), run_name="__main__")


def watch(owner: object, name: str, then: Callable[[float], None]) -> None:
    """Whenever owner.name(...) returns, call then(seconds it took)."""
    original = getattr(owner, name)

    def replacement(*args, **options):
        begin = now()
        result = original(*args, **options)
        then(now() - begin)
        return result

    setattr(owner, name, replacement)


def write_cifar100(folder: Path) -> dict[str, str]:
    """Files as torchvision's CIFAR100 reads them, of random pixels; MD5 sums by name."""
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
    """Of this process so far, in GB; resource.getrusage would inherit the peak of its parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def cifar_round(folder: str, sums: dict[str, str], model: str, scored: int) -> dict[str, float]:
    """One round of LfOSA with one epoch on the files of `write_cifar100`.

    Only the first `scored` images of the pool go through the network, and their outputs stand for
    the others'; what networks and augmentation take there is scaled up to the whole pool.
    Returns the peak memory above the imported libraries in GB, and seconds by what they went on.
    """
    source = torchvision.datasets.CIFAR100
    source.train_list, source.test_list = [["train", sums["train"]]], [["test", sums["test"]]]
    source.meta = source.meta | {"md5": sums["meta"]}
    clock, libraries = defaultdict(float), peak_memory()

    def add(kind: str, taken: float) -> None:
        clock[kind] += taken

    for kind, owner, names in (
        ("networks", training, ("batch_loss", "_forward")),
        ("networks", torch.Tensor, ("backward",)),
        ("networks", torch.optim.SGD, ("step",)),
        ("augmentation", augment, ("draw", "augment", "normalize")),
        ("selection", utils, ("select",)),
        ("files", utils, ("write_atomically", "say")),
    ):
        for name in names:
            watch(owner, name, partial(add, kind))
    score = models.score

    def score_part(network, images, indices, *rest) -> PoolOutputs:
        before = clock.copy()
        outputs = score(network, images, indices[:scored], *rest)
        for kind in ("networks", "augmentation"):
            more = (clock[kind] - before[kind]) * (len(indices) / scored - 1)
            add(kind, more)
            add("round", more)
        logits = outputs.logits[torch.arange(len(indices)) % scored]
        return PoolOutputs(len(indices), logits=logits)

    models.score = score_part
    watch(utils, "start", lambda _: add("round", -time.perf_counter()))
    settings = f"--dataset cifar100 --model {model} --max-epoch 1 --max-query 1".split()
    run_script(*settings, "--data-dir", folder, "--save-dir", folder, "--overwrite")
    add("round", time.perf_counter())
    return clock | {"memory": peak_memory() - libraries}


def measure_round(table: Table, repeats: int, model: str, scored: int) -> None:
    """Memory of a CIFAR-100-sized run, and what a round does besides running the networks."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = folder, write_cifar100(Path(folder)), model, scored
        results = [child(cifar_round, *arguments) for _ in range(repeats)]
    memory, whole, networks = ([r[k] for r in results] for k in ("memory", "round", "networks"))
    what = f"CIFAR-100-sized round, {model}"
    table.add(f"{what}: memory above the libraries", "GB", memory, target="<= 1.6")
    outside = [a - b for a, b in zip(whole, networks, strict=True)]
    table.add(f"{what}: outside the networks", "s", outside, whole, "<= 0.03")
    for kind in ("augmentation", "selection", "files"):
        table.add(f"{what}: of this {kind}", "s", [r[kind] for r in results], whole)


def compiled_graphs(folder: str) -> list[int]:
    """Graphs compiled so far, after each of three rounds in which the pool shrinks."""
    counts, stats = [], torch._dynamo.utils.counters["stats"]
    watch(utils, "end_round", lambda _: counts.append(stats["unique_graphs"]))
    run_script("--max-query", "3", "--max-epoch", "2", "--compile", "--save-dir", folder)
    return counts


def measure_compilations(table: Table) -> None:
    """With --compile nothing is to be compiled after the first round."""
    with tempfile.TemporaryDirectory() as folder:
        first, _, last = child(compiled_graphs, folder)
    table.add("graphs compiled after 3 rounds, against 1 round", "", [last], [first], "<= 1")


def measure_start(table: Table, repeats: int) -> None:
    """Until digits has done the backward pass of its first training step."""
    libraries = "import os, torch, torchvision, sklearn.mixture; os._exit(3)"
    script = "import os, runpy, sys, torch; torch.optim.SGD.step = lambda *_, **__: os._exit(3); "

    def run(code: str) -> None:
        command = [sys.executable, "-c", code]
        assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 3

    with tempfile.TemporaryDirectory() as folder:
        arguments = [SCRIPT, "--save-dir", folder, "--overwrite"]
        script += f"sys.argv = {arguments}; runpy.run_path('{SCRIPT}', run_name='__main__')"
        run(script)
        samples = in_turn(repeats, partial(run, script), partial(run, libraries))
    table.add("start to the first training step, against the imports", "s", *samples, "<= 1.5")


# ---------------------------------------------------------------------------------------------


def machine() -> dict:
    """What the numbers were measured on, and of which code."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    packages = ("torch", "torchvision", "scikit-learn", "numpy", "pillow")
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "processor": next((x.split(": ")[1] for x in lines if "model name" in x), "unknown"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if DEVICE.type == "cuda" else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
    }


def main() -> None:
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = "about a minute instead of a quarter of an hour: fewer and smaller samples, a smaller "
    text += "network in the round, no BALD, no KMeans, no profile and nothing compiled"
    parser.add_argument("--quick", action="store_true", help=text)
    parser.add_argument("--out", help="write machine and samples to this JSON file, too")
    names = ["augmentation", "networks", "profile", "selection", "round", "start", "compilations"]
    text = f"measure these alone: {', '.join(names)}"
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="X", help=text)
    args = parser.parse_args()
    quick, only = args.quick, set(args.only)
    if quick:
        only -= {"profile", "compilations"}
    if not only:
        parser.error(f"--quick leaves nothing of --only {' '.join(args.only)}")
    if args.out and not Path(args.out).absolute().parent.is_dir():
        parser.error(f"--out {args.out}: there is no such folder")
    where = machine()
    print(", ".join(f"{key} {value}" for key, value in where.items()), end="\n\n")
    table = Table()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # or an earlier run had compiled already
        if "augmentation" in only:
            measure_augmentation(table, 3 if quick else 9)
        if "networks" in only:
            sizes = (1, 160, 256, False) if quick else (5, LABELED, 1024, True)
            measure_networks(table, *sizes)
        if "profile" in only:
            measure_profile(table)
        if "selection" in only:
            measure_selection(table, 3, slow=not quick)
        if "round" in only:
            measure_round(table, *((1, "resnet20", 2048) if quick else (2, "resnet18", 1024)))
        if "start" in only:
            measure_start(table, 2 if quick else 5)
        if "compilations" in only:
            measure_compilations(table)
    if args.out:
        result = {"machine": where, "quick": quick, "rows": table.rows}
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
