"""What both scripts share: arguments, device, seeds, and the files of a run."""

import argparse
import contextlib
import ctypes
import difflib
import fcntl
import hashlib
import io
import math
import os
import pickle
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import datasets
import models
from datasets import DATASETS, DataError, OpenSetData, augment, open_set
from datasets.files import sync_folder
from models import parallel
from query_strategies import STRATEGIES, needs_detector, select


class UserError(Exception):
    """Something the user can mend; one line that says how."""


# ---------------------------------------------------------------------------------------------
# Arguments


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2; a mistyped flag is told its neighbour."""

    def error(self, message: str) -> None:
        if "unrecognized arguments" in message:
            flags = list(self._option_string_actions)
            typed = [word for word in message.split() if word.startswith("-")]
            near = [difflib.get_close_matches(word, flags, 1) for word in typed]
            hints = [match[0] for match in near if match]
            message += f" (did you mean {' '.join(hints)}?)" if hints else ""
        told = parallel.local_rank() == 0  # all processes of torchrun find the same error
        self.exit(2, f"{self.prog}: error: {_one_line(message)}\n" if told else None)


def _one_line(message: object) -> str:
    return " ".join(str(message).splitlines())


def integer(low: int) -> Callable[[str], int]:
    """argparse type: an integer of at least `low`, and small enough for what is counted with it."""

    def convert(text: str) -> int:
        with contextlib.suppress(ValueError):
            if low <= int(text) < 2**31:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {2**31 - 1}")

    return convert


def number(low: float, high: float = math.inf, low_included: bool = False) -> Callable:
    """argparse type: a finite number above `low` (or at it) and below `high`."""

    def convert(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if low < value < high or (low_included and value == low):
                return value
        bounds = f"{'of at least' if low_included else 'above'} {low:g}"
        bounds += f" and below {high:g}" if high < math.inf else ""
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {bounds}")

    return convert


def one_of(names: list[str]) -> Callable[[str], str]:
    """argparse type: one of `names`, in any case; says the nearest ones otherwise."""
    by_lower = {name.lower(): name for name in names}

    def convert(text: str) -> str:
        if text.lower() in by_lower:
            return by_lower[text.lower()]
        near = difflib.get_close_matches(text.lower(), by_lower, 2, 0.4)
        hint = f"did you mean {' or '.join(by_lower[n] for n in near)}? " if near else ""
        raise argparse.ArgumentTypeError(
            f"{text!r} is unknown: {hint}choose from {', '.join(names)}"
        )

    return convert


TEMPERATURES = 1e-30, 1e30  # float32 goes a little further

# The end of both scripts' --help; tests/test_distributed.py runs it.
GRID = """\
one run on several GPUs: each takes its share of every batch, so --batch-size and schedule stay
  torchrun --standalone --nproc-per-node=4 --max-restarts=3 AL_center_temperature.py --resume
on several machines: the same line on each, HOST being one of them
  torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\
    --max-restarts=3 AL_center_temperature.py --resume

