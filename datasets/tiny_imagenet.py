"""Tiny ImageNet (Stanford CS231n, 2015): 200 classes, 500 training and 50 validation images each.

The validation images are the test set, for the labels of the test images were never published.
"""

import contextlib
import operator
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from . import images
from .files import UserError, one_at_a_time
from .sources import Published, Raw, expand, first_sound, note_other_md5

SIZE = 64  # pixels, height and width of every image
MEAN = (0.485, 0.456, 0.406)  # per channel, of pixels in [0, 1]: the usual ones of ImageNet
STD = (0.229, 0.224, 0.225)

ANNOTATIONS = "val/val_annotations.txt"  # lines of: image, class, box
PUBLISHED = Published(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "90528d7ca1a48142e341f4ef8d21d0de",
    folder="tiny-imagenet-200",
    marker="train",
    expected="expected are train/CLASS/images/*.JPEG and either val/images/*.JPEG with "
    f"{ANNOTATIONS} or val/CLASS/*.JPEG; ",
)


def load(data_dir: Path) -> Raw:
    """Training and test images below data_dir; of the published files 100,000 and 10,000.

    Reads the folder tiny-imagenet-200, data_dir itself, tiny-imagenet-200.zip, which is downloaded
    if nothing is there, or what an earlier start has decoded into tiny-imagenet-200.npy. Raises
    UserError if no images can be had, and OSError.
    """
    data_dir = expand(data_dir)
    cache = data_dir / f"{PUBLISHED.folder}.npy"
    with one_at_a_time(data_dir / f".{PUBLISHED.folder}.lock"):
        return images.labeled(first_sound(data_dir, PUBLISHED, partial(_decode, cache), cache))


def _decode(cache: Path, source: Path) -> images.Decoded:
    """Return the images of a source, from the cache if it was made of the same files."""
    if source == cache:
        if decoded := images.cached(cache, SIZE):
            return decoded
        raise UserError("it is not whole, or of an earlier version")
    with _opened(source) as (sizes, read):
        names = _labeled(sizes, read)
        files = {place: sizes[name] for place, name in names.items()}
        if decoded := images.cached(cache, SIZE, files):
            return decoded
        note_other_md5(source, PUBLISHED.md5)
        to_rgb = operator.methodcaller("convert", "RGB")  # of another size, it is a broken image
        return images.decode(cache, files, lambda place: read(names[place]), to_rgb, SIZE)


@contextlib.contextmanager
def _opened(source: Path) -> Iterator[tuple[dict[str, int], Callable[[str], bytes]]]:
    """Yield name -> bytes of the files in train/ and val/, and what reads one of them."""
    if source.is_dir():
        files = images.walk(source / "train", "train/") | images.walk(source / "val", "val/")
        yield files, lambda name: (source / name).read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        sizes = {member.filename: member.file_size for member in archive.infolist()}
        tops = [name.partition("train/")[0] for name in sizes if "train/" in name]
        top = min(tops, key=len, default="")  # archives of mirrors have another one, or none
        inside = {name.removeprefix(top): size for name, size in sizes.items()}
        files = {name: inside[name] for name in inside if name.startswith(("train/", "val/"))}
        yield files, lambda name: archive.read(top + name)


def _labeled(files: dict[str, int], read: Callable[[str], bytes]) -> dict[str, str]:
    """Find all images: train/CLASS/IMAGE or val/CLASS/IMAGE -> name of the file.

    Ordered by the numbers in their names, which is by class for the training images. Raises
    UserError if there are none of a kind, or if the class of one is not known.
    """
    names = images.pictures(files)
    classes = {name.split("/")[1] for name in names if re.match("train/.*/", name)}
    annotated = {}
    if ANNOTATIONS in files:
        lines = read(ANNOTATIONS).decode().splitlines()
        annotated = dict(line.split()[:2] for line in lines if line.strip())
    found = {}
    for name in names:
        part, folder, *_ = name.split("/")
        image = name.rpartition("/")[2]
        wnid = folder if folder in classes else annotated.get(image)
        if wnid not in classes:
            raise UserError(f"{name} is of class {wnid}, which has no training images")
        found[f"{part}/{wnid}/{image}"] = name
    if missing := sorted(annotated.keys() - {place.split("/")[2] for place in found}):
        raise UserError(f"it lacks {len(missing)} images of {ANNOTATIONS}, such as {missing[0]}")
    if len({place.split("/")[0] for place in found}) < 2:
        raise UserError("it lacks training or validation images")

    def order(place: str) -> tuple:
        part, wnid, image = place.split("/")
        number = re.split(r"(\d+)", image)
        number[1::2] = map(int, number[1::2])  # val_9 comes before val_10
        return part, number, wnid

    return {place: found[place] for place in sorted(found, key=order)}
