"""Tiny ImageNet (Stanford CS231n, 2015): 200 classes, 500 training and 50 validation images each.

The validation images are the test set, for the labels of the test images were never published.
The JPEGs are decoded once, straight out of the archive, into one file that later starts map into
memory: three .npy arrays one after another, the images of both sets, train labels, test labels.
Being one file that is renamed when complete, it is there as a whole or not at all.
"""

import contextlib
import http.client
import io
import os
import re
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path, PureWindowsPath
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import torchvision

from .files import UserError, one_at_a_time

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"  # of all members of the archive
SIZE = 64  # pixels, height and width of every image
MEAN = (0.485, 0.456, 0.406)  # per channel, of pixels in [0, 1]: the usual ones of ImageNet
STD = (0.229, 0.224, 0.225)

_CLASS = re.compile(rf"{FOLDER}/train/([^/]+)/")
_TRAIN = re.compile(rf"{FOLDER}/train/([^/]+)/images/\1_(\d+)\.JPEG")
_TEST = re.compile(rf"{FOLDER}/val/images/(val_(\d+)\.JPEG)")
_ANNOTATIONS = f"{FOLDER}/val/val_annotations.txt"  # lines of: image, class, box; tab-separated


def load(data_dir: Path) -> Arrays:
    """Training and test images and labels below data_dir; the images are memory-mapped, read-only.

    Returns train images (100000, 64, 64, 3) uint8, train labels (100000,) int64, and the same of
    the 10,000 validation images. Labels 0..199 number the class folders (WordNet ids) by name.
    Without a usable tiny-imagenet-200.npy, it is made from tiny-imagenet-200.zip, which is
    downloaded if need be, or from the folder tiny-imagenet-200 where there is one and no archive.
    Raises DataError where none of them can be had or something in it is not as it should be.
    """
    cache, archive, folder = (data_dir / f"{FOLDER}{suffix}" for suffix in (".npy", ".zip", ""))
    arrays = _read(cache)
    if arrays is not None:
        return arrays
    with one_at_a_time(data_dir / f".{FOLDER}.lock"):
        if _read(cache) is not None:
            pass  # made by whoever was in here before
        elif os.path.isdir(folder) and not os.path.exists(archive):
            files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
            names = [file.relative_to(data_dir).as_posix() for file in files]
            decode(folder, names, lambda name: (data_dir / name).read_bytes(), cache)
        else:
            _download(archive)
            try:
                with zipfile.ZipFile(archive) as members:
                    decode(archive, members.namelist(), members.read, cache)
            except (OSError, zipfile.BadZipFile) as error:
                raise _unusable(archive, f"cannot be read as a zip file ({error})") from error
    arrays = _read(cache)
    if arrays is None:
        raise DataError(f"{cache} cannot be read back: check that disk, or use another --data-dir")
    return arrays


