"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features", 2009).

The files are pickles, which can run code: each is unpickled only if it has the MD5 that torchvision
knows for it.
"""

import hashlib
import pickle
import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from .files import UserError
from .sources import Published, Raw, expand, read_source


def load(data_dir: Path, source: type) -> Raw:
    """50,000 training and 10,000 test images (32, 32, 3); labels are the (fine) class ids.

    source: torchvision's CIFAR10 or CIFAR100. Reads the folder of the batches below data_dir,
    data_dir itself or the archive in data_dir, which is downloaded if nothing is there. Raises
    UserError if no sound files can be had.
    """
    name = source.meta["filename"]
    published = Published(source.url, source.tgz_md5, source.base_folder, name)
    return read_source(expand(data_dir), published, partial(_read, source))


def _read(source: type, place: Path) -> Raw:
    """Read a folder of batches or an archive of it, of which `source` knows names and MD5s."""
    if place.is_file():
        with tempfile.TemporaryDirectory() as folder:
            shutil.unpack_archive(place, folder, filter="data")
            return _read(source, Path(folder) / source.base_folder)
    names = _unpickle(place / source.meta["filename"], source.meta["md5"])[source.meta["key"]]
    return Raw(*_arrays(place, source.train_list), *_arrays(place, source.test_list), tuple(names))


def _arrays(place: Path, listed: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 32, 32, 3) uint8 and labels (N,) int64 of batches. listed: file name and MD5."""
    batches = [_unpickle(place / file, md5) for file, md5 in listed]
    pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [batch.get("fine_labels", batch.get("labels")) for batch in batches]
    return pixels.transpose(0, 2, 3, 1), np.concatenate(labels).astype(np.int64)


def _unpickle(path: Path, md5: str) -> dict:
    """Raises UserError if the file has another MD5, and OSError."""
    content = path.read_bytes()
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != md5:
        raise UserError(f"{path.name} has MD5 {found} instead of {md5}")
    return pickle.loads(content, encoding="latin1")
