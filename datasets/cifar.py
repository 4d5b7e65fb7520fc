"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features", 2009).

The files are pickles, which can run code: torchvision compares their MD5s before it unpickles them.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

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
    """Read a folder of batches or an archive of it. RuntimeError if a file has another MD5."""
    if place.is_file():
        with tempfile.TemporaryDirectory() as folder:
            shutil.unpack_archive(place, folder, filter="data")
            return _read(source, Path(folder, source.base_folder))
    root = place.absolute().parent
    train, test = source(root, train=True), source(root, train=False)
    labels = np.array(train.targets), np.array(test.targets)
    return Raw(train.data, labels[0], test.data, labels[1], tuple(train.classes))