def decode(source: Path, names: Iterable[str], read: Callable[[str], bytes], cache: Path) -> None:
    """Decode all JPEGs of the archive or folder `source` into the file `cache`.

    names: of the files in source, starting with FOLDER, in any order; read gives the content of
    one and is called from several threads. Training images are ordered by class, then by number,
    test images by number. Raises DataError, without leaving a file, where a name leaves the
    folder, an image is missing, broken or not SIZE x SIZE, an annotation is missing or wrong, or
    the cache cannot be written.
    """
    train, train_labels, test, test_labels = _members(source, names, read)

    def pixels(name: str) -> bytes:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(read(name))) as image:
                if image.size == (SIZE, SIZE):  # known before decoding
                    return image.convert("RGB").tobytes()
        except Exception as error:  # Pillow and zipfile name no common class for broken input
            raise _unusable(source, f"holds a broken image {name} ({error})") from error
        size = "x".join(map(str, image.size))
        raise _unusable(source, f"holds {name} of {size} instead of {SIZE}x{SIZE} pixels")

    for left in cache.parent.glob(f"{cache.name}.*.tmp"):  # by processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:  # seconds; others write all the time
                left.unlink()
    partial = cache.with_name(f"{cache.name}.{uuid4().hex}.tmp")  # two runs may decode at once
    try:
        with open(partial, "xb") as file:
            shape = (len(train) + len(test), SIZE, SIZE, 3)
            header = dict(descr="|u1", fortran_order=False, shape=shape)
            np.lib.format.write_array_header_1_0(file, header)
            _stream(pixels, train + test, file)
            for labels in (train_labels, test_labels):
                np.lib.format.write_array(file, labels)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, cache)
        sync_folder(cache.parent)
    except OSError as error:
        raise DataError(
            f"{cache} cannot be written ({error}): make room for it, or use another --data-dir"
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _members(source: Path, names: Iterable[str], read: Callable[[str], bytes]) -> tuple:
    """Names of the training images in order, their labels (N,), the same of the test images."""
    names = sorted(set(names))
    for name in names:
        path = PureWindowsPath(name)  # knows drives, / and \
        if path.anchor or ".." in path.parts:
            raise _unusable(source, f"holds {name}, which leaves the folder")

    train = sorted((m[1], int(m[2]), m[0]) for m in map(_TRAIN.fullmatch, names) if m)
    counts = {m[1]: 0 for m in map(_CLASS.match, names) if m} | Counter(m[0] for m in train)
    if not train:
        raise _unusable(source, f"has no images of any class in {FOLDER}/train/")
    for wnid, count in counts.items():
        if count < max(counts.values()):  # the sign of an extraction that was interrupted
            raise _unusable(source, f"is incomplete: class {wnid} has only {count} images")
    classes = {wnid: label for label, wnid in enumerate(sorted(counts))}

    try:
        lines = read(_ANNOTATIONS).decode().splitlines()
    except Exception as error:  # zipfile names no common class for broken input
        raise _unusable(source, f"has no readable {_ANNOTATIONS} ({error})") from error
    test = {m[1]: (int(m[2]), m[0]) for m in map(_TEST.fullmatch, names) if m}
    labels = {}
    for number, line in enumerate(lines, 1):
        name, wnid = [*line.split("\t"), ""][:2]
        if name not in test or wnid not in classes:
            what = f"unknown class {wnid}" if name in test else f"missing image {name}"
            raise _unusable(source, f"names {what} in line {number} of {_ANNOTATIONS}")
        labels[name] = classes[wnid]
    if not labels or len(labels) < len(test):
        name = min(test.keys() - labels.keys(), default="any image")
        raise _unusable(source, f"has no line for {name} in {_ANNOTATIONS}")

    test_names = sorted(labels, key=test.get)
    return (
        [name for _, _, name in train],
        np.array([classes[wnid] for wnid, _, _ in train], np.int64),
        [test[name][1] for name in test_names],
        np.array([labels[name] for name in test_names], np.int64),
    )


def _stream(pixels: Callable[[str], bytes], names: list[str], file: BinaryIO) -> None:
    """Write the pixels of all images in order; threads decode, for Pillow releases the GIL."""
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    bar = tqdm(total=len(names), desc=FOLDER, unit=" images", disable=None)
    with workers, bar:
        for start in range(0, len(names), 1000):  # images in memory at once
            chunk = names[start : start + 1000]
            file.writelines(workers.map(pixels, chunk))
            bar.update(len(chunk))


def _read(cache: Path) -> Arrays | None:
    """What decode wrote, the images memory-mapped; None where that is absent or not whole."""
    try:
        images = np.lib.format.open_memmap(cache, mode="r")
        with open(cache, "rb") as file:
            file.seek(images.offset + images.nbytes)
            train_labels, test_labels = (np.lib.format.read_array(file) for _ in range(2))
            rest = file.read(1)
    except Exception:  # numpy names no common class for headers that are not its own
        return None
    counts = len(train_labels), len(test_labels)
    if (
        rest
        or (images.dtype, images.shape) != (np.uint8, (sum(counts), SIZE, SIZE, 3))
        or not images.flags.c_contiguous
        or any(
            (labels.dtype, labels.ndim) != (np.int64, 1) for labels in (train_labels, test_labels)
        )
        or not all(counts)
        or train_labels[0] != 0
        or not np.isin(np.diff(train_labels), (0, 1)).all()
        or not np.isin(test_labels, train_labels).all()
    ):
        return None
    return images[: counts[0]], train_labels, images[counts[0] :], test_labels


def _download(archive: Path) -> None:
    """Fetch the archive, unless it is there with the right MD5."""
    try:
        torchvision.datasets.utils.download_url(URL, archive.parent, archive.name, MD5)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        state = "is damaged" if os.path.exists(archive) else "is missing"
        raise _unusable(archive, f"{state} and cannot be downloaded ({error})") from error


def _unusable(source: Path, what: str) -> DataError:
    """The error that `source` is not as it should be, in one line."""
    remedy = f"put {FOLDER}.zip from {URL} with MD5 {MD5} into {source.parent}"
    return DataError(" ".join(f"{source} {what}: {remedy}".splitlines()))
