"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features", 2009).

torchvision downloads them and compares the MD5 of every file before it is unpickled.
"""

import http.client
import pickle
import tarfile
import zlib
from pathlib import Path

import numpy as np
import torchvision

from .files import DataError, one_at_a_time

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# Per channel, of pixels in [0, 1]: the values of the published experiments.
MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4867, 0.4408)}
STD = {"cifar10": (0.2023, 0.1994, 0.2010), "cifar100": (0.2675, 0.2565, 0.2761)}

# No network or folder, a wrong MD5, an archive that breaks off, a pickle of something else.
_FAILURES = (OSError, RuntimeError, ValueError, LookupError, EOFError, http.client.HTTPException)
_FAILURES += (tarfile.TarError, zlib.error, pickle.UnpicklingError)


def load(data_dir: Path, name: str) -> Arrays:
    """Training and test images and labels of `name`, "cifar10" or "cifar100", below data_dir.

    Returns train images (50000, 32, 32, 3) uint8, train labels (50000,) int64, and the same of
    the 10,000 test images. Labels are the (fine) class ids, 0..9 or 0..99. Downloads what is
    missing or damaged; raises DataError where that fails.
    """
    source = getattr(torchvision.datasets, name.upper())
    try:
        try:
            train = _arrays(source(data_dir, train=True))
        except RuntimeError:  # torchvision's for a file that is missing or has another MD5
            with one_at_a_time(data_dir / f".{name}.lock"):
                train = _arrays(source(data_dir, train=True, download=True))
        test = _arrays(source(data_dir, train=False))
    except _FAILURES as error:
        message = (
            f"{name} cannot be read below {data_dir} ({type(error).__name__}: {error}): delete "
            f"{source.base_folder}/ there, if any, and put {source.filename} there, "
            f"from {source.url} with MD5 {source.tgz_md5}"
        )
        raise DataError(" ".join(message.splitlines())) from error
    return *train, *test


def _arrays(dataset: torchvision.datasets.CIFAR10) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a torchvision data set, which keeps channels first."""
    return np.ascontiguousarray(dataset.data), np.array(dataset.targets, np.int64)
