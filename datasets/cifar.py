"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features", 2009).

The files are pickles, which can run code: each is unpickled only if it has the MD5 that torchvision
knows for it.
"""

import hashlib
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torchvision

from .files import UserError
from .sources import Raw, expand, fetch, first_sound

# Per channel, of pixels in [0, 1]: the values of the published experiments.
MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4867, 0.4408)}
STD = {"cifar10": (0.2023, 0.1994, 0.2010), "cifar100": (0.2675, 0.2565, 0.2761)}


def load(data_dir: Path, name: str) -> Raw:
    """50,000 training and 10,000 test images (32, 32, 3) of `name`, "cifar10" or "cifar100".

    Labels are the (fine) class ids. Reads the first of these that is sound: the folder of the
    batches below data_dir, data_dir itself, the archive in data_dir, which is downloaded if it
    is missing. Raises UserError if no sound files can be had.
    """
    data_dir = expand(data_dir)
    source = getattr(torchvision.datasets, name.upper())
    archive = data_dir / source.filename
    sums = dict([*source.train_list, *source.test_list])  # file -> MD5
    sums[source.meta["filename"]] = source.meta["md5"]

    def read(place: Path) -> Raw:
        if place == archive:
            fetch(source.url, archive, source.tgz_md5)
        return _arrays(_contents(place, sums), source)

    base = source.base_folder
    folders = [data_dir / base, data_dir / base / base, data_dir]
    there = [path for path in folders if any((path / file).exists() for file in sums)]
    remedy = f"put {archive.name} from {source.url} with MD5 {source.tgz_md5} into {data_dir}"
    return first_sound([*there, archive], read, source.tgz_md5, remedy)


def _contents(place: Path, sums: dict[str, str]) -> dict[str, bytes]:
    """Read files from a folder or an archive: name -> content, with the MD5 that `sums` gives.

    Raises UserError if one is missing or has another MD5, OSError, and what tarfile raises.
    """
    if place.is_dir():
        found = [place / file for file in sums if (place / file).exists()]
        contents = {path.name: path.read_bytes() for path in found}
    else:
        with tarfile.open(place) as tar:
            members = ((os.path.basename(member.name), member) for member in tar)
            contents = {
                file: tar.extractfile(member).read()
                for file, member in members
                if file in sums and member.isfile()
            }
    for file, md5 in sums.items():
        if file not in contents:
            raise UserError(f"{file} is missing")
        if (found := hashlib.md5(contents[file], usedforsecurity=False).hexdigest()) != md5:
            raise UserError(f"{file} has MD5 {found} instead of {md5}")
    return contents


def _arrays(contents: dict[str, bytes], source: type) -> Raw:
    """Unpickle the files, whose MD5 is the published one."""

    def unpickle(file: str) -> dict:
        return pickle.loads(contents.pop(file), encoding="latin1")

    def batch(file: str) -> tuple[np.ndarray, list[int]]:
        content = unpickle(file)
        pixels = content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        return pixels.copy(), content.get("fine_labels", content.get("labels"))

    def arrays(listed: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
        pixels, labels = zip(*(batch(file) for file, _ in listed), strict=True)
        return np.concatenate(pixels), np.concatenate(labels).astype(np.int64)

    classes = unpickle(source.meta["filename"])[source.meta["key"]]
    return Raw(*arrays(source.train_list), *arrays(source.test_list), tuple(classes))
