"""Data sets that their authors publish as archives: found, downloaded and read.

Nothing that a user put into a data folder is ever changed or deleted.
"""

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from torchvision.datasets import utils

from errors import UserError, tell

from .files import one_at_a_time

# What reading a broken archive, file or text raises; UserError is raised by our own checks.
_FAULTS = (UserError, OSError, EOFError, RuntimeError, ValueError)
_FAULTS += (tarfile.TarError, zipfile.BadZipFile, zlib.error)


class Published(NamedTuple):
    """A data set that its authors publish as an archive."""

    url: str
    md5: str  # of the archive
    folder: str  # the one that the archive unpacks to
    marker: str  # a file or folder in it, by which data_dir itself is recognized

    def folders(self, data_dir: Path) -> list[Path]:
        """Where the unpacked folder may lie: in one of its own name, or in data_dir."""
        return [data_dir / self.folder / self.folder, data_dir / self.folder]


def read_published(
    data_dir: Path, data: Published, read: Callable, cache: Path | None = None
) -> Any:
    """Return what `read`, given a path, makes of the files of a data set.

    These places are tried in turn: the data set's folder below data_dir, perhaps in one of its own
    name, the archive in data_dir, data_dir itself, and the cache. The first that exists is read. If
    none does, the archive is downloaded. Raises UserError with what is wrong and what to do.
    """
    archive = data_dir / data.url.rpartition("/")[2]
    places = [*data.folders(data_dir), archive]
    if (data_dir / data.marker).exists():
        places.append(data_dir)
    sources = [place for place in [*places, cache] if place and place.exists()]
    source = sources[0] if sources else archive
    try:
        if not sources:
            _download(archive, data)
        elif source == archive and cache not in sources and (other := _other_md5(archive, data)):
            tell(f"note: {archive} is not the published file{other}")
        return read(source)
    except _FAULTS as error:
        remedy = "remove it and " if sources else ""
        remedy += f"put {archive.name} from {data.url} with MD5 {data.md5} into {data_dir}"
        raise UserError(f"{source}{_other_md5(source, data)}: {error}; {remedy}") from error


def _other_md5(source: Path, data: Published) -> str:
    """Tell the MD5 of an archive if it is not the published one; "" for any other source."""
    archive = source.is_file() and source.name == data.url.rpartition("/")[2]
    md5 = utils.calculate_md5(source) if archive else data.md5
    return "" if md5 == data.md5 else f" (MD5 {md5} instead of {data.md5})"


def _download(archive: Path, data: Published) -> None:
    """Download the archive, unless another process has done so meanwhile."""
    part = archive.with_name(f".{archive.name}.part")  # what a killed download leaves
    with one_at_a_time(archive.with_name(f".{archive.name}.lock")):
        if not archive.exists():
            utils.download_url(data.url, part.parent, part.name, data.md5)
            os.replace(part, archive)
