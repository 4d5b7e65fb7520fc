"""Measure how fast the project is and how much memory it needs; print a Markdown table.

Most figures are ratios of two things measured in turn (A B A B ...) in one run: the times of one
machine say little about another, and a shared machine drifts. The usual reference is a plain loop
as the field writes it: PIL transforms in a DataLoader, contiguous tensors, a temperature per sample
in float64, gradients on while the pool is scored, every result pulled to the host. All images are
random pixels of CIFAR-100's size and number. Nothing is downloaded.
"""

import argparse
import contextlib
import cProfile
import functools
import multiprocessing
import os
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
from types import ModuleType

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
from datasets import DATASETS
from datasets.encoder import Encoder
from datasets.raw import Raw
from experiment.run import generator
from models import Objective, Settings, augment, parallel, training
from query_strategies import STRATEGIES, PoolOutputs, select

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CIFAR = DATASETS["cifar100"]
K, QUERIED, BATCH = (CIFAR.defaults[k] for k in ("known_class", "query_batch", "batch_size"))
KNOWN_T, UNKNOWN_T = 0.5, 0.5
BATCHES = 4  # of the pool and of the test images that the networks see in the row of the round
LABELED = 800  # images of the known classes at the start of a published run

# ---- rows, turns and processes ------------------------------------------------------------------


def add_row(measure: str, unit: str, ours, reference=(), goal: str = "") -> None:
    """Print a row: samples of ours and, taken in turn with them, of the reference.

    goal: for the median of ours / reference, or of ours alone.
    """
    cells = [f"{median(ours):.4g} {unit}", "", ""]
    if reference:
        ratios = [a / b for a, b in zip(ours, reference, strict=True)]
        cells[1] = f"{median(reference):.4g} {unit}"
        cells[2] = f"{median(ratios):.3g} ({min(ratios):.3g}-{max(ratios):.3g})"
    print("|", " | ".join([measure, *cells, goal]), "|", flush=True)


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
    flags = dict.fromkeys(("use_cpu", "compile", "deterministic"))
    parallel.keep_memory(parallel.setup_device(argparse.Namespace(gpu=0, amp="off", **flags)))


# ---- augmentation, training and scoring ---------------------------------------------------------