many runs, one process each, as a Slurm array: sbatch grid.sh (preempted, a run is requeued)
  #!/bin/bash
  #SBATCH --array=0-71 --requeue --gres=gpu:1 --cpus-per-task=4
  seeds=(1 2 3 4)
  strategies=(AV_temperature AV_based uncertainty random KMeans BALD)
  ratios=(20 30 40)  # known classes
  i=$SLURM_ARRAY_TASK_ID
  seed=${seeds[i % ${#seeds[@]}]}
  strategy=${strategies[i / ${#seeds[@]} % ${#strategies[@]}]}
  ratio=${ratios[i / ${#seeds[@]} / ${#strategies[@]}]}
  script=AL_center.py
  [ $strategy = AV_temperature ] && script=AL_center_temperature.py
  exec python $script --dataset cifar100 --known-class $ratio --query-strategy $strategy \\
    --seed $seed --resume
the same runs without Slurm, four at a time
  seq 0 71 | xargs -P 4 -I{} env SLURM_ARRAY_TASK_ID={} bash grid.sh
"""


def parse_arguments(description: str, detector: bool) -> argparse.Namespace:
    """The command line of either script; `detector` adds LfOSA's temperatures and its strategy.

    Arguments whose default depends on the data set are filled in; `settings` holds those that
    lead away from the published setting, as they show in the run's name.
    """
    parser = Parser(
        description=description,
        epilog=GRID,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument

    def per_dataset(flag: str, kind: Callable, text: str) -> None:
        key = flag[2:].replace("-", "_")
        values = ", ".join(f"{name} {d.defaults[key]}" for name, d in DATASETS.items())
        add(flag, type=kind, help=f"{text} (default: {values})")

    strategies = [name for name in STRATEGIES if detector or not needs_detector(name)]

    def strategy(text: str) -> str:
        if not detector and any(
            text.lower() == s.lower() for s in set(STRATEGIES) - set(strategies)
        ):
            raise argparse.ArgumentTypeError(
                f"{text!r} needs the detector: run AL_center_temperature.py instead"
            )
        return one_of(strategies)(text)

    add("--dataset", type=one_of(list(DATASETS)), default="digits", help=f"{', '.join(DATASETS)}")
    add("--data-dir", default="~/data", help="folder of the data sets")
    default = "AV_temperature" if detector else "uncertainty"
    add("--query-strategy", type=strategy, default=default, help=", ".join(strategies))
    per_dataset("--known-class", integer(1), "number K of known classes")
    percent = number(0, 100)
    per_dataset("--init-percent", percent, "percent of the known images labeled at the start")
    per_dataset("--query-batch", integer(1), "images queried per round")
    add("--max-query", type=integer(1), default=10, help="rounds")
    add("--seed", type=integer(0), default=1, help="of every random draw")
    class_seed = "shuffle the classes with it before the first K are taken as known"
    add("--class-seed", type=integer(0), help=f"{class_seed} (default: data set's order)")
    per_dataset("--model", one_of(list(models.NETWORKS)), ", ".join(models.NETWORKS))
    per_dataset("--feat-dim", integer(0), "features before the last layer; 0: the pooled vector")
    per_dataset("--max-epoch", integer(0), "epochs of training per round and network")
    per_dataset("--batch-size", integer(1), "images per training step")
    per_dataset("--lr-model", number(0), "learning rate of the networks")
    add("--stepsize", type=integer(1), default=20, help="epochs between decays of --lr-model")
    add("--gamma", type=number(0), default=0.5, help="factor of each decay")
    add("--weight-cent", type=number(0, low_included=True), default=0.0, help="of the center loss")
    add("--lr-cent", type=number(0), default=0.5, help="learning rate of the centers")
    if detector:
        text = "temperature of the {} in training"
        for flag, what in (
            ("--known-T", "detector's labeled images"),
            ("--unknown-T", "detector's invalid images"),
        ):
            add(flag, type=number(*TEMPERATURES), default=0.5, help=text.format(what))
        add("--modelB-T", type=number(*TEMPERATURES), default=1.0, help=text.format("classifier"))
    add("--dropout", type=number(0, 1), default=0.5, help="on the pooled vector, only for BALD")
    add("--mc-samples", type=integer(1), default=20, help="dropout masks that BALD averages over")
    drop = "queried unknown images leave the pool instead of staying in it, as in later papers"
    add("--drop-unknown", action="store_true", help=drop)
    pool = "score the pool through the training augmentation, as the released code did"
    add("--augment-pool", action="store_true", help=pool)
    add("--gpu", default="0", help="CUDA device, or one per process under torchrun: 0,1")
    add("--use-cpu", action="store_true", help="even where there is a GPU")
    add("--eval-batch-size", type=integer(1), default=256, help="images per evaluation step")
    add("--compile", action="store_true", help="compile training and scoring with torch.compile")
    amp = "mixed precision: bf16, fp16 or off"
    add("--amp", type=one_of(["off", "bf16", "fp16"]), default="off", help=amp)
    add("--deterministic", action="store_true", help="only deterministic kernels on CUDA")
    add("--save-dir", default="log_AL", help="folder of logs, checkpoints and TensorBoard files")
    add("--no-tensorboard", action="store_true", help="write no TensorBoard files")
    every = "epochs between checkpoints within a round"
    add("--checkpoint-epochs", type=integer(1), default=10, help=every)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on from the checkpoint, if any")
    either.add_argument("--overwrite", action="store_true", help="replace an earlier run's files")
    for action in parser._actions:  # every default is told, once
        told = "default" in action.help or action.default is argparse.SUPPRESS
        if not told and action.default is not None and action.default is not False:
            action.help += " (default: %(default)s)"

    args = parser.parse_args()
    defaults = vars(parser.parse_args([])) | DATASETS[args.dataset].defaults
    for key, value in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.settings = _settings(args, defaults)
    return args


def _settings(args: argparse.Namespace, defaults: dict) -> str:
    """Flags that change the experiment and are not in the published name: '__flag-value_...'."""
    keys = ["class_seed", "max_epoch", "feat_dim", "batch_size", "lr_model", "stepsize", "gamma"]
    keys += ["weight_cent", "drop_unknown", "augment_pool", "amp"]
    if args.weight_cent > 0:
        keys.append("lr_cent")
    if "mc_logits" in STRATEGIES[args.query_strategy].READS:
        keys += ["dropout", "mc_samples"]
    changed = [key for key in keys if getattr(args, key) != defaults[key]]
    parts = []
    for key in changed:
        value = getattr(args, key)
        parts.append(key.replace("_", "-") + ("" if value is True else _show(value)))
    return "__" + "_".join(parts) if parts else ""


def _show(value: object) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def run_name(args: argparse.Namespace) -> str:
    """The published name of a run's log, without '.pkl', and `settings` at its end."""
    name = f"{args.model}_{args.dataset}_known{args.known_class}_init{_show(args.init_percent)}"
    name += f"_batch{args.query_batch}_seed{args.seed}_{args.query_strategy}"
    if hasattr(args, "known_T"):
        name = f"temperature_{name}_unknown_T{args.unknown_T}_known_T{args.known_T}"
        name += f"_modelB_T{args.modelB_T}"
    return name + args.settings


# ---------------------------------------------------------------------------------------------
# Device and seeds


def setup_device(args: argparse.Namespace) -> torch.device:
    """The device to use; under torchrun this process joins the others first.

    Raises UserError where --gpu names no device there is, or too few for the processes, and
    where an argument does not go with torchrun.
    """
    cuda = torch.cuda.is_available() and not args.use_cpu
    local_rank = parallel.local_rank()
    local_world = int(os.environ["LOCAL_WORLD_SIZE"]) if parallel.launched() else 1
    try:
        ids = [integer(0)(text) for text in args.gpu.split(",")]
    except argparse.ArgumentTypeError:
        raise UserError(f"--gpu {args.gpu}: give the number of a device, such as 0") from None
    if len(ids) > 1 and local_world == 1:
        command = ["torchrun", "--standalone", f"--nproc-per-node={len(ids)}", *sys.argv]
        raise UserError(f"--gpu {args.gpu} needs one process per device: {shlex.join(command)}")
    if ids == [0]:  # the default
        ids = list(range(local_world))
    if len(set(ids)) != local_world:
        raise UserError(f"--gpu {args.gpu}: {local_world} processes need as many devices")
    if cuda and max(ids) >= torch.cuda.device_count():
        raise UserError(
            f"--gpu {args.gpu}: there is no device {max(ids)}, only 0 to "
            f"{torch.cuda.device_count() - 1}"
        )
    if cuda:
        torch.cuda.set_device(ids[local_rank])
    if parallel.launched():
        if args.compile:
            raise UserError("--compile is for one process: leave it out under torchrun")
        if not dist.is_initialized():
            parallel.join(cuda)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    if cuda:
        return torch.device("cuda", ids[local_rank])
    if not args.use_cpu and parallel.rank() == 0:
        print("no CUDA device: using the CPU")
    keep_memory()
    return torch.device("cpu")


def keep_memory() -> None:
    """Have the C library keep what is freed for the next step, as PyTorch does on CUDA.

    glibc hands every block above 32 MiB back to the kernel, which clears it page by page when it is
    asked for again: of the published batch, most activations and gradients, in every step.
    """
    with contextlib.suppress(AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX of malloc.h: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nor does the heap shrink


def load(args: argparse.Namespace, device: torch.device) -> OpenSetData:
    """Read the data set; on each machine one process before the others, for it may download."""
    return parallel.one_first(
        lambda: datasets.create(
            args.dataset, args.data_dir, args.known_class, args.class_seed, device
        )
    )


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose of its draws alone.

    So no draw depends on what else was drawn before it: a resumed run, or one with another
    strategy, sees the same numbers.
    """
    key = "/".join(map(str, (seed, *purpose)))
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ---------------------------------------------------------------------------------------------
# Stopping: SIGTERM and Ctrl-C


class Stopped(BaseException):
    """The run was asked to stop, and what it can be resumed from is on the disk."""


_stop = {"signal": 0, "waits": False}  # waits: what is under way is finished first, see `whole`


def _on_signal(number: int, frame: object) -> None:
    # A second one ends the process at once. Not under torchrun: it passes on what a scheduler has
    # sent to all processes already, and kills in the end.
    signal.signal(number, signal.SIG_IGN if _torchrun() else signal.SIG_DFL)
    if not _stop["signal"]:  # or it is stopping already
        _stop["signal"] = number
        if not _stop["waits"]:
            raise Stopped


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """A signal that arrives inside takes effect at the end: no step and no write is cut in two."""
    outer, _stop["waits"] = _stop["waits"], True
    try:
        yield
    finally:
        _stop["waits"] = outer
    if _stop["signal"] and not outer:
        raise Stopped


def _torchrun() -> list[str]:
    """The torchrun command line up to the script that started this process; empty without it."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" not in env:
        return []
    nodes = int(env["GROUP_WORLD_SIZE"])
    where = [f"--nnodes={nodes}", "--rdzv-backend=c10d", "--rdzv-endpoint=HOST:PORT"]
    command = ["torchrun", *(where if nodes > 1 else ["--standalone"])]
    command.append(f"--nproc-per-node={env['LOCAL_WORLD_SIZE']}")
    restarts = int(env["TORCHELASTIC_MAX_RESTARTS"])
    return command + ([f"--max-restarts={restarts}"] if restarts else [])


def run_script(main: Callable[[], None]) -> None:
    """Run `main` and turn what can go wrong into one line and an exit status.

    2: something the user can mend. 130, 143: stopped by Ctrl-C, SIGTERM; resumable. 1: another
    process of this run has ended.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    script, status = os.path.basename(sys.argv[0]), 0

    def tell(error: object) -> None:
        who = f"rank {parallel.rank()}: " if parallel.rank() else ""
        print(f"{script}: error: {who}{_one_line(error)}", file=sys.stderr, flush=True)

    try:
        try:
            main()
        finally:
            _stop["waits"] = True  # little is left to do: a signal is only noted
    except parallel.Elsewhere:  # the rank that failed tells why
        status = 2
    except (UserError, DataError, models.Diverged, models.Misfit, OSError) as error:
        # Before the ranks have joined, all of a machine fail alike, and in training all of them.
        joined, alike = parallel.world() > 1, (models.Diverged, models.Misfit)
        first = (parallel.rank() if joined else parallel.local_rank()) == 0
        if first or (joined and not isinstance(error, alike)):
            tell(error)
        status = 2
    except Stopped:
        status = 128 + (_stop["signal"] or signal.SIGTERM)  # another rank's, where it is not ours
    except (MemoryError, RuntimeError) as error:
        full = MemoryError, torch.cuda.OutOfMemoryError
        if isinstance(error, full) or "DefaultCPUAllocator" in str(error):
            tell("out of memory: lower --batch-size, --eval-batch-size or --mc-samples")
            status = 2
        elif parallel.lost(error):
            status = 128 + _stop["signal"] if _stop["signal"] else 1
            if status == 1:
                tell(f"another process has ended, --resume goes on ({str(error).splitlines()[0]})")
        elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            tell(f"--compile does not work here, leave it out ({str(error).splitlines()[0]})")
            status = 2
        else:
            raise
    try:
        if status > 128 and parallel.rank() == 0:
            words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
            command = shlex.join([*(_torchrun() or [sys.executable]), *words, "--resume"])
            print(f"stopped; go on with: {command}")
        sys.stdout.flush()
    except OSError:  # "| head", say, has been told: or the interpreter would complain once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if dist.is_initialized() and status == 0:
        dist.destroy_process_group()
    sys.exit(status)


# ---------------------------------------------------------------------------------------------
# The files of a run: NAME.pkl (the log), NAME.log (text), NAME.pt (checkpoint), tb/NAME

# Arguments that may change between a run and its resumption: none changes a result.
FREE = {"gpu", "data_dir", "save_dir", "max_query", "resume", "overwrite", "no_tensorboard"}
FREE |= {"checkpoint_epochs", "use_cpu"}  # the device itself is compared


@dataclass
class Run:
    """A run under way. Only rank 0 has a text file and a TensorBoard writer."""

    args: argparse.Namespace
    device: torch.device
    path: Path  # save-dir/NAME
    state: dict  # what the checkpoint holds: see `_new_state`
    text: io.FileIO | None = None  # NAME.log, which also carries the lock
    events: object = None  # tensorboardX's EventsWriter
    seconds: dict[str, float] = field(default_factory=dict)  # of this round, by phase

    @property
    def split(self) -> open_set.Split:
        """Who is labeled, invalid, in the pool."""
        return open_set.Split(*(self.state[name] for name in open_set.Split._fields))

    def generator(self, *purpose: object) -> torch.Generator:
        """The generator of this round's draws for a purpose."""
        return generator(self.args.seed, self.state["round"], *purpose)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to this round's `phase`."""
        begin = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin


def check_files(args: argparse.Namespace) -> None:
    """Refuse early, and without writing, what `start` would refuse after reading the data.

    Raises UserError where the run's files would be overwritten or cannot be written.
    """
    parallel.from_rank0(lambda: _check_files(args))  # where the files are


def _check_files(args: argparse.Namespace) -> None:
    path = Path(args.save_dir, run_name(args))
    log, checkpoint = f"{path}.pkl", f"{path}.pt"
    there = [file for file in (log, checkpoint) if os.path.exists(file)]
    if there and not (args.resume or args.overwrite):
        raise UserError(f"{there[0]} is there already: add --resume to go on, or --overwrite")
    if there == [log] and args.resume:
        raise UserError(f"{log} is there, but no {checkpoint} to go on from: move it elsewhere")
    parent = Path(args.save_dir).absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise UserError(f"--save-dir {args.save_dir}: cannot write to {parent}")
    with torch.device("meta"):  # sizes without the memory
        network = models.ResNet(args.model, args.known_class + 1, args.feat_dim)
    # Weights and momentum, 4 bytes each, and the old checkpoint stays until the new one is whole.
    need = 2 * 8 * sum(parameter.numel() for parameter in network.parameters())
    need -= os.path.getsize(checkpoint) if checkpoint in there else 0
    disk = shutil.disk_usage(parent)
    if disk.free < need and disk.total:  # some file systems do not tell
        megabytes = f"{need / 1e6:.0f} MB, {disk.free / 1e6:.0f} MB are free"
        raise UserError(f"--save-dir {args.save_dir}: checkpoints need another {megabytes}")


def start(args: argparse.Namespace, device: torch.device, known: Tensor) -> Run:
    """Begin a run, or go on from its checkpoint with --resume.

    known: (N,) bool, whether each training image is of a known class. Raises UserError where
    another process has the run, its checkpoint is of other arguments or damaged, or the save-dir
    cannot be written.
    """
    path = Path(args.save_dir, run_name(args))
    run = Run(args, device, path, {})
    split = open_set.initial_split(known, args.init_percent, generator(args.seed, "split"))

    def begin() -> dict:
        header = _header(args, device, known)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            run.text = io.FileIO(f"{path}.log", "a")
        except OSError as error:
            raise UserError(f"--save-dir {args.save_dir}: {error.strerror}") from None
        try:
            fcntl.flock(run.text, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is running {path.name}") from None
        except OSError as error:
            lacks = f"its file system cannot lock files ({error.strerror})"
            raise UserError(f"--save-dir {args.save_dir}: {lacks}, choose another") from None
        _check_files(args)  # once more: whoever had the lock may just have finished
        if args.resume and os.path.exists(f"{path}.pt"):
            state = _load(path, header, _new_state(split, header))
            for key in ("versions", "commit", "device", "threads"):
                before = state["header"].get(key)
                if before != header[key]:
                    say(run, f"note: {key} was {before}, is {header[key]}")
            return state | {"header": header}
        if args.resume:
            say(run, f"no checkpoint {path}.pt: starting fresh")
        return _new_state(split, header)

    run.state = parallel.from_rank0(begin)
    if run.text:
        if args.overwrite:  # the checkpoint first: it decides what the other files belong to
            save(run)
            run.text.truncate(0)
            shutil.rmtree(path.parent / "tb" / path.name, ignore_errors=True)
        say(run, " ".join(f"{key}={value}" for key, value in run.state["header"].items()))
        if not args.no_tensorboard:
            run.events = _open_events(path.parent / "tb" / path.name)
            _record(run, "text", "arguments", str(run.state["header"]["arguments"]))
        save(run)
        _write_log(run)
    return run


def _header(args: argparse.Namespace, device: torch.device, known: Tensor) -> dict:
    """What a result depends on: arguments, versions, commit, device, who is known."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    commit = ""
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    packages = ("torch", "torchvision", "scikit-learn", "numpy", "scipy")
    return {
        "arguments": {key: value for key, value in vars(args).items() if key != "settings"},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "commit": commit or "unknown",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": parallel.world(),
        "known": hashlib.sha256(known.numpy().tobytes()).hexdigest()[:16],
    }


def _new_state(split: open_set.Split, header: dict) -> dict:
    """The checkpoint of a run that has done nothing yet; plain containers and tensors only."""
    return {
        "header": header,
        "round": 0,  # rounds done
        "log": {"Acc": {}, "Err": {}, "Precision": {}, "Recall": {}},
        **split._asdict(),
        "queried": None,  # of this round, where the query is done before the round's end
        "training": None,  # the network under training, from models.train's snapshot
        "ended": "",  # why no further round is possible
    }


def _load(path: Path, header: dict, fresh: dict) -> dict:
    """The run's checkpoint; UserError where it is damaged or of a different experiment.

    fresh: the state of a new run, which has the same form.
    """
    try:
        with zipfile.ZipFile(f"{path}.pt") as file:  # torch.load compares no checksum
            if damaged := file.testzip():
                raise zipfile.BadZipFile(damaged)
        state = torch.load(f"{path}.pt", map_location="cpu", weights_only=True)
        for key, value in fresh.items():
            if value is not None and type(state[key]) is not type(value):
                raise TypeError(key)
        before = state["header"]
        old, new = before["arguments"], header["arguments"]
        differ = [
            f"--{key.replace('_', '-')} was {old.get(key)}, is {new.get(key)}"
            for key in sorted(old.keys() | new.keys())
            if key not in FREE and old.get(key) != new.get(key)
        ]
        for key in ("device", "processes", "known"):
            either_cpu = "cpu" in (before[key], header[key])  # one GPU may follow another
            if before[key] != header[key] and (key != "device" or either_cpu):
                differ.append(f"{key} was {before[key]}, is {header[key]}")
    except Exception as error:  # whatever a file that is no checkpoint makes torch.load raise
        raise UserError(
            f"the checkpoint {path}.pt is damaged ({type(error).__name__}): "
            "put a good copy there, or start again with --overwrite"
        ) from None
    if differ:
        raise UserError(f"the checkpoint {path}.pt is of another run: {'; '.join(differ)}")
    return state


@whole()
def write_atomically(path: str, content: bytes | memoryview) -> None:
    """Write a file so that at any moment either the old or the new content is there, whole.

    Raises UserError where that is not possible, or not for certain.
    """
    temporary = f"{path}.tmp"
    try:
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        sync_folder(Path(path).absolute().parent)  # the renaming itself must outlive a power cut
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; the last good checkpoint is kept: "
            "make room and go on with --resume"
        ) from None


def save(run: Run) -> None:
    """Write the checkpoint NAME.pt (rank 0 only)."""
    if run.text:
        content = io.BytesIO()
        torch.save(run.state, content)
        write_atomically(f"{run.path}.pt", content.getbuffer())


def _write_log(run: Run) -> None:
    """Write the measures so far to NAME.pkl, in the published format (rank 0 only)."""
    if run.text:
        log = pickle.dumps(run.state["log"], protocol=4)
        write_atomically(f"{run.path}.pkl", log)


def say(run: Run, line: str) -> None:
    """One line to the terminal and to NAME.log (rank 0 only)."""
    if run.text:
        run.text.write(f"{line}\n".encode())
        tqdm.write(line)
        sys.stdout.flush()


def _open_events(folder: Path) -> object:
    """A new TensorBoard file in `folder`, written at once.

    tensorboardX's SummaryWriter leaves the writing to a thread: what waits in its queue is lost
    with the process, and when the thread has died of a full disk, the run waits for it for ever.
    """
    from tensorboardX import event_file_writer, record_writer  # slow to import

    now = SimpleNamespace(open=lambda name: io.FileIO(name.removeprefix("now:"), "w"))
    record_writer.register_writer_factory("now", now)
    folder.mkdir(parents=True, exist_ok=True)
    return event_file_writer.EventsWriter(f"now:{folder}/events", f".{os.getpid()}")


def _record(run: Run, kind: str, name: str, value: object, step: int = 0) -> None:
    """Write a "scalar" or "text" for TensorBoard (rank 0 only)."""
    if run.events:
        from tensorboardX import summary
        from tensorboardX.proto.event_pb2 import Event

        content = getattr(summary, kind)(name, value)
        run.events.write_event(Event(wall_time=time.time(), step=step, summary=content))


# ---------------------------------------------------------------------------------------------
# The parts of a round that both scripts share


def goes_on(run: Run) -> bool:
    """Whether there is another round to do; says so when there is none."""
    state = run.state
    if not state["ended"] and len(state["pool"]) == 0:
        state["ended"] = "the pool is empty"
    if state["ended"] or state["round"] >= run.args.max_query:
        why = f" ({state['ended']})" if state["ended"] else ""
        say(run, f"finished after {state['round']} rounds{why}: {run.path}.pkl")
        return False
    run.seconds.clear()
    return True


def network(run: Run, name: str, num_classes: int, queried: bool) -> models.ResNet:
    """A new network for this round; the queried one has dropout where the strategy needs it."""
    args = run.args
    reads = STRATEGIES[args.query_strategy].READS
    dropout = args.dropout if queried and "mc_logits" in reads else 0.0
    shape = args.model, num_classes, args.feat_dim
    return models.create(*shape, run.generator(name, "init"), run.device, dropout)


def reads_network(args: argparse.Namespace) -> bool:
    """Whether the strategy reads what a network says of the pool: all but random."""
    return bool(STRATEGIES[args.query_strategy].READS)


@contextlib.contextmanager
def training(run: Run, name: str) -> Iterator[dict]:
    """What models.train needs to write checkpoints of the network `name` and to go on from one.

    A signal that arrives inside waits for the end of the training step (under torchrun, where
    all ranks must stop at the same one, for the end of the epoch).
    """
    args, state = run.args, run.state
    earlier = state["training"]

    def pause(epochs: int | None, snapshot: Callable[[], dict]) -> None:
        stopping = bool(_stop["signal"])
        if parallel.world() > 1:
            if epochs is None:
                return
            stopping = parallel.any_rank(stopping)
        due = epochs and (epochs % args.checkpoint_epochs == 0 or epochs == args.max_epoch)
        if (due or stopping) and run.text:
            state["training"] = {"name": name, **snapshot()}
            save(run)
        if stopping:
            raise Stopped

    def report(epochs: int, loss: float) -> None:
        _record(run, "scalar", f"loss/{name}", loss, state["round"] * args.max_epoch + epochs)

    with whole(), run.timed("train"):
        yield {
            "generator": partial(run.generator, name),
            "state": earlier if earlier and earlier["name"] == name else None,
            "pause": pause,
            "report": report,
        }


def query(run: Run, network: models.ResNet, data: OpenSetData) -> Tensor:
    """Score the pool with `network` and select a query batch: indices into the training images.

    Raises Diverged where the network's outputs are not finite.
    """
    args, pool = run.args, run.split.pool
    reads = STRATEGIES[args.query_strategy].READS
    masks = parameters = None
    if "mc_logits" in reads:
        masks = models.dropout_masks(network, args.mc_samples, run.generator("dropout"))
    if args.augment_pool and reads_network(args):
        parameters = augment.draw(data.train, len(pool), run.generator("augment-pool"))
    with run.timed("query"):
        outputs = models.score(network, data.train, pool, args, reads, masks, parameters)
        draws = run.generator("query", args.query_strategy)
        positions = parallel.from_rank0(
            lambda: select(args.query_strategy, outputs, args.query_batch, draws)
        )
    return pool[positions]


def keep_query(run: Run, queried: Tensor) -> None:
    """Remember this round's query and write a checkpoint, so that it need not be made again."""
    run.state.update(queried=queried, training=None)
    save(run)


@whole()
def end_round(run: Run, accuracy: float, queried: Tensor, known: Tensor) -> None:
    """Measure the round, let the oracle answer for `queried`, and write log and checkpoint.

    accuracy: in percent. known: (N,) bool, whether each training image is of a known class.
    """
    state, split, done = run.state, run.split, run.state["round"]
    precision = open_set.precision(queried, known)
    recall = open_set.recall(split, queried, known)
    measures = {"Acc": accuracy, "Err": 100 - accuracy, "Precision": precision, "Recall": recall}
    for measure, value in measures.items():
        state["log"][measure][done] = value
    counts = {name: len(indices) for name, indices in split._asdict().items()}
    state.update(open_set.update(split, queried, known, run.args.drop_unknown)._asdict())
    state.update(round=done + 1, queried=None, training=None)
    seconds = " ".join(f"{phase} {value:.1f}s" for phase, value in run.seconds.items())
    say(
        run,
        f"round {done}  " + " ".join(f"{name} {count}" for name, count in counts.items()) + "  "
        f"accuracy {accuracy:.2f} precision {precision:.3f} recall {recall:.3f}  {seconds}",
    )
    for name, value in ({f"count/{k}": v for k, v in counts.items()} | measures).items():
        _record(run, "scalar", name, value, done)
    save(run)  # last: after a kill in between the round is told a second time, but never lost
    _write_log(run)
