"""Tiny ImageNet (Stanford CS231n, 2015): 200 classes, 500 training and 50 validation images each.

The validation images are the test set, for the labels of the test images were never published.
"""

import operator
import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from errors import UserError

from . import decoding
from .archives import Published, read_published
from .files import one_at_a_time
from .raw import Raw

SIZE = 64  # pixels, height and width of every image
ANNOTATIONS = "val/val_annotations.txt"  # lines of: image, class, box
EXPECTED = (
    "expected: train/CLASS/images/*.JPEG and either val/images/*.JPEG with "
    f"{ANNOTATIONS} or val/CLASS/*.JPEG"
)
PUBLISHED = Published(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
    folder="tiny-imagenet-200",
    marker="val",
)


def load(data_dir: Path) -> Raw:
    """Training and test images below data_dir; of the published files 100,000 and 10,000.

    Reads the folder tiny-imagenet-200, data_dir itself, tiny-imagenet-200.zip, which is downloaded
    if nothing is there, or what an earlier start has decoded into tiny-imagenet-200.npy. Raises
    UserError if no images can be had.
    """
    cache = data_dir / f"{PUBLISHED.folder}.npy"
    with one_at_a_time(data_dir / f".{PUBLISHED.folder}.lock"):
        decoded = read_published(data_dir, PUBLISHED, partial(_read, cache), cache)
    return decoding.by_class_folder(decoded)


def class_ids(data_dir: Path) -> list[str]:
    """The classes in the order of wnids.txt, whose lines are the ids that protocols list.

    Raises UserError if that file is neither in the folder nor in the archive.
    """
    for folder in (*PUBLISHED.folders(data_dir), data_dir):
        if (file := folder / "wnids.txt").is_file():
            return file.read_text().split()
    archive = data_dir / f"{PUBLISHED.folder}.zip"
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as file:
            if names := [name for name in file.namelist() if name.endswith("wnids.txt")]:
                return file.read(min(names, key=len)).decode().split()
    raise UserError(f"--protocol needs wnids.txt of Tiny ImageNet in {data_dir}")


def _read(cache: Path, source: Path) -> decoding.Decoded:
    """Return the images of a source: a folder or an archive with train/ and val/, or the cache."""
    if source == cache:
        return decoding.cached(cache)
    if source.is_dir():
        return _decode(cache, decoding.walk(source), lambda name: (source / name).read_bytes())
    with zipfile.ZipFile(source) as archive:
        states = {member.filename: [member.file_size, member.CRC] for member in archive.infolist()}
        tops = [name.partition("train/")[0] for name in states if "train/" in name]
        top = min(tops, key=len, default="")  # archives of mirrors have another one, or none
        files = {name.removeprefix(top): states[name] for name in states if name.startswith(top)}
        return _decode(cache, files, lambda name: archive.read(top + name))


def _decode(
    cache: Path, files: dict[str, list[int]], read: Callable[[str], bytes]
) -> decoding.Decoded:
    """Decode the images among `files`, name -> state, as train/CLASS/IMAGE and val/CLASS/IMAGE.

    read gives the content of a file. Training images are ordered by class, and all by the numbers
    in their names. Raises UserError if there are none of a kind, or if one has no known class.
    """
    names = [name for name in decoding.image_names(files) if name.startswith(("train/", "val/"))]
    classes = {name.split("/")[1] for name in names if re.match("train/.*/", name)}
    annotated = {}
    if ANNOTATIONS in files:
        lines = read(ANNOTATIONS).decode().splitlines()
        annotated = dict(line.split()[:2] for line in lines if line.strip())
    found = {}  # as train/CLASS/IMAGE or val/CLASS/IMAGE -> name
    for name in names:
        part, folder, *_ = name.split("/")
        image = name.rpartition("/")[2]
        wnid = folder if folder in classes else annotated.get(image)
        if wnid not in classes:
            raise UserError(f"{name}: class {wnid} has no training images; {EXPECTED}")
        found[f"{part}/{wnid}/{image}"] = name
    lacks = annotated.keys() - {place.rpartition("/")[2] for place in found}
    if lacks or len({place.partition("/")[0] for place in found}) < 2:
        raise UserError(f"{min(lacks, default='a kind of images')} is missing; {EXPECTED}")

    def order(place: str) -> tuple:
        part, wnid, image = place.split("/")
        return part, wnid if part == "train" else "", len(image), image  # val_9, then val_10

    states = {place: files[found[place]] for place in sorted(found, key=order)}
    to_rgb = operator.methodcaller("convert", "RGB")  # of another size, it is a broken image
    return decoding.decode(cache, states, lambda place: read(found[place]), to_rgb, SIZE)