@functools.cache
def random_images() -> tuple[np.ndarray, list[int], augment.Images, Tensor, models.ResNet]:
    """2,048 images, for PIL and for the project, their targets for both, and a new detector."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8)
    targets = torch.from_numpy(random.integers(0, K + 1, 2048))
    images = augment.to_device(
        pixels, CIFAR.mean, CIFAR.std, 4, CIFAR.flip, augment.DEGREES, DEVICE
    )
    network = models.create("resnet18", K + 1, 2, torch.Generator(), DEVICE)
    return pixels, targets.tolist(), images, targets.to(DEVICE), network


def our_augmentation(count: int) -> None:
    _, _, images, _, _ = random_images()
    order = torch.randperm(count).to(DEVICE)
    parameters = images.draw(count, torch.Generator()).to(DEVICE)
    for rows, own in zip(order.split(BATCH), parameters.split(BATCH), strict=True):
        images.batch(rows, own)


def our_training(count: int, compile: bool = False) -> None:
    _, _, images, targets, network = random_images()
    objective = Objective([KNOWN_T] * K + [UNKNOWN_T]).to(DEVICE)
    data, settings = (images, targets, torch.arange(count)), Settings(max_epoch=1, compile=compile)
    for _ in models.train(network, objective, *data, partial(generator, 1), settings):
        pass


def our_scoring(count: int, compile: bool = False) -> None:
    _, _, images, _, network = random_images()
    models.predict(network, images, torch.arange(count), settings=Settings(compile=compile))


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


def plain_training(count: int) -> None:
    network = random_images()[-1].to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, 0.9, weight_decay=5e-4)
    loss_sum, correct = 0.0, 0
    for batch, labels, _ in DataLoader(PlainImages(count, MOVED), BATCH, shuffle=True):
        T = [KNOWN_T if label < K else UNKNOWN_T for label in labels.tolist()]
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


def compare(what, plain, ours, count, turns, *goals) -> None:
    """Take the plain loop, ours and, if there is a second goal, ours with --compile in turn.

    plain, ours: functions of the number of images, `count`.
    """
    ways = {"": (), ", --compile": (True,)}
    with process() as their_process, process(set_up) as our_process:

        def taken(turns: int, n: int) -> list[list[float]]:
            calls = [partial(our_process, seconds, ours, n, *flag) for flag in ways.values()]
            return in_turn(turns, partial(their_process, seconds, plain, n), *calls[: len(goals)])

        # Once on few images: the first batch of each size prepares what later ones reuse.
        taken(1, min(count, 2 * BATCH + count % BATCH))
        slow, *fast = taken(turns, count)
    for way, samples, goal in zip(ways, fast, goals, strict=False):
        rates = [[count / s for s in each] for each in (samples, slow)]
        add_row(f"{what}{way}, {count} images, against the plain loop", "images/s", *rates, goal)


# ---- selection ----------------------------------------------------------------------------------

# Seconds for 50 thousand pool images.
GOALS = {"AV_temperature": 0.3, "Coreset": 60, "BADGE": 120, "KMeans": 600}
GOALS |= dict.fromkeys(("OpenMax", "margin", "certainty", "Max_AV"), 1) | {"EAOA": 30, "EOAL": 60}
SQUARE = ("EOAL",)  # grow with the square of the pool, the others in proportion to it


def random_outputs(strategy: ModuleType, count: int) -> PoolOutputs:
    """What a strategy reads, as of a detector, for `count` pool images.

    512 features and LABELED labeled images; for the later papers' methods, which read the invalid
    images or their own objective, 128 features, 5,000 labeled and 10,000 invalid images.
    """
    rng, fields, reads = torch.Generator().manual_seed(0), {}, strategy.READS
    later = {"invalid_features", "objective"} & {*reads}
    width, labeled = (128, 5_000) if later else (512, LABELED)
    kinds = (("", count, K + 1), ("classifier_", count, K), ("labeled_", labeled, K))
    for prefix, n, classes in (*kinds, ("invalid_", 10_000, 1)):
        targets = torch.randint(0, classes, (n,), generator=rng)
        sure = 2 + 4 * torch.randint(0, 2, (n, 1), generator=rng)  # of the target, or less so
        columns = K if prefix == "classifier_" else K + 1
        shapes = {"features": (n, width), "logits": (n, columns), "mc_logits": (20, n, columns)}
        for name, shape in shapes.items():
            if prefix + name in reads:
                fields[prefix + name] = torch.randn(shape, generator=rng)
        if prefix + "logits" in reads:
            fields[prefix + "logits"] += sure * F.one_hot(targets, columns)
        if prefix + "targets" in reads:
            fields[prefix + "targets"] = targets
    if "precisions" in reads:
        fields["precisions"] = (0.5, 0.7)
    if "objective" in reads:
        network = models.MLP(8, K + 1, width, 0.0)
        invalid = torch.arange(10_000)
        made = strategy.objective(network, None, invalid, lambda *_: rng)
        made.before_epoch(lambda index: torch.randn(len(index), width, generator=rng))
        fields["objective"] = made
    return PoolOutputs(count, num_known=K, **fields)


def selection_memory(name: str, count: int) -> float:
    """GB that strategy `name` needs above the outputs of `count` images."""
    outputs = random_outputs(STRATEGIES[name], count)
    before = peak_memory()
    select(name, outputs, QUERIED, torch.Generator())
    return peak_memory() - before


def selection(turns: int, quick: bool) -> None:
    """Select with every strategy from 50 thousand and 1 million images.

    If 1 million would take more than two minutes, 100 thousand stand for them. The goal of growth
    is linear and a fifth for the caches. quick: only strategies that read no more than logits.
    """

    def call(name: str, count: int) -> Callable[[], float]:
        outputs = random_outputs(STRATEGIES[name], count)
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
        grows = times**2 if name in SQUARE else times
        goal = f"<= {1.2 * grows:g}" if name in GOALS else ""
        add_row(f"{name}, {words} images against 50 thousand", "s", large, small, goal)
        if "invalid_features" in strategy.READS or "objective" in strategy.READS:
            with process(set_up) as fresh:
                memory = fresh(selection_memory, name, 50_000)
            add_row(f"{name}: memory above the outputs", "GB", [memory], goal="<= 1.5")


# ---- runs of LfOSA's script ---------------------------------------------------------------------


def random_cifar100(data_dir: str) -> Raw:
    """What the reader of CIFAR-100 returns, with random pixels."""
    random, parts = np.random.default_rng(0), []
    for count in (50_000, 10_000):
        parts.append(random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8))
        parts.append(np.arange(count) % 100)
    return Raw(*parts, tuple(map(str, range(100))))


def peak_memory() -> float:
    """Peak memory of this process, in GB; resource.getrusage would inherit that of its parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20


