"""What the loaders share: the form of their result, and the way to the files of a data set.

Nothing that a user put into a data folder is ever changed or deleted.
"""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision.datasets import utils

from .files import UserError, one_at_a_time, tell

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


class Published(NamedTuple):
    """A data set that its authors publish as an archive."""

    url: str
    md5: str  # of the archive
    folder: str  # the one that the archive unpacks to
    marker: str  # a file or folder in it
    expected: str = ""  # what a folder must hold to be read


def note(text: str) -> None:
    """Tell the user one line; under torchrun, the first process of each machine does."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        tell(f"note: {text}")


def expand(path: Path | str, flag: str = "--data-dir") -> Path:
    """Replace a leading `~`. Raises UserError if there is no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{flag} {path}: {error} Give the whole path.") from None


def other_md5(source: Path, md5: str) -> str:
    """Say which MD5 an archive has, if it is not `md5`."""
    found = utils.calculate_md5(source) if source.is_file() else md5
    return "" if found == md5 else f" (MD5 {found}, the published file has {md5})"


def note_other_md5(archive: Path, md5: str) -> None:
    """Tell the user if an archive is not the published one."""
    if other := other_md5(archive, md5):
        note(f"{archive} is not the published file{other}; it is used if it is sound")


def first_sound(data_dir: Path, data: Published, read: Callable, cache: Path | None = None) -> Any:
    """Return what `read`, given a path, makes of the first source that is as it should be.

    Sources are the folder of the data set below data_dir, data_dir itself, the archive in
    data_dir, and the cache. If there is none of them, the archive is downloaded. Raises UserError,
    in one line, with the faults of all sources and what to do; raises OSError.
    """
    archive = data_dir / data.url.rpartition("/")[2]
    folders = [data_dir / data.folder, data_dir / data.folder / data.folder, data_dir]
    sources = [folder for folder in folders if (folder / data.marker).exists()]
    sources += [file for file in (archive, cache) if file and file.exists()]
    faults = []
    for source in sources or [archive]:
        try:
            if not sources:
                _download(archive, data)
            result = read(source)
        except _FAULTS as error:
            faults.append(f"{source}: {error}{other_md5(source, data.md5)}")
        else:
            for fault in faults:
                note(f"{fault}: {source} is used instead")
            return result
    remedy = f"put {archive.name} from {data.url} with MD5 {data.md5} into {data_dir}"
    raise UserError(" ".join(f"{'; '.join(faults)}: {data.expected}{remedy}".split()))


def _download(archive: Path, data: Published) -> None:
    """Download the archive, unless another process has done so meanwhile."""
    part = archive.with_name(f".{archive.name}.part")  # what a killed download leaves
    with one_at_a_time(archive.with_name(f".{archive.name}.lock")):
        if not archive.exists():
            utils.download_url(data.url, part.parent, part.name, data.md5)
            os.replace(part, archive)
