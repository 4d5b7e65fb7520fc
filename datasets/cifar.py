"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features", 2009).

The files are pickles, which can run code: torchvision loads only those with the published MD5.
"""

import shutil
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from errors import UserError

from .archives import Published, read_published
from .raw import Raw


def load(data_dir: Path, source: type) -> Raw:
    """50,000 training and 10,000 test images (32, 32, 3); labels are the (fine) class ids.

    source: torchvision's CIFAR10 or CIFAR100. Reads the folder of the batches below data_dir,
    data_dir itself or the archive in data_dir, which is downloaded if nothing is there. Raises
    UserError if no sound files can be had.
    """
    name = source.meta["filename"]
    published = Published(source.url, source.tgz_md5, source.base_folder, name)
    return read_published(data_dir, published, partial(_read, source))


def _read(source: type, place: Path) -> Raw:
    """Read the folder of the batches or an archive of it."""
    if place.is_file():
        with tempfile.TemporaryDirectory() as folder:
            shutil.unpack_archive(place, folder, filter="data")
            return _read(source, Path(folder) / source.base_folder)

    class Here(source):
        base_folder = ""  # the files lie in the root itself, whatever its name

    try:
        train, test = (Here(place, train=part) for part in (True, False))
    except RuntimeError as error:
        raise UserError("a file is missing or has another MD5") from error
    return Raw(
        train=train.data,
        train_labels=np.array(train.targets, np.int64),
        test=test.data,
        test_labels=np.array(test.targets, np.int64),
        classes=tuple(train.classes),
    )
