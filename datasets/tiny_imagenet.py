"""Tiny ImageNet (Stanford CS231n, 2015): 200 classes, 500 training and 50 validation images each.

The validation images are the test set, for the labels of the test images were never published.
"""

import contextlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from . import images
from .files import UserError, one_at_a_time
from .sources import Raw, expand, fetch, first_sound, note, other_md5

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"  # of all members of the archive
SIZE = 64  # pixels, height and width of every image
MEAN = (0.485, 0.456, 0.406)  # per channel, of pixels in [0, 1]: the usual ones of ImageNet
STD = (0.229, 0.224, 0.225)

_ANNOTATIONS = "val/val_annotations.txt"  # lines of: image, class, box
_REMEDY = (
    f"expected are train/CLASS/images/*.JPEG and either val/images/*.JPEG with {_ANNOTATIONS} or "
    f"val/CLASS/*.JPEG; put {FOLDER}.zip from {URL} with MD5 {MD5} into "
)


def load(data_dir: Path) -> Raw:
    """Training and test images below data_dir; of the published files 100,000 and 10,000.

    Reads the first of these that is sound: the folder tiny-imagenet-200, data_dir itself,
    tiny-imagenet-200.zip, and what an earlier start has decoded into tiny-imagenet-200.npy. If
    there is none, the archive is downloaded. Raises UserError if no images can be had.
    """
    data_dir = expand(data_dir)
    cache, archive = data_dir / f"{FOLDER}.npy", data_dir / f"{FOLDER}.zip"
    folders = [path for path in (data_dir / FOLDER, data_dir) if (path / "train").is_dir()]
    with one_at_a_time(data_dir / f".{FOLDER}.lock"):
        sources = [*folders, *(path for path in (archive, cache) if path.exists())]
        if not archive.exists() and not folders:
            sources.append(archive)
        decoded = first_sound(sources, partial(_decode, cache), MD5, f"{_REMEDY}{data_dir}")
    count, labels = decoded.about["train"], np.array(decoded.about["labels"], np.int64)
    pixels, classes = decoded.pixels, tuple(decoded.about["classes"])
    return Raw(pixels[:count], labels[:count], pixels[count:], labels[count:], classes)


def _decode(cache: Path, source: Path) -> images.Decoded:
    """The images of an archive or a folder, from the cache if that was made of the same files.

    The source may be the cache itself.
    """
    if source == cache:
        if decoded := images.cached(cache, SIZE):
            return decoded
        raise OSError("it is not whole, or of an earlier version")
    if not source.is_dir():
        fetch(URL, source, MD5)
    with _opened(source) as (files, read):
        names, about = _labeled(files, read)
        files = {name: files[name] for name in names}
        if decoded := images.cached(cache, SIZE, files, about):
            return decoded
        if other := other_md5(source, MD5):
            note(f"{source} is not the published file{other}; it is used if it is sound")
        counts = Counter(about["labels"][: about["train"]]).values()
        if min(counts) < max(counts):
            note(f"{source} has {min(counts)} to {max(counts)} training images per class")
        return images.decode(cache, files, read, _exact, SIZE, about)


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tuple[dict[str, int], Callable[[str], bytes]]]:
    """Yield names (from train/ or val/ on) and bytes of all files, and what reads one of them."""
    if source.is_dir():
        files = images.walk(source / "train", "train/") | images.walk(source / "val", "val/")
        yield files, lambda name: (source / name).read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        tops = [match[1] for name in sizes if (match := re.match(r"((?:.*/)?)train/", name))]
        top = min(tops, key=len, default="")  # archives of mirrors have another one, or none
        files = {name[len(top) :]: size for name, size in sizes.items() if name.startswith(top)}
        yield files, lambda name: archive.read(top + name)


def _labeled(files: dict[str, int], read: Callable[[str], bytes]) -> tuple[list[str], dict]:
    """Names of training and test images in order; how many are for training, classes, labels.

    Training images are ordered by class, then by number, test images by number.
    """
    found = [name.split("/") for name in images.pictures(files)]
    train = [parts for parts in found if parts[0] == "train" and len(parts) > 2]
    classes = sorted({parts[1] for parts in train})
    label = {name: number for number, name in enumerate(classes)}
    test = [parts for parts in found if parts[0] == "val"]
    in_class = {parts[-1] for parts in test if parts[1] in label}  # some scripts leave the others
    test = [parts for parts in test if parts[1] in label or parts[-1] not in in_class]
    if not train or not test:
        raise UserError(f"it has {len(train)} training and {len(test)} validation images")
    train.sort(key=lambda parts: (parts[1], _by_number(parts[-1]), parts))
    test.sort(key=lambda parts: (_by_number(parts[-1]), parts))

    annotated = {}
    if _ANNOTATIONS in files:
        lines = read(_ANNOTATIONS).decode().splitlines()
        annotated = dict(line.split()[:2] for line in lines if line.strip())
    if missing := sorted(annotated.keys() - {parts[-1] for parts in test}):
        raise UserError(f"it lacks {len(missing)} images of {_ANNOTATIONS}, such as {missing[0]}")
    labels = [label[parts[1]] for parts in train]
    for parts in test:
        name = parts[1] if parts[1] in label else annotated.get(parts[-1])
        if name not in label:
            raise UserError(f"{'/'.join(parts)} is of class {name}, which has no training images")
        labels.append(label[name])
    about = {"train": len(train), "classes": classes, "labels": labels}
    return ["/".join(parts) for parts in train + test], about


def _by_number(name: str) -> list:
    """Sort key with numbers in the place of their digits: val_9 comes before val_10."""
    parts = re.split(r"(\d+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts


def _exact(image):
    """The PIL image in RGB; raises ValueError if it has another size than published."""
    if image.size != (SIZE, SIZE):
        raise ValueError("{}x{} instead of 64x64 pixels".format(*image.size))
    return image.convert("RGB")
