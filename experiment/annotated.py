"""A run whose oracle is a person: each start does one round and writes the next query sheet."""

import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import models
from datasets import OpenSetData, annotator, open_set
from datasets.page import write_page
from datasets.sheets import as_cells, write_query, write_table
from errors import UserError, tell
from models import Network, parallel

from .run import Run

# Arguments that have no meaning here, because the sheets decide.
SIMULATION = ("init_percent", "known_class", "max_query", "drop_unknown", "known", "class_seed")


class AnnotatedRun(Run):
    """The rounds follow from the sheets, and a query's precision is known a round later.

    Raises UserError as Run does, for a flag of the simulation, and if the log is that of another
    folder, of which this one is a copy.
    """

    def __init__(
        self, args: Namespace, device: torch.device, data: OpenSetData, detector: bool
    ) -> None:
        for key in SIMULATION:
            if key in args.given:
                flag = "--" + key.replace("_", "-")
                raise UserError(f"{flag} is not for use with labels.csv: the sheets decide")
        args.resume = not args.overwrite
        super().__init__(args, device, data, detector)
        folder, log = map(Path, self.places or ("", ""))
        # A log that was copied together with the folder goes on there.
        if log == self.files.path.absolute() and annotator.is_copy(data.folder, of=folder):
            what = f"{data.folder} is a copy of {folder}, whose log {log}.pkl is"
            other = f"to go on here alone, remove {folder / annotator.NAME}"
            raise UserError(f"{what}: give it another --save-dir or, {other}")
        self.split = data.split
        done, queries = len(data.sheets.queries), data.sheets.queries
        waiting = bool(queries) and not any(queries[-1].values())
        # Whether the answers changed after the newest sheet was written.
        self.late = waiting and self.answers_digest != data.answers_digest
        if (self.round, self.answers_digest) != (done, data.answers_digest):
            if self.round == done and self.networks and parallel.rank() == 0:
                tell("answers or images changed after this round began: it starts again")
            self.round, self.networks = done, {}
        if not waiting:
            self.answers_digest = data.answers_digest
        for name in ("Acc", "Err"):  # without rounds whose sheets were removed
            self.log[name] = {q: x for q, x in self.log[name].items() if q < self.round}
        self.log["Precision"] = data.sheets.precisions()

    def start_in_name(self) -> str:
        """Nothing: K, init and batch change between rounds."""
        return ""

    def rounds(self) -> Iterator[open_set.Split]:
        """One round if the newest query has an answer; then it is the person's turn.

        With an empty pool the round trains on the last answers and asks nothing.
        """
        self.begin()
        queries = self.data.sheets.queries
        if not queries or any(queries[-1].values()):
            self.began = time.monotonic()
            yield self.split
        if len(self.split.pool):
            sheet = self.data.folder / f"query_{self.round}.csv"
            if self.late:
                what = f"answers or images changed after {sheet} was written"
                self.files.tell(f"{what}: used in the next round")
            page, fill = sheet.with_suffix(".html"), f"fill in the column label of {sheet}"
            self.files.tell(f"open {page}, or {fill}, then run the same command again")
            self.tell_unsaved()
        else:
            self.finish()

    def query(
        self, split: open_set.Split, network: Network, classifier: Network | None = None
    ) -> Tensor:
        pool = self.data.train, split.pool
        self.pool_logits = models.predict(classifier or network, *pool, settings=self.settings)
        return super().query(split, network, classifier) if len(split.pool) else split.pool

    def oracle_measures(self, queried: Tensor) -> dict[str, float]:
        return {}

    def newest(self, name: str) -> float | None:
        """As for Run, but the precision is that of the newest answers, to the query before."""
        return self.log[name].get(self.round - 1 if name == "Precision" else self.round)

    def end_round(self, accuracy: float, queried: Tensor) -> None:
        """Measure the round, and write the sheet that asks the annotator about `queried`."""
        self.measure(accuracy, queried)
        if (precision := self.newest("Precision")) is not None:
            self.files.record("Precision", precision, self.round - 1)
        self.save()
        if parallel.rank() == 0:
            self._ask(queried)
        self.round += 1

    def _ask(self, queried: Tensor) -> None:
        """Write what the classifier predicts of the pool, and the sheet if it asks something."""
        data, pool, logits = self.data, self.split.pool, self.pool_logits["logits"]
        labels = data.targets[self.split.labeled.to(self.device)]
        per_class = torch.bincount(labels, minlength=data.num_known).tolist()
        counts = (f"{name} {count}" for name, count in zip(data.classes, per_class, strict=True))
        self.files.tell(f"labeled: {', '.join(counts)}")
        probability, label = logits.double().softmax(1).max(1)
        found = zip(pool.tolist(), label.tolist(), probability.tolist(), strict=True)
        rows = {i: (data.names[i], data.classes[label], p) for i, label, p in found}
        header = ("file", "class", "probability")
        write_table(f"{self.files.path}_predictions.csv", header, rows.values())
        header = ("file", *data.columns, "predicted", "probability", "label")
        asked = []
        for i in queried.tolist():
            file, *predicted = rows[i]
            asked.append((file, *(cells[i] for cells in data.columns.values()), *predicted, ""))
        if not asked:
            return
        sheet = data.folder / f"query_{self.round + 1}.csv"
        pictures = [data.pictures[i] for i in queried.tolist()]
        write_page(sheet, as_cells(header, asked), pictures, data.classes)
        write_query(sheet, header, asked)  # the last act