def cifar_round(folder: str, model: str) -> list[float]:
    """Run one round of LfOSA with one epoch on as many images as CIFAR-100 has.

    The networks see only the first BATCHES batches of the pool and of the test images. Their
    outputs and their mean time stand for those of the others; all else is done for every image.
    Returns the peak memory above the imported libraries in GB, the seconds that the round takes
    outside the networks, and those of the whole round.
    """
    os.environ["CUDA_LAUNCH_BLOCKING"] = "1"  # the profile is to charge each function for its own
    DATASETS["cifar100"] = CIFAR._replace(load=random_cifar100)
    forward, seen, skipped = training._forward, defaultdict(list), []

    def forward_few(network, images, *more) -> dict[str, Tensor]:
        first = seen[network.fc.out_features]  # detector and classifier differ in it
        if len(first) < BATCHES:
            first.append(forward(network, images, *more))
            return first[-1]
        skipped.append(len(images))
        return {name: tensor[: len(images)] for name, tensor in first[0].items()}

    training._forward = forward_few
    libraries, profile, taken = peak_memory(), cProfile.Profile(), defaultdict(float)
    settings = f"--dataset cifar100 --model {model} --max-epoch 1 --max-query 1".split()
    sys.argv = ["LfOSA", *settings, "--save-dir", folder]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        profile.runcall(AL_center_temperature.main)
    for (file, _, function), (*_, cumulative, _) in pstats.Stats(profile).stats.items():
        taken[f"{Path(file).name} {function}"] += cumulative
    round_alone = taken["AL_center_temperature.py main"] - taken["utils.py start"]
    steps = ("training.py _outputs", "objective.py forward", "_tensor.py backward", "sgd.py step")
    outside = round_alone - sum(taken[name] for name in (*steps, "training.py _forward"))
    more = taken["training.py _forward"] / sum(map(len, seen.values())) * len(skipped)
    return [peak_memory() - libraries, outside, round_alone + more]


def cifar_sized_round(turns: int, model: str) -> None:
    """Measure the memory of a CIFAR-100-sized run, and what a round does outside the networks."""
    results, what = [], f"CIFAR-100-sized round, {model}"
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder, process() as fresh:
            results.append(fresh(cifar_round, folder, model))
    memory, outside, whole = zip(*results, strict=True)
    add_row(f"{what}: memory above the libraries", "GB", memory, goal="<= 1.6")
    add_row(f"{what}: outside the networks", "s", outside, whole, "<= 0.03")


