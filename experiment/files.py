"""The files NAME.* of a run: its lock, its checkpoint, its log and its journal."""

import contextlib
import json
import os
import pickle
import platform
import shutil
import subprocess
import time
import zipfile
from argparse import Namespace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from torch import Tensor

from datasets.files import write_whole, writing
from errors import UserError, tell


def load_checkpoint(path: Path, experiment: dict) -> dict:
    """What torch.save wrote, without running code.

    Raises UserError if the file is damaged or unreadable, or if its "experiment" is another one.
    """
    try:
        with zipfile.ZipFile(path) as file:  # torch.load compares no checksum
            if file.testzip():
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except pickle.UnpicklingError as error:  # a method's objective has put it there
        what = "neither a tensor nor a plain value: see models.Objective, then --overwrite it"
        raise UserError(f"{path} holds something that is {what}") from error
    except Exception as error:  # torch names no common class for a file that is no checkpoint
        raise UserError(f"{path} is damaged: put a good copy there, or --overwrite it") from error
    for key, value in experiment.items():
        if (old := state.get("experiment", {}).get(key)) != value:
            what = f"its {key} is {old}, this run's is {value}; to begin anew, --overwrite it"
            raise UserError(f"{path} is of another run or version: {what}")
    return state


def versions() -> str:
    """The versions of Python, of the packages and of this project that a result depends on."""
    packages = ("torch", "torchvision", "scikit-learn", "numpy", "scipy")
    found = [f"python {platform.python_version()}", *(f"{x} {version(x)}" for x in packages)]
    with contextlib.suppress(OSError):  # no git
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        found.append(f"commit {commit or '?'}")
    return ", ".join(found)


class RunFiles:
    """The files NAME.* of a run, which rank 0 alone writes; faults in writing are UserErrors.

    .pt (checkpoint), .pkl (log), .queries.json, .model.pt, .log (journal); and tb/NAME/.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.journal = path, Path(f"{path}.log")
        self.events: EventsWriter | None = None
        self.begun = False

    def claim(self, args: Namespace, experiment: dict) -> dict | None:
        """Lock the files; return the state in the checkpoint to go on from, if there is one.

        Raises UserError if another process has the run, if an earlier run's files would be lost,
        or if the checkpoint cannot be used, see `load_checkpoint`.
        """
        path = self.path
        if len(os.fsencode(f"{path.name}_predictions.csv.tmp")) > 255:  # bytes
            raise UserError(f"the log's name is too long for a file, use fewer flags: {path.name}")
        # A soft lock, filelock's way out, would outlive a killed process.
        self.lock = FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=0)
            except Timeout:  # an OSError too
                raise UserError(f"another process is running {path}") from None
        log, checkpoint = Path(f"{path}.pkl"), Path(f"{path}.pt")
        there = [file for file in (log, checkpoint) if file.exists()]
        if there and not (args.resume or args.overwrite):
            raise UserError(f"{there[0]} exists: add --resume to go on, or --overwrite")
        if there == [log] and args.resume:
            raise UserError(f"{log} exists without its checkpoint {checkpoint}: move it elsewhere")
        return load_checkpoint(checkpoint, experiment) if there and args.resume else None

    def begin(self, header: str, tensorboard: bool, anew: bool) -> None:
        """Open the journal, and TensorBoard's file if wanted; anew: without the old content."""
        self.begun, folder = True, self.path.parent / "tb" / self.path.name
        with writing(self.path.parent):
            if anew:
                for file in (self.journal, Path(f"{self.path}.model.pt")):
                    file.unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
            if tensorboard:
                # tensorboardX's SummaryWriter would wait for ever once the disk is full.
                folder.mkdir(parents=True, exist_ok=True)
                self.events = EventsWriter(f"{folder}/events", f".{os.getpid()}")
        self.record("header", header, 0)
        self.note(header)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it was never opened; the disk is full
            self.events.close()

    def save(self, state: dict, log: dict, queries: list[Tensor] | None) -> None:
        """Write the checkpoint, then the log and the queries, which follow from it."""
        write_whole(f"{self.path}.pt", partial(torch.save, state))
        write_whole(f"{self.path}.pkl", partial(pickle.dump, log, protocol=4))
        if queries is not None:
            content = json.dumps([queried.tolist() for queried in queries]).encode()
            write_whole(f"{self.path}.queries.json", lambda file: file.write(content))

    def note(self, line: str) -> None:
        """A line for the journal."""
        if self.begun:
            how = {"encoding": "utf-8", "errors": "replace"}
            with writing(self.journal), self.journal.open("a", **how) as file:
                file.write(f"{line}\n")

    def tell(self, *cells: object) -> None:
        """A line, or a row of cells, for the journal and the terminal."""
        if self.begun:
            line = str(cells[0]) if len(cells) == 1 else "".join(f"{cell:>10}" for cell in cells)
            self.note(line)
            tell(line)

    def record(self, name: str, value: float | str, step: int) -> None:
        """A number or a text for TensorBoard."""
        if self.events:
            kind = summary.text if isinstance(value, str) else summary.scalar
            event = Event(wall_time=time.time(), step=step, summary=kind(name, value))
            with writing(self.path.parent):
                self.events.write_event(event)
                self.events.flush()
