"""What both scripts share: arguments, errors, and how a run starts."""

import argparse
import contextlib
import difflib
import hashlib
import math
import os
import re
import shlex
import signal
import sys
import textwrap
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import joblib
import torch
import torch.distributed as dist

import datasets
import models
from datasets import DATASETS, MLP_DEFAULTS
from errors import Stopped, UserError, tell
from experiment.annotated import AnnotatedRun
from experiment.protocols import PROTOCOLS
from experiment.run import Run
from models import parallel
from query_strategies import STRATEGIES


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n" if parallel.local_rank() == 0 else None)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """argparse type: a number of at least `low` (`above`: more than it) and less than `high`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value < high or (above and value == low):
            least = f"{'more than' if above else 'at least'} {low:g}"
            raise ArgumentTypeError(f"{text} must be {least} and less than {high:.10g}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where `kind` raises ValueError
    return convert


def encoder(text: str) -> str:
    """argparse type: a network of torchvision's that can encode images."""
    if text not in (names := datasets.encoder.names()):
        near = difflib.get_close_matches(text, names, n=3, cutoff=0)
        raise ArgumentTypeError(f"there is no encoder {text}; did you mean {', '.join(near)}?")
    return text


COUNT, SIZE = number(int, 1, 2**31), number(int, 0, 2**31)
POSITIVE, WEIGHT = number(float, 0, 1e38, above=True), number(float, 0, 1e38)  # of float32
PERCENT, RATE = number(float, 0, 100, above=True), number(float, 0, 1, above=True)
TEMPERATURE = number(float, 1e-30, 1e30)  # float32 goes a little further


# Not repeated at the end of a run's name: they are in its first part, or change no experiment.
NAMED = "dataset data_dir query_strategy known_class init_percent query_batch max_query seed model"


def parse_arguments(description: str, detector: bool) -> Namespace:
    """The command line of either script; `detector` adds LfOSA's temperatures and its strategy.

    Two more attributes: `settings`, how the arguments that lead away from the published setting
    show in the run's name, and `given`, the names of all arguments that are not the default.
    """
    baselines = [x for x in STRATEGIES if not getattr(STRATEGIES[x], "NEEDS_DETECTOR", False)]
    strategies = [*STRATEGIES] if detector else baselines
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--dataset", choices=DATASETS, default="digits")
    early.add_argument("--encoder", type=encoder)
    early.add_argument("--protocol", choices=PROTOCOLS, default="LfOSA")
    first = "AV_temperature" if detector else "uncertainty"
    early.add_argument("--query-strategy", choices=strategies, default=first)
    chosen = early.parse_known_args()[0]
    defaults = vars(models.Settings()) | vars(chosen) | DATASETS[chosen.dataset].defaults
    defaults |= PROTOCOLS[chosen.protocol].defaults
    if chosen.encoder or chosen.dataset == "embeddings":
        defaults |= MLP_DEFAULTS | {"encoder": None}  # so that --encoder shows in the run's name
    defaults |= getattr(STRATEGIES[chosen.query_strategy], "DEFAULTS", {})
    parser = Parser(
        usage="%(prog)s [--dataset NAME] [--query-strategy NAME] [--seed N] [--resume] ...",
        description=description,
        epilog="\n".join(_epilog(chosen.dataset)),
        allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32),
    )

    def add(
        group, flag: str, kind: object, metavar: str, text: str, default: object = None
    ) -> None:
        """kind: an argparse type or a list of names. `defaults` go before `default`."""
        default = defaults.get(flag[2:].replace("-", "_"), default)
        more = {"type": kind}
        if isinstance(kind, list):
            more, text = {"choices": kind}, text + ", ".join(kind)
        text += "" if default is None else " (default: %(default)s)"
        group.add_argument(flag, default=default, metavar=metavar, help=text, **more)

    def switch(group, flag: str, text: str) -> None:
        group.add_argument(flag, action="store_true", help=text)

    def either(group, flag: str, text: str, default: bool) -> None:
        """--flag and --no-flag."""
        default = defaults.get(flag[2:].replace("-", "_"), default)
        group.add_argument(flag, help=text, default=default, action=argparse.BooleanOptionalAction)

    # In a group, --help lists the arguments in this order; over all groups, so does a run's name.
    experiment = parser.add_argument_group("experiment")
    training = parser.add_argument_group("network and training")
    add(experiment, "--dataset", [*DATASETS], "NAME", "")
    add(experiment, "--data-dir", os.path.expanduser, "DIR", "folder of the data sets", "~/data")
    add(experiment, "--query-strategy", strategies, "NAME", "")
    add(experiment, "--known-class", COUNT, "K", "number of known classes")
    add(experiment, "--init-percent", PERCENT, "P", "percent of known images labeled at first")
    add(experiment, "--query-batch", COUNT, "N", "images queried per round")
    add(experiment, "--max-query", COUNT, "N", "rounds", 10)
    add(experiment, "--seed", SIZE, "N", "seed of every random draw", 1)
    add(experiment, "--protocol", [*PROTOCOLS], "NAME", "a paper's setting (see below): ")
    which = experiment.add_mutually_exclusive_group()
    add(which, "--class-seed", SIZE, "N", "shuffle the classes; the first K are known")
    add(training, "--model", [*models.NETWORKS], "NAME", "")
    add(training, "--max-epoch", SIZE, "N", "epochs of training per round and network")
    add(training, "--feat-dim", SIZE, "F", "features before the last layer; 0: plain network")
    add(training, "--batch-size", COUNT, "N", "images per training step")
    add(training, "--lr-model", POSITIVE, "LR", "learning rate of the networks")
    add(training, "--stepsize", COUNT, "N", "epochs between decays of the learning rate")
    add(training, "--gamma", POSITIVE, "X", "factor of each decay")
    add(training, "--weight-cent", WEIGHT, "X", "weight of the center loss")
    either(experiment, "--drop-unknown", "queried unknown images leave the pool", False)
    either(experiment, "--augment-pool", "score the pool augmented, as released", False)
    either(experiment, "--rotation", "rotate images in the training augmentation", True)
    add(training, "--amp", [*models.AMP], "TYPE", "mixed precision: ")
    add(which, "--known", partial(str.split, sep=","), "A,B", "the known classes, by name")
    add(experiment, "--encoder", encoder, "NAME", "train on embeddings, by a torchvision network")
    add(experiment, "--image-size", COUNT, "N", "pixels, height and width of a folder's images")
    add(training, "--lr-cent", POSITIVE, "LR", "learning rate of the centers")
    add(training, "--dropout", RATE, "P", "dropout rate on the pooled vector (BALD only)")
    add(training, "--mc-samples", COUNT, "N", "dropout masks that BALD averages over")
    shown = [*vars(parser.parse_args([]))]  # what was added so far
    if detector:
        group = parser.add_argument_group("LfOSA: temperatures in training")
        add(group, "--known-T", TEMPERATURE, "T", "of the detector's labeled images", 0.5)
        add(group, "--unknown-T", TEMPERATURE, "T", "of the detector's invalid images", 0.5)
        add(group, "--modelB-T", TEMPERATURE, "T", "of the classifier", 1.0)
    group = parser.add_argument_group("machine")
    add(group, "--gpu", SIZE, "N", "CUDA device; under torchrun that of the first process", 0)
    switch(group, "--use-cpu", "even where there is a GPU")
    add(group, "--eval-batch-size", COUNT, "N", "images per step when evaluating or scoring")
    switch(group, "--compile", "compile the networks with torch.compile")
    switch(group, "--deterministic", "only deterministic kernels on CUDA")
    group = parser.add_argument_group("files")
    add(group, "--save-dir", os.path.expanduser, "DIR", "folder of logs and checkpoints", "log_AL/")
    switch(group, "--save-model", "keep the last round's networks in NAME.model.pt")
    switch(group, "--no-tensorboard", "write no TensorBoard files")
    add(group, "--checkpoint-seconds", WEIGHT, "S", "seconds between checkpoints in training", 60)
    add(group, "--sheet-encoding", str, "NAME", "of sheets not in UTF-8 or UTF-16, such as gbk")
    one = group.add_mutually_exclusive_group()
    switch(one, "--resume", "go on from the checkpoint, if there is one")
    switch(one, "--overwrite", "replace the files of an earlier run")
    args = parser.parse_args()
    args.given = [key for key, value in vars(args).items() if value != parser.get_default(key)]
    if fault := _senseless(args):
        parser.error(fault)
    if args.protocol != "LfOSA":
        args.given.insert(0, "protocol")
    args.settings = _settings(args, [key for key in args.given if key in shown])
    return args