def write_embeddings(folder: str, count: int, width: int) -> None:
    """Write random vectors of 100 clusters: `count` to train on, a fifth as many to test on."""
    rng = np.random.default_rng(0)
    centers = 0.22 * rng.standard_normal((100, width), dtype=np.float32)
    for part, n in (("train", count), ("test", count // 5)):
        labels = np.arange(n) % 100
        rows = centers[labels] + rng.standard_normal((n, width), dtype=np.float32)
        np.save(f"{folder}/{part}.npy", rows.astype(np.float16))
        np.save(f"{folder}/{part}_labels.npy", labels)


def embeddings_run(folder: str, count: int) -> tuple[float, float]:
    """Run LfOSA as published, ten rounds, on what `write_embeddings` wrote.

    Returns the peak memory above the imported libraries in GB, and the seconds of the run.
    """
    libraries = peak_memory()
    settings = f"--dataset embeddings --data-dir {folder} --save-dir {folder}/log --known-class 20"
    sys.argv = ["LfOSA", *settings.split(), "--query-batch", str(count * 3 // 100)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        taken = seconds(AL_center_temperature.main)
    return peak_memory() - libraries, taken


def embeddings(quick: bool) -> None:
    """Measure a whole run on embeddings: time and memory."""
    count, width = (2_000, 64) if quick else (50_000, 1_280)
    with tempfile.TemporaryDirectory() as folder:
        write_embeddings(folder, count, width)
        with process() as fresh:
            memory, taken = fresh(embeddings_run, folder, count)
    what = f"LfOSA, ten rounds on {count:,} x {width:,} embeddings"
    add_row(what, "s", [taken], goal="" if quick else "<= 240")
    add_row(f"{what}: memory above the libraries", "GB", [memory], goal="<= 1.2")


def encoding(turns: int, count: int) -> None:
    """Measure an encoder with random weights beside torchvision's network in a plain loop."""
    network = torchvision.models.resnet18().eval()
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    coder = Encoder("resnet18", DEVICE, Path(), cropped=False)
    coder._network = lambda: (
        torch.nn.Sequential(*[*network.children()][:-1], torch.nn.Flatten()),
        512,
    )

    @torch.no_grad()
    def plain() -> None:
        network.to(DEVICE)
        for begin in range(0, count, 32):
            part = torch.from_numpy(images[begin : begin + 32]).to(DEVICE).permute(0, 3, 1, 2)
            network(coder.transforms(part)).cpu()

    samples = in_turn(
        turns, *(partial(seconds, call) for call in (partial(coder.apply, images), plain))
    )
    rates = [[count / s for s in each] for each in samples]
    add_row("encoding, resnet18 at 224 pixels, against a plain loop", "images/s", *rates, ">= 1")


def successors(turns: int, labeled: int, invalid: int) -> None:
    """Measure an epoch of LfOSA's detector on a later paper's network, and one of EOAL's.

    Of the latter also the clustering before it, which includes predicting the features.
    """
    count = labeled + invalid
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    images = augment.to_device(pixels, CIFAR.mean, CIFAR.std, 4, CIFAR.flip, 0, DEVICE)
    index, draws = torch.arange(count), partial(generator, 1)
    targets = torch.where(index < labeled, index % K, K).to(DEVICE)
    network = models.create("resnet18-narrow", K + 1, 0, draws("init"), DEVICE)
    clustering = []

    def epoch(objective: Objective) -> None:
        prepare = objective.before_epoch
        objective.before_epoch = lambda features_of: clustering.append(
            seconds(prepare, features_of)
        )
        data, settings = (images, targets, index), Settings(max_epoch=1)
        for _ in models.train(network, objective, *data, draws, settings):
            pass

    def taken(make: Callable[[], Objective]) -> float:
        return seconds(epoch, make().to(DEVICE))

    eoal = partial(STRATEGIES["EOAL"].objective, network, None, index[labeled:], draws)
    plain, whole = in_turn(turns, partial(taken, Objective), partial(taken, eoal))
    add_row("training, resnet18-narrow", "images/s", [count / s for s in plain])
    what = f"EOAL, {labeled:,} labeled and {invalid:,} invalid images"
    add_row(f"{what}: epoch, against LfOSA's", "s", whole, plain)
    add_row(f"{what}: clustering, against its epoch", "s", clustering[1::2], whole)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    text = "fewer and smaller samples, a smaller network in the "
    text += "round, no strategy that reads more than logits, no --compile"
    parser.add_argument("--quick", action="store_true", help=text)
    names = ["augmentation", "networks", "selection", "successors", "round", "start"]
    names += ["embeddings", "encoding"]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="measure these")
    args = parser.parse_args()
    quick, only = args.quick, args.only
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    processor = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "no GPU"
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores"
    print(f"{processor}, {threads}, {gpu}, PyTorch {torch.__version__}, commit {commit}\n")
    print("| measure | ours | reference | ratio: median (min-max) | goal |")
    print("|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache  # or an earlier run had compiled already
        if "augmentation" in only:
            turns = 3 if quick else 9
            compare("augmentation", plain_augmentation, our_augmentation, 2048, turns, ">= 12")
        if "networks" in only:
            turns, trained, scored, ways = (1, 160, 256, 1) if quick else (5, LABELED, 1024, 2)
            goals = [">= 1.2", ">= 1.35"][:ways]  # of the second with --compile
            compare("training", plain_training, our_training, trained, turns, *goals)
            goals = [">= 1.25", ">= 1.5"][:ways]
            compare("pool scoring", plain_scoring, our_scoring, scored, turns, *goals)
        if "selection" in only:
            selection(3, quick)
        if "successors" in only:
            successors(*((1, 300, 600) if quick else (5, 3000, 6000)))
        if "round" in only:
            cifar_sized_round(*((1, "resnet20") if quick else (2, "resnet18")))
        if "start" in only:
            start(2 if quick else 5)
        if "embeddings" in only:
            embeddings(quick)
        if "encoding" in only:
            encoding(*((2, 64) if quick else (5, 256)))


if __name__ == "__main__":
    main()
