"""A run of one of the two scripts: its rounds, its networks, its measures."""

import hashlib
import shlex
import signal
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import models
from datasets import OpenSetData, open_set
from datasets.files import write_whole
from errors import Stopped, tell
from models import Network, Objective, parallel
from query_strategies import STRATEGIES, PoolOutputs, select

from .files import RunFiles, versions

FORMAT = 5  # of the checkpoint; 1 broke ties in another way, 1 to 3 had no objectives
STATE = ("experiment", "threads", "answers_digest", "round", "log", "queries", "networks")
# Arguments that change the last bits of a result, and that a run's name does not tell.
ROUNDING = ("eval_batch_size", "compile", "deterministic")
COLUMNS = ("round", *open_set.Split._fields, "accuracy", "precision", "recall", "seconds")


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the purpose of its draws alone.

    So no draw depends on what else was drawn before it: a resumed run, or one with another
    strategy, sees the same numbers.
    """
    key = "/".join(map(str, (seed, *purpose)))
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Run:
    """A run with a simulated oracle, which knows all labels; an annotator's is AnnotatedRun.

    detector: whether a detector is trained and queried (LfOSA), or the classifier (baselines).
    Under torchrun rank 0 alone has files. Raises UserError if another process has the run, if
    its checkpoint cannot be used, or if the save-dir cannot be written.
    """

    def __init__(
        self, args: Namespace, device: torch.device, data: OpenSetData, detector: bool
    ) -> None:
        self.args, self.device, self.data, self.detector = args, device, data, detector
        self.strategy = STRATEGIES[args.query_strategy]
        names = vars(models.Settings())
        self.settings = models.Settings(**{name: getattr(args, name) for name in names})
        self.split = data.split  # an annotator's, or None
        if self.split is None:
            draws = generator(args.seed, "split")
            self.split = open_set.initial_split(data.known, args.init_percent, draws)
        args.known_class = data.num_known
        # Of all images, so that runs with other known classes query as many.
        batch = 50 if data.sheets else max(1, len(data.known) // 20)
        args.query_batch = args.query_batch or batch
        self.round = 0  # rounds done
        self.log: dict[str, dict] = {"Acc": {}, "Err": {}, "Precision": {}, "Recall": {}}
        self.queries: list[Tensor] = []  # per round, indices into the training images
        self.networks: dict[str, dict] = {}  # of this round: name -> state, see models.train
        self.objectives: dict[str, Objective] = {}  # of this round: network's name -> its own
        self.places: tuple[str, str] | None = None  # of an annotator's folder and log, when saved
        self.saved = time.monotonic()
        self.files = RunFiles(Path(args.save_dir) / self.name())
        self.experiment = {"format": FORMAT, "name": self.files.path.name}
        self.experiment["weights"] = data.preprocessing.get("weights")  # of the encoder
        self.experiment["data"] = data.identity
        self.experiment |= {key: vars(args)[key] for key in ROUNDING}
        self.experiment |= {"GPU": device.type == "cuda", "processes": parallel.world()}
        self.answers_digest, self.threads = data.answers_digest, torch.get_num_threads()
        if state := parallel.from_rank0(lambda: self.files.claim(args, self.experiment)):
            self.split = open_set.Split(*state["split"])
            for key in STATE:
                setattr(self, key, state[key])
            self.places = state.get("places")  # older checkpoints lack them
            if self.threads != (now := torch.get_num_threads()) and device.type == "cpu":
                what = f"resumed with {now} threads instead of {self.threads}"
                tell(f"note: {what}: the last digits may differ, and later queries with them")
                self.threads = now

    def name(self) -> str:
        """The published name of the log, without '.pkl', and `settings` at its end."""
        args, start = self.args, self.start_in_name()
        name = f"{args.model}_{self.data.name}{start}_seed{args.seed}_{args.query_strategy}"
        if self.detector:
            name = f"temperature_{name}_unknown_T{args.unknown_T}_known_T{args.known_T}"
            name += f"_modelB_T{args.modelB_T}"
        return name + args.settings

    def rounds(self) -> Iterator[open_set.Split]:
        """Yield who is labeled, invalid and in the pool, as long as there is a round to do."""
        self.begin()
        while self.round < self.args.max_query and len(self.split.pool):
            self.began = time.monotonic()
            yield self.split
        self.finish()

    def finish(self) -> None:
        """Say where the log is."""
        why = "" if len(self.split.pool) else " (the pool is empty)"
        self.files.tell(f"finished after {self.round} rounds{why}: {self.files.path}.pkl")
        folder = shlex.quote(str(self.files.path.parent))
        self.files.tell(f"draw it with: python plot.py --log-dir {folder}")
        self.tell_unsaved()

    def tell_unsaved(self) -> None:
        """Say if no round was left whose networks --save-model could keep."""
        if self.args.save_model and not Path(f"{self.files.path}.model.pt").exists():
            self.files.tell("--save-model has kept no networks: no round was left to do")

    def train(
        self, name: str, outputs: int, indices: Tensor, temperature: Sequence[float] | None = None
    ) -> Network:
        """A network of this round, trained on the images `indices`; see models.train.

        name: "detector" or "classifier". outputs: how many the network has. temperature: one per
        class, see Objective. A network that the checkpoint holds goes on from there. A detector of
        which the strategy reads nothing (`random`) stays untrained. Raises Stopped after a signal.
        """
        reads, settings = self.strategy.READS, self.settings
        is_queried = name == ("detector" if self.detector else "classifier")
        dropout = settings.dropout if is_queried and "mc_logits" in reads else 0.0
        generator_for = partial(self.generator, name)
        made = self.args.model, outputs, settings.feat_dim, generator_for("init"), self.device
        network = models.create(*made, dropout, self.data.train.dimension)
        objective = Objective(temperature)
        if is_queried and hasattr(self.strategy, "objective"):
            invalid = self.split.invalid
            objective = self.strategy.objective(network, temperature, invalid, generator_for)
        self.objectives[name] = objective.to(self.device)
        if name == "detector" and not reads:
            return network
        if settings.weight_cent > 0:
            shape = self.data.num_known, network.feature_dim
            centers = settings.weight_cent, settings.lr_cent, generator_for("centers")
            objective = models.CenterLoss(objective, shape, *centers).to(self.device)

        def keep(state: dict) -> None:
            self.networks[name] = state
            self.save()
            if parallel.any_rank(bool(signals)):  # last: one may arrive during the writing
                raise Stopped(signals[0] if signals else signal.SIGTERM)  # none: another rank's

        data = self.data.train, self.data.targets, indices
        with parallel.noted_signals() as signals:
            state = self.networks.get(name)
            training = models.train(network, objective, *data, generator_for, settings, state)
            for epoch, loss, snapshot in training:
                self.files.record(f"loss/{name}", loss, self.round * settings.max_epoch + epoch)
                due = time.monotonic() - self.saved >= self.args.checkpoint_seconds
                if epoch < settings.max_epoch and parallel.any_rank(due or bool(signals)):
                    keep(snapshot())
            done = {"network": network.state_dict(), "objective": objective.state_dict()}
            keep({"epoch": settings.max_epoch} | done)
        return network

    def evaluate(self, classifier: Network) -> float:
        """Accuracy on the test images of the known classes, in percent; NaN if there are none."""
        data = self.data
        return models.evaluate(classifier, data.test, data.test_targets, self.settings)

    def query(
        self, split: open_set.Split, network: Network, classifier: Network | None = None
    ) -> Tensor:
        """What the strategy queries: indices into the training images, int64, in order of choice.

        network: the queried one, LfOSA's detector or the baselines' classifier.
        """
        outputs = self._predict(split, network, classifier or network)
        if hasattr(self.strategy, "describe") and parallel.rank() == 0:
            self.files.note(self.strategy.describe(outputs))
        name, count = self.args.query_strategy, self.args.query_batch
        draws = self.generator("query", name)
        return split.pool[parallel.from_rank0(lambda: select(name, outputs, count, draws))]

    def _predict(self, split: open_set.Split, network: Network, classifier: Network) -> PoolOutputs:
        """What the strategy reads of the pool, and of the labeled and invalid images."""
        reads, data, outputs = self.strategy.READS, self.data, {}
        masks = parameters = None
        if "mc_logits" in reads:
            draws = self.generator("dropout")
            masks = models.dropout_masks(network, self.settings.mc_samples, draws)
        if self.args.augment_pool and reads:
            parameters = data.train.draw(len(split.pool), self.generator("augment-pool"))
        for prefix, asked, indices, augmented in (
            ("", network, split.pool, parameters),
            ("classifier_", classifier, split.pool, parameters),
            ("labeled_", network, split.labeled, None),
            ("invalid_", network, split.invalid, None),
        ):
            fields = ("features", "logits", "mc_logits")
            fields = [field for field in fields if prefix + field in reads]
            if fields:
                more = self.settings, masks, augmented
                found = models.predict(asked, data.train, indices, fields, *more)
                outputs |= {prefix + field: tensor for field, tensor in found.items()}
        if "labeled_targets" in reads:
            outputs["labeled_targets"] = data.targets[split.labeled.to(self.device)]
        if "precisions" in reads:
            measured = sorted(self.log["Precision"].items())
            outputs["precisions"] = tuple(value for q, value in measured if q < self.round)
        if "objective" in reads:
            outputs["objective"] = self.objectives["detector" if self.detector else "classifier"]
        return PoolOutputs(len(split.pool), data.num_known, **outputs)

    def end_round(self, accuracy: float, queried: Tensor) -> None:
        """Measure the round, let the oracle answer for `queried`, and write the round's files.

        accuracy: in percent. queried: indices into the training images, in order of the query.
        """
        self.measure(accuracy, queried)
        self.split = open_set.update(self.split, queried, self.data.known, self.args.drop_unknown)
        self.round, self.networks = self.round + 1, {}
        self.save()  # last: a run killed before this prints the round again, but loses nothing

    def measure(self, accuracy: float, queried: Tensor) -> None:
        """Write the round's measures to the log, print its row, and keep its networks if asked."""
        done, data = self.round, self.data
        measures = {"Acc": accuracy, "Err": 100 - accuracy} if len(data.test_targets) else {}
        measures |= self.oracle_measures(queried)
        for name, value in measures.items():
            self.log[name][done] = value
            self.files.record(name, value, done)
        self.queries = [*self.queries[:done], queried]
        cells = [f"{len(indices):,}" for indices in self.split]
        for name, form in (("Acc", ".2f"), ("Precision", ".3f"), ("Recall", ".3f")):
            value = self.newest(name)
            cells.append("-" if value is None else format(value, form))
        self.files.tell(done, *cells, f"{time.monotonic() - self.began:.1f}")
        if self.args.save_model and parallel.rank() == 0:
            self._save_model()

    def generator(self, *purpose: object) -> torch.Generator:
        """The generator of this round's draws for a purpose."""
        return generator(self.args.seed, self.round, *purpose)

    def begin(self) -> None:
        """Write the first checkpoint, open the journal, and print what will run."""
        args, data, files = self.args, self.data, self.files
        self.save()
        if parallel.rank() > 0:
            return
        where = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        where += f", {torch.get_num_threads()} threads"
        header = f"{vars(args)}, {versions()}, {where}"
        files.begin(header, not args.no_tensorboard, args.overwrite)
        known, unknown = data.num_known, len(data.classes) - data.num_known or "some"
        classes = f"{data.name}: {known} known and {unknown} unknown classes"
        labeled, pool = len(self.split.labeled), len(self.split.pool)
        files.tell(f"{classes}, {labeled:,} images labeled, {pool:,} in the pool")
        features = f"{args.feat_dim or 'plain'} features"
        training = f"{args.query_strategy} on {args.model}, {features}, {args.max_epoch} epochs"
        files.tell(f"{training}, {where}")
        files.tell(f"{files.path}.pkl: {self.round} rounds done")
        if data.left_out:
            files.tell(f"{len(data.left_out)} unreadable images are skipped; see {files.journal}")
        for name, fault in data.left_out.items():
            files.note(f"skipped: {name}: {fault}")
        files.tell(*COLUMNS)

    def save(self) -> None:
        """Write the checkpoint and what follows from it (rank 0)."""
        self.saved = time.monotonic()
        if parallel.rank() == 0:
            state = {key: getattr(self, key) for key in STATE} | {"split": tuple(self.split)}
            queries = self.queries
            if self.data.sheets:  # they say what was queried
                places = self.data.folder.absolute(), self.files.path.absolute()
                state["places"], queries = tuple(map(str, places)), None
            self.files.save(state, self.log, queries)

    def _save_model(self) -> None:
        """Write this round's networks, and what applying them needs."""
        content = {"arguments": vars(self.args), "classes": list(self.data.classes)}
        content |= self.data.preprocessing
        for name, state in self.networks.items():
            content |= {name: state["network"], f"{name}_objective": state["objective"]}
        write_whole(f"{self.files.path}.model.pt", partial(torch.save, content))

    # What an annotator's run does in another way.

    def start_in_name(self) -> str:
        """What the log's name says of the known classes, the labeled images and the query."""
        args = self.args
        return f"_known{args.known_class}_init{args.init_percent:.12g}_batch{args.query_batch}"

    def oracle_measures(self, queried: Tensor) -> dict[str, float]:
        """The measures of a query that need its labels."""
        known = self.data.known
        recall = open_set.recall(self.split, queried, known)
        return {"Precision": open_set.precision(queried, known), "Recall": recall}

    def newest(self, name: str) -> float | None:
        """The measure that is printed for this round; None if there is none."""
        return self.log[name].get(self.round)