def _epilog(dataset: str) -> Iterator[str]:
    """The end of --help: whose defaults it shows, and what each protocol sets."""
    yield f"Defaults of {dataset}; see also --dataset cifar100 --help. Flags override a protocol:"
    for name, protocol in PROTOCOLS.items():
        words = ["the known classes of its paper"] if dataset in protocol.class_order else []
        for key, value in protocol.defaults.items():
            if dataset == "embeddings" and key in ("model", "rotation"):
                continue  # of images alone
            flag = ("no-" if value is False else "") + key.replace("_", "-")
            words.append(f"--{flag}" + ("" if isinstance(value, bool) else f" {value}"))
        if words:
            yield textwrap.fill(f"{name}: {', '.join(words)}.", 98)


def _senseless(args: Namespace) -> str:
    """What is wrong with arguments that have no meaning together; "" if nothing is."""
    vectors = args.encoder or args.dataset == "embeddings"
    if args.known and "known_class" in args.given:
        return "--known-class counts the classes that --known names: leave one of them out"
    if args.encoder and args.dataset == "embeddings":
        return "--encoder is for images, not for --dataset embeddings"
    if vectors and args.model != "mlp":
        return f"--model {args.model} is for images: embeddings need mlp"
    if args.model == "mlp" and not vectors:
        return "--model mlp is for embeddings: add --encoder NAME or --dataset embeddings"
    for key in ("augment_pool", "image_size", "rotation"):
        if vectors and key in args.given:
            return f"--{key.replace('_', '-')} has no meaning with embeddings"
    return ""


