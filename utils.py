"""What both scripts share: arguments, seeds, errors, and the run with its files."""

import argparse
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import signal
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import datasets
import models
from datasets import DATASETS, OpenSetData, augment, open_set
from datasets.files import Journal, UserError, claim, load_checkpoint, tell, versions, write_whole
from datasets.page import next_step, write_page
from datasets.sheets import table, write_sheet
from models import parallel
from query_strategies import STRATEGIES, PoolOutputs, select

# ---- arguments ----------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Errors are one line on stderr and exit status 2, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message}\n" if parallel.local_rank() == 0 else None)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """argparse type: a number of at least `low` (`above`: more than it) and less than `high`."""

    def convert(text: str) -> float:
        value = kind(text)
        if not low <= value < high or (above and value == low):
            bounds = f"{'above' if above else 'from'} {low:g} and below {high:.10g}"
            raise ArgumentTypeError(f"{text} is not {bounds}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where `kind` raises ValueError
    return convert


def folder(text: str) -> str:
    """argparse type: a path, with the home folder instead of a leading `~`."""
    try:
        return str(Path(text).expanduser())
    except RuntimeError as error:
        raise ArgumentTypeError(f"{error} Give the whole path.") from None


COUNT, SIZE = number(int, 1, 2**31), number(int, 0, 2**31)
POSITIVE, WEIGHT = number(float, 0, above=True), number(float, 0)
PERCENT, RATE = number(float, 0, 100, above=True), number(float, 0, 1, above=True)
TEMPERATURE = number(float, 1e-30, 1e30)  # float32 goes a little further


def parse_arguments(description: str, detector: bool) -> Namespace:
    """The command line of either script; `detector` adds LfOSA's temperatures and its strategy.

    `settings` holds the arguments that lead away from the published setting, as they show in the
    run's name.
    """
    early = Parser(add_help=False, allow_abbrev=False)
    early.add_argument("--dataset", choices=DATASETS, default="digits")
    dataset = early.parse_known_args()[0].dataset
    parser = Parser(
        usage="%(prog)s [--dataset NAME] [--query-strategy NAME] [--seed N] [--resume] ...",
        description=description,
        epilog=f"The defaults are those of {dataset}; --dataset cifar100 --help shows others.",
        allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32),
    )

    def add(group, flag: str, kind: object, default: object, metavar: str, text: str = "") -> None:
        """kind: an argparse type or a list of names. The data set may replace `default`."""
        default = DATASETS[dataset].defaults.get(flag[2:].replace("-", "_"), default)
        more = {"type": kind}
        if isinstance(kind, list):
            more, text = {"choices": kind}, text + ", ".join(kind)
        text += "" if default is None else " (default: %(default)s)"
        group.add_argument(flag, default=default, metavar=metavar, help=text, **more)

    def switch(group, flag: str, text: str) -> None:
        group.add_argument(flag, action="store_true", help=text)

    strategies = [*STRATEGIES]
    if not detector:
        strategies = [x for x in STRATEGIES if not getattr(STRATEGIES[x], "NEEDS_DETECTOR", False)]
    first = "AV_temperature" if detector else "uncertainty"
    group = parser.add_argument_group("experiment")
    add(group, "--dataset", [*DATASETS], dataset, "NAME")
    add(group, "--data-dir", folder, "~/data", "DIR", "folder of the data sets")
    add(group, "--query-strategy", strategies, first, "NAME")
    add(group, "--known-class", COUNT, None, "K", "number of known classes")
    add(group, "--init-percent", PERCENT, None, "P", "percent of known images labeled at first")
    add(group, "--query-batch", COUNT, None, "N", "images queried per round")
    add(group, "--max-query", COUNT, 10, "N", "rounds")
    add(group, "--seed", SIZE, 1, "N", "seed of every random draw")
    which = group.add_mutually_exclusive_group()
    add(which, "--class-seed", SIZE, None, "N", "shuffle the classes; the first K are known")
    listed = partial(str.split, sep=",")
    add(which, "--known", listed, None, "A,B", "names of the known classes instead")
    add(group, "--image-size", COUNT, None, "N", "pixels, height and width of a folder's images")
    switch(group, "--drop-unknown", "queried unknown images leave the pool, as in later papers")
    switch(group, "--augment-pool", "query through the training augmentation, as released")
    group = parser.add_argument_group("network and training")
    add(group, "--model", [*models.NETWORKS], None, "NAME")
    add(group, "--feat-dim", SIZE, None, "F", "features before the last layer; 0: plain ResNet")
    add(group, "--max-epoch", SIZE, None, "N", "epochs of training per round and network")
    add(group, "--batch-size", COUNT, None, "N", "images per training step")
    add(group, "--lr-model", POSITIVE, None, "LR", "learning rate of the networks")
    add(group, "--stepsize", COUNT, 20, "N", "epochs between decays of the learning rate")
    add(group, "--gamma", POSITIVE, 0.5, "X", "factor of each decay")
    add(group, "--weight-cent", WEIGHT, 0.0, "X", "weight of the center loss")
    add(group, "--lr-cent", POSITIVE, 0.5, "LR", "learning rate of the centers")
    add(group, "--dropout", RATE, 0.5, "P", "on the pooled vector, only for BALD")
    add(group, "--mc-samples", COUNT, 20, "N", "dropout masks that BALD averages over")
    if detector:
        group = parser.add_argument_group("LfOSA: temperatures in training")
        add(group, "--known-T", TEMPERATURE, 0.5, "T", "of the detector's labeled images")
        add(group, "--unknown-T", TEMPERATURE, 0.5, "T", "of the detector's invalid images")
        add(group, "--modelB-T", TEMPERATURE, 1.0, "T", "of the classifier")
    group = parser.add_argument_group("machine")
    add(group, "--gpu", SIZE, 0, "N", "CUDA device; under torchrun that of the first process")
    switch(group, "--use-cpu", "even where there is a GPU")
    add(group, "--eval-batch-size", COUNT, 256, "N", "images per step without training")
    add(group, "--amp", [*models.AMP], "off", "TYPE", "mixed precision: ")
    switch(group, "--compile", "compile the networks with torch.compile")
    switch(group, "--deterministic", "only deterministic kernels on CUDA")
    group = parser.add_argument_group("files")
    add(group, "--save-dir", folder, "log_AL", "DIR", "folder of logs and checkpoints")
    switch(group, "--save-model", "keep the last round's networks in NAME.model.pt")
    switch(group, "--no-tensorboard", "write no TensorBoard files")
    add(group, "--checkpoint-seconds", WEIGHT, 60, "S", "seconds between checkpoints in training")
    either = group.add_mutually_exclusive_group()
    switch(either, "--resume", "go on from the checkpoint, if there is one")
    switch(either, "--overwrite", "replace the files of an earlier run")
    args = parser.parse_args()
    args.settings = _settings(args, parser)
    return args


