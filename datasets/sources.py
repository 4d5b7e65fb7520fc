"""What the loaders share: the form of their result, and the way to the files of a data set.

Nothing that a user put into a data folder is ever changed or deleted.
"""

import contextlib
import http.client
import os
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torchvision

from .files import UserError, one_at_a_time

T = TypeVar("T")

# What reading a broken archive, file or text raises; UserError is raised by our own checks.
_FAULTS = (UserError, OSError, EOFError, RuntimeError, ValueError)
_FAULTS += (tarfile.TarError, zipfile.BadZipFile, zlib.error)


class Raw(NamedTuple):
    """A data set as a loader returns it. Labels are positions in `classes`."""

    train: np.ndarray  # (N, H, W, 3) uint8
    train_labels: np.ndarray  # (N,) int64
    test: np.ndarray  # (M, H, W, 3) uint8
    test_labels: np.ndarray  # (M,) int64
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()  # of the N + M image files, if there are such


def note(text: str) -> None:
    """Tell the user one line; under torchrun, the first process of each machine does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)


def expand(path: Path | str, flag: str = "--data-dir") -> Path:
    """Replace a leading `~`. Raises UserError if there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{flag} {path}: {error} Give the whole path.") from None


def fetch(url: str, archive: Path, md5: str) -> None:
    """Download an archive, unless it is there. Raises UserError if that fails, and OSError."""
    part = archive.with_name(f".{archive.name}.part")  # what a killed download leaves
    with one_at_a_time(archive.with_name(f".{archive.name}.lock")):
        with contextlib.suppress(FileNotFoundError):
            archive.stat()
            return
        try:
            torchvision.datasets.utils.download_url(url, part.parent, part.name, md5)
            os.replace(part, archive)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            raise UserError(f"it is missing and cannot be downloaded ({error})") from error


def first_sound(sources: Iterable[Path], read: Callable[[Path], T], md5: str, remedy: str) -> T:
    """Return what `read` makes of the first source that is as it should be.

    A source is a folder or a file; md5 is that of the published archive. Raises UserError with
    the faults of all sources and the remedy, in one line.
    """
    faults = []
    for source in sources:
        try:
            result = read(source)
        except OSError as error:
            faults.append(f"{source}: {error}")
        except _FAULTS as error:
            faults.append(f"{source}: {error}{other_md5(source, md5)}")
        else:
            for fault in faults:
                note(f"{fault}: {source} is used instead")
            return result
    raise UserError(" ".join(f"{'; '.join(faults)}: {remedy}".splitlines()))


def other_md5(source: Path, md5: str) -> str:
    """Say which MD5 an archive has, if it is not `md5`."""
    found = torchvision.datasets.utils.calculate_md5(source) if source.is_file() else md5
    return "" if found == md5 else f" (MD5 {found}, the published file has {md5})"