def _settings(args: Namespace, shown: list[str]) -> str:
    """The arguments that lead away from the published setting: '__flag-value_...'."""
    idle = NAMED.split()
    if args.weight_cent == 0:
        idle.append("lr_cent")
    if "mc_logits" not in STRATEGIES[args.query_strategy].READS:
        idle += ["dropout", "mc_samples"]
    parts = []
    for key in shown:
        if key not in idle:
            value = getattr(args, key)
            flag = ("no-" if value is False else "") + key.replace("_", "-")
            if isinstance(value, str) and key != "amp":  # so it is in shipped logs
                flag += "-"
            parts.append(flag if isinstance(value, bool) else f"{flag}{_show(value)}")
    return "__" + "_".join(parts) if parts else ""


def _show(value: object) -> str:
    if isinstance(value, list):
        names = ",".join(re.sub(r"[^\w.+-]|_", "-", name) for name in value)
        digest = hashlib.sha256(repr(value).encode()).hexdigest()[:8]
        # A file's name has at most 255 bytes; the journal holds the whole list.
        return names if len(names.encode()) <= 80 else f"{len(value)}-{digest}"
    return f"{value:.12g}" if isinstance(value, float) else str(value).replace("_", "-")


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; turn an error that the user can fix into one line and exit status 2.

    After a stop by a signal the exit status is 128 plus its number. A bug ends in a traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the script
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        with contextlib.suppress(AttributeError):  # a notebook's output shows every character
            getattr(sys, name).reconfigure(errors="replace")
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once and without a traceback
    status, error = 0, None
    try:
        main()
    except Stopped as stop:
        status = 128 + stop.signal
        words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        command = shlex.join([sys.executable, *words, "--resume"])
        same = "the same torchrun line and --resume"
        tell(f"stopped; go on with: {same if parallel.launched() else command}")
    except UserError as raised:
        status, error = 2, raised
    except (MemoryError, RuntimeError) as raised:
        # PyTorch has no class for a lack of memory on the CPU, nor for a peer that gloo has lost.
        cpu_is_full, peer_is_lost = "DefaultCPU" in str(raised), "gloo" in str(raised).lower()
        if isinstance(raised, (MemoryError, torch.OutOfMemoryError)) or cpu_is_full:
            status, error = 2, "out of memory: lower --batch-size or --eval-batch-size"
        elif type(raised).__module__.startswith(("torch._dynamo", "torch._inductor")):
            status, error = 2, f"--compile does not work here, leave it out ({raised})"
        elif parallel.world() > 1 and (isinstance(raised, dist.DistError) or peer_is_lost):
            status = 1
            tell("another process has ended")  # torchrun tells which
        else:
            raise
    finally:
        signal.signal(signal.SIGINT, before)  # a notebook lives on
    if error:
        print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
    if dist.is_initialized() and status == 0:
        dist.destroy_process_group()
    sys.exit(status)


def start(description: str, detector: bool) -> Run:
    """Parse the command line, read the data, and begin a run or go on from its checkpoint."""
    args = parse_arguments(description, detector)
    if "OMP_NUM_THREADS" not in os.environ:  # PyTorch does not see a container's quota
        torch.set_num_threads(min(torch.get_num_threads(), joblib.cpu_count()))
    if parallel.launched() and hasattr(STRATEGIES[args.query_strategy], "objective"):
        raise UserError(f"{args.query_strategy} runs in one process: leave out torchrun")
    device = parallel.setup_device(args)
    order = PROTOCOLS[args.protocol].class_order.get(args.dataset)
    which = datasets.KnownClasses(args.known_class, args.known, args.class_seed, order)
    more = ("image_size", "rotation", "sheet_encoding", "encoder")
    more = {key: vars(args)[key] for key in more}
    data = datasets.create(args.dataset, Path(args.data_dir), device, which, **more)
    parallel.keep_memory(device)  # after the reading: its temporary copies went back to the system
    return (AnnotatedRun if data.sheets else Run)(args, device, data, detector)