def _settings(args: Namespace, parser: Parser) -> str:
    """Flags that change the experiment and are not in the published name: '__flag-value_...'."""
    keys = ["class_seed", "max_epoch", "feat_dim", "batch_size", "lr_model", "stepsize", "gamma"]
    keys += ["weight_cent", "drop_unknown", "augment_pool", "amp", "known", "image_size"]
    if args.weight_cent > 0:
        keys.append("lr_cent")
    if "mc_logits" in STRATEGIES[args.query_strategy].READS:
        keys += ["dropout", "mc_samples"]
    parts = []
    for key in keys:
        if (value := getattr(args, key)) != parser.get_default(key):
            parts.append(key.replace("_", "-") + ("" if value is True else _show(value)))
    return "__" + "_".join(parts) if parts else ""


def _show(value: object) -> str:
    if isinstance(value, list):
        return re.sub(r"[^a-zA-Z0-9.,+-]", "-", ",".join(value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def run_name(args: Namespace, data: OpenSetData) -> str:
    """The published name of a run's log, without '.pkl', and `settings` at its end.

    An annotator's name leaves out K, init and batch, because they change between rounds.
    """
    start = f"_known{args.known_class}_init{_show(args.init_percent)}_batch{args.query_batch}"
    start = "" if data.sheets else start
    name = f"{args.model}_{data.name}{start}_seed{args.seed}_{args.query_strategy}"
    if hasattr(args, "known_T"):
        name = f"temperature_{name}_unknown_T{args.unknown_T}_known_T{args.known_T}"
        name += f"_modelB_T{args.modelB_T}"
    return name + args.settings


# ---- seeds and errors -----------------------------------------------------------------------


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose of its draws alone.

    So no draw depends on what else was drawn before it: a resumed run, or one with another
    strategy, sees the same numbers.
    """
    key = "/".join(map(str, (seed, *purpose)))
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; turn what the user can mend into one line and exit status 2.

    After a stop by a signal the exit status is 128 plus its number. A bug ends in a traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started the script
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once and without a traceback
    status, error = 0, None
    try:
        main()
    except parallel.Stopped as stop:
        status = 128 + stop.args[0]
        words = [word for word in sys.argv if word not in ("--resume", "--overwrite")]
        command = shlex.join([sys.executable, *words, "--resume"])
        same = "the same torchrun line and --resume"
        tell(f"stopped; go on with: {same if parallel.launched() else command}")
    except UserError as raised:
        status, error = 2, raised
    except (MemoryError, RuntimeError) as raised:
        if isinstance(raised, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPU" in str(raised):
            status, error = 2, "out of memory: lower --batch-size or --eval-batch-size"
        elif type(raised).__module__.startswith(("torch._dynamo", "torch._inductor")):
            status, error = 2, f"--compile does not work here, leave it out ({raised})"
        elif parallel.world() > 1 and parallel.lost(raised):
            status = 1
            tell("another process has ended")  # torchrun tells which
        else:
            raise
    if error:
        print(f"{sys.argv[0]}: error: {' '.join(str(error).split())}", file=sys.stderr)
    if dist.is_initialized() and status == 0:
        dist.destroy_process_group()
    sys.exit(status)


# ---- the run ------------------------------------------------------------------------------------

FORMAT = 3  # of the checkpoint; version 1 had other rules for ties and repeated queries
STATE = ("experiment", "answers", "round", "log", "queries", "networks")
# Arguments that change the last bits of a result, and that a run's name does not tell.
ROUNDING = ("eval_batch_size", "compile", "deterministic")
SIMULATION = {"--init-percent", "--known-class", "--max-query", "--drop-unknown"}
SIMULATION |= {"--known", "--class-seed"}
COLUMNS = ("round", *open_set.Split._fields, "accuracy", "precision", "recall", "seconds")


def start(description: str, detector: bool) -> "Run":
    """Parse the command line, read the data, and begin a run or go on from its checkpoint."""
    args = parse_arguments(description, detector)
    device = parallel.setup_device(args)
    which = args.known_class, args.class_seed, args.known, args.image_size
    data = datasets.create(args.dataset, Path(args.data_dir), device, *which)
    parallel.keep_memory(device)  # after the reading: its temporary copies went back to the system
    return Run(args, device, data)


class Run:
    """A run of one of the two scripts: rounds, networks, measures, and the files NAME.*.

    Under torchrun rank 0 alone has files. Raises UserError if another process has the run, if
    its checkpoint cannot be used, or if the save-dir cannot be written.
    """

    def __init__(self, args: Namespace, device: torch.device, data: OpenSetData) -> None:
        self.args, self.device, self.data = args, device, data
        self.reads = STRATEGIES[args.query_strategy].READS
        self.prediction = {key: vars(args)[key] for key in ("eval_batch_size", "amp", "compile")}
        if data.sheets is None:
            draws = generator(args.seed, "split")
            self.split = open_set.initial_split(data.known, args.init_percent, draws)
        else:
            given = {word.partition("=")[0] for word in sys.argv}
            if useless := given & SIMULATION:
                raise UserError(f"{min(useless)} is not for use with labels.csv: the sheets decide")
            self.split, args.resume = data.split, not args.overwrite
        args.known_class = data.num_known
        batch = 50 if data.sheets else max(1, len(self.split.pool) // 20)
        args.query_batch = args.query_batch or batch
        self.round = 0  # rounds done
        self.log: dict[str, dict] = {"Acc": {}, "Err": {}, "Precision": {}, "Recall": {}}
        self.queries: list[Tensor] = []  # per round, indices into the training images
        self.networks: dict[str, dict] = {}  # of this round: name -> state, see models.train
        self.saved = time.monotonic()
        self.path = Path(args.save_dir) / run_name(args, data)
        self.experiment = {"format": FORMAT, "name": self.path.name, "data": data.identity}
        self.experiment |= {key: vars(args)[key] for key in ROUNDING}
        self.experiment |= {"GPU": device.type == "cuda", "processes": parallel.world()}
        self.answers = data.answers
        self.journal: Journal | None = None
        if state := parallel.from_rank0(self._open):
            self.split = open_set.Split(*state["split"])
            for key in STATE:
                setattr(self, key, state[key])
        if data.sheets:
            self._take_answers()
        if parallel.rank() == 0:
            self._begin()

    def rounds(self) -> Iterator[open_set.Split]:
        """Yield who is labeled, invalid and in the pool, as long as there is a round to do."""
        sheets, last = self.data.sheets, self.args.max_query
        if sheets:  # one round, and then it is the person's turn
            answered = not sheets.queries or any(sheets.queries[-1].values())
            last = self.round + answered
        while self.round < last and len(self.split.pool):
            self.began = time.monotonic()
            yield self.split
        if sheets and len(self.split.pool):
            self.say(next_step(Path(self.data.identity, f"query_{self.round}.csv")))
            return
        why = "" if len(self.split.pool) else " (the pool is empty)"
        self.say(f"finished after {self.round} rounds{why}: {self.path}.pkl")
        self.say(f"draw it with: python plot.py --log-dir {shlex.quote(str(self.path.parent))}")

    def train(
        self, name: str, outputs: int, indices: Tensor, temperature: Sequence[float] | None = None
    ) -> models.ResNet:
        """A network of this round, trained on the images `indices`; see models.train.

        name: "detector" or "classifier". The detector is queried; without one, the classifier. A
        network in the checkpoint is not trained again. Raises parallel.Stopped after a signal.
        """
        args = self.args
        queried = name == "detector" or not hasattr(args, "known_T")
        dropout = args.dropout if queried and "mc_logits" in self.reads else 0.0
        draws = self.generator(name, "init")
        network = models.create(args.model, outputs, args.feat_dim, draws, self.device, dropout)
        if name == "detector" and not self.reads:
            return network  # nobody reads it: the strategy is random

        def keep(state: dict) -> None:
            self.networks[name] = state
            self.save()
            if parallel.any_rank(bool(signals)):  # asked last: one may come during the writing
                raise parallel.Stopped(*signals, signal.SIGTERM)  # another rank's, if not ours

        def after_epoch(epoch: int, loss: float, snapshot: Callable[[], dict]) -> None:
            self.record(f"loss/{name}", loss, self.round * args.max_epoch + epoch)
            due = time.monotonic() - self.saved >= args.checkpoint_seconds
            if epoch < args.max_epoch and parallel.any_rank(due or bool(signals)):
                keep(snapshot())

        keys = "max_epoch batch_size lr_model stepsize gamma weight_cent lr_cent amp compile"
        settings = {key: getattr(args, key) for key in keys.split()}
        settings |= {"temperature": temperature, "num_centers": self.data.num_known}
        settings["state"] = self.networks.get(name)
        images = self.data.train, self.data.targets, indices
        with parallel.noted_signals() as signals:
            draws = partial(self.generator, name)
            models.train(network, *images, draws, after_epoch=after_epoch, **settings)
            keep({"epoch": args.max_epoch, "network": network.state_dict()})
        return network

    def evaluate(self, network: models.ResNet) -> float:
        """Accuracy on the test images of the known classes, in percent; NaN if there are none."""
        return models.evaluate(network, self.data.test, self.data.test_targets, **self.prediction)

    def predict(self, network: models.ResNet, split: open_set.Split) -> PoolOutputs:
        """What the strategy reads: of the pool, and of the labeled images."""
        args, data, outputs = self.args, self.data, {}
        masks = parameters = None
        if "mc_logits" in self.reads:
            masks = models.dropout_masks(network, args.mc_samples, self.generator("dropout"))
        if args.augment_pool and self.reads:
            draws = self.generator("augment-pool")
            parameters = augment.draw(data.train, len(split.pool), draws)
        for prefix, indices in (("", split.pool), ("labeled_", split.labeled)):
            fields = ("features", "logits", "mc_logits")
            fields = [field for field in fields if prefix + field in self.reads]
            if fields:
                more = {"masks": masks, "parameters": None if prefix else parameters}
                more |= self.prediction
                found = models.predict(network, data.train, indices, fields, **more)
                outputs |= {prefix + field: tensor for field, tensor in found.items()}
        if "labeled_targets" in self.reads:
            outputs["labeled_targets"] = data.targets[split.labeled.to(self.device)]
        return PoolOutputs(len(split.pool), data.num_known, **outputs)

    def select(self, outputs: PoolOutputs) -> Tensor:
        """Positions in the pool that the strategy queries, (n,) int64 on the CPU, best first."""
        name = self.args.query_strategy
        draws = self.generator("query", name)
        return parallel.from_rank0(lambda: select(name, outputs, self.args.query_batch, draws))

    def end_round(self, accuracy: float, queried: Tensor) -> None:
        """Measure the round, let the oracle answer for `queried`, and write the round's files.

        accuracy: in percent. queried: indices into the training images, in order of the query.
        """
        data, split, done = self.data, self.split, self.round
        measures = {"Acc": accuracy, "Err": 100 - accuracy} if len(data.test_targets) else {}
        if data.sheets is None:
            measures["Precision"] = open_set.precision(queried, data.known)
            measures["Recall"] = open_set.recall(split, queried, data.known)
        for name, value in measures.items():
            self.log[name][done] = value
            self.record(name, value, done)
        cells = [f"{len(indices):,}" for indices in split]
        for name, form in (("Acc", ".2f"), ("Precision", ".3f"), ("Recall", ".3f")):
            value = self.log[name].get(done)
            if data.sheets and name == "Precision":  # of the newest answers
                value = self.log[name].get(done - 1)
            cells.append("-" if value is None else format(value, form))
        self.say(done, *cells, f"{time.monotonic() - self.began:.1f}")
        self.queries = [*self.queries[:done], queried]
        if self.args.save_model and parallel.rank() == 0:
            content = {"arguments": vars(self.args), "classes": list(data.classes)}
            dataset = DATASETS[self.args.dataset]
            content |= {"mean": dataset.mean, "std": dataset.std}
            content |= {name: state["network"] for name, state in self.networks.items()}
            write_whole(f"{self.path}.model.pt", partial(torch.save, content))
        if data.sheets is None:
            self.split = open_set.update(split, queried, data.known, self.args.drop_unknown)
            self.round, self.networks = done + 1, {}
        self.save()  # last: a run killed before this prints the round again, but loses nothing
        if data.sheets:
            self._ask(queried)
            self.round += 1

    def _take_answers(self) -> None:
        """Begin the round after the annotator's newest query sheet, or go on with it."""
        sheets, self.split = self.data.sheets, self.data.split
        done, answers = len(sheets.queries), self.data.answers
        if (self.round, self.answers) != (done, answers):
            if self.round == done and self.networks and parallel.rank() == 0:
                tell("answers or images changed after this round began: it starts again")
            self.round, self.answers, self.networks = done, answers, {}
        self.log["Precision"] = sheets.precisions()

    def _ask(self, queried: Tensor) -> None:
        """Write what the classifier predicts of the pool, and the sheet for the annotator."""
        data, pool = self.data, self.split.pool
        classifier = self.train("classifier", data.num_known, self.split.labeled)  # trained before
        logits = models.predict(classifier, data.train, pool, **self.prediction)["logits"]
        if parallel.rank() > 0:
            return
        per_class = torch.bincount(data.targets[self.split.labeled.to(self.device)]).tolist()
        counts = (f"{name} {count}" for name, count in zip(data.classes, per_class, strict=False))
        self.say(f"labeled: {', '.join(counts)}")
        probability, label = logits.double().softmax(1).max(1)
        found = zip(pool.tolist(), label.tolist(), probability.tolist(), strict=True)
        rows = {i: (data.names[i], data.classes[label], p) for i, label, p in found}
        write_sheet(f"{self.path}_predictions.csv", "file class probability", rows.values())
        sheet = Path(data.identity, f"query_{self.round + 1}.csv")
        columns, asked = "file predicted probability label", [rows[i] for i in queried.tolist()]
        write_page(sheet, table(columns, asked), [file for file, *_ in asked], data.classes)
        write_sheet(sheet, columns, asked)  # the last act

    def generator(self, *purpose: object) -> torch.Generator:
        """The generator of this round's draws for a purpose."""
        return generator(self.args.seed, self.round, *purpose)

    # The files NAME.*: .pt (checkpoint), .pkl (log), .queries.json, .model.pt, .log (text)

    def _open(self) -> dict | None:
        """Claim the files NAME.*; return the state in the checkpoint to go on from, if any."""
        with torch.device("meta"):  # sizes without the memory
            network = models.ResNet(self.args.model, self.data.num_known + 1, self.args.feat_dim)
        # Bytes per parameter: 12 for the detector, the classifier and the momentum, twice, because
        # the old checkpoint stays until the new one is complete; 8 for NAME.model.pt.
        need = 2 * 12 + 8 * self.args.save_model
        need *= sum(parameter.numel() for parameter in network.parameters())
        self.lock, there = claim(self.path, self.args.resume, self.args.overwrite, need)
        return load_checkpoint(there, self.experiment) if there else None

    def _begin(self) -> None:
        """Write the first checkpoint, open NAME.log and TensorBoard's file, print what will run."""
        args, data, path = self.args, self.data, self.path
        self.save()
        if args.overwrite:
            Path(f"{path}.model.pt").unlink(missing_ok=True)
        self.journal = Journal(path, not args.no_tensorboard, args.overwrite)
        cuda = self.device.type == "cuda"
        where = torch.cuda.get_device_name(self.device) if cuda else "CPU"
        where += f", {torch.get_num_threads()} threads"
        self.journal.note(f"{vars(args)}, {versions()}, {where}")
        labeled, _, pool = self.split
        unknown = "some" if data.sheets else len(data.classes) - data.num_known
        classes = f"{data.name}: {data.num_known} known and {unknown} unknown classes"
        self.say(f"{classes}, {len(labeled):,} images labeled, {len(pool):,} in the pool")
        features = f"{args.feat_dim or 'plain'} features"
        training = f"{args.query_strategy} on {args.model}, {features}, {args.max_epoch} epochs"
        self.say(f"{training}, {where}")
        self.say(f"{path}.pkl: {self.round} rounds done")
        if data.left_out:
            self.say(f"{len(data.left_out)} images are left out; {path}.log lists them")
        for name, fault in data.left_out.items():
            self.journal.note(f"left out: {name}: {fault}")
        self.say(*COLUMNS)

    def save(self) -> None:
        """Write NAME.pt, then NAME.pkl and NAME.queries.json, which follow from it (rank 0)."""
        self.saved = time.monotonic()
        if parallel.rank() > 0:
            return
        state = {key: getattr(self, key) for key in STATE} | {"split": tuple(self.split)}
        write_whole(f"{self.path}.pt", partial(torch.save, state))
        write_whole(f"{self.path}.pkl", partial(pickle.dump, self.log, protocol=4))
        if self.data.sheets is None:  # the sheets say what was queried
            queries = json.dumps([queried.tolist() for queried in self.queries]).encode()
            write_whole(f"{self.path}.queries.json", lambda file: file.write(queries))

    def say(self, *cells: object) -> None:
        """A line, or a row of cells, for the terminal and NAME.log (rank 0)."""
        line = cells[0] if len(cells) == 1 else "".join(f"{cell:>10}" for cell in cells)
        if self.journal:
            self.journal.note(line)
            tell(line)

    def record(self, name: str, value: float, step: int) -> None:
        """A number for TensorBoard (rank 0)."""
        if self.journal:
            self.journal.record("scalar", name, value, step)
