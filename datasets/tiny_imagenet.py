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
    folders = [data_dir / FOLDER, data_dir / FOLDER / FOLDER, data_dir]
    folders = [path for path in folders if (path / "train").is_dir()]
    with one_at_a_time(data_dir / f".{FOLDER}.lock"):
        sources = [*folders, *(path for path in (archive, cache) if path.exists())]
        if not archive.exists() and not folders:
            sources.append(archive)
        decoded = first_sound(sources, partial(_decode, cache), MD5, f"{_REMEDY}{data_dir}")
    return images.labeled(decoded)


def _decode(cache: Path, source: Path) -> images.Decoded:
    """Return the images of a source, from the cache if it was made of the same files."""
    if source == cache:
        if decoded := images.cached(cache, SIZE):
            return decoded
        raise OSError("it is not whole, or of an earlier version")
    if not source.is_dir():
        fetch(URL, source, MD5)
    with _opened(source) as (sizes, read):
        names = _labeled(sizes, read)
        files = {place: sizes[name] for place, name in names.items()}
        if decoded := images.cached(cache, SIZE, files):
            return decoded
        if other := other_md5(source, MD5):
            note(f"{source} is not the published file{other}; it is used if it is sound")
        counts = Counter(place.split("/")[1] for place in names if place.startswith("train/"))
        least, most = min(counts.values()), max(counts.values())
        if least < most:  # perhaps not all was extracted
            note(f"{source} has {least} to {most} training images per class")
        return images.decode(cache, files, lambda place: read(names[place]), _exact, SIZE)


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


def _labeled(files: dict[str, int], read: Callable[[str], bytes]) -> dict[str, str]:
    """Find all images: train/CLASS/IMAGE or val/CLASS/IMAGE -> name of the file.

    Training images are ordered by class, then by number, validation images by number. Raises
    UserError if there are none of a kind, or if the class of one is not known.
    """
    names = [name for name in images.pictures(files) if name.startswith(("train/", "val/"))]
    in_classes = [name for name in names if name.startswith("train/") and name.count("/") > 1]
    classes = {name.split("/")[1] for name in in_classes}
    annotated = {}
    if _ANNOTATIONS in files:
        lines = read(_ANNOTATIONS).decode().splitlines()
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
        raise UserError(f"it lacks {len(missing)} images of {_ANNOTATIONS}, such as {missing[0]}")
    parts = Counter(place.split("/")[0] for place in found)
    if len(parts) < 2:
        raise UserError(f"it has {parts['train']} training and {parts['val']} validation images")

    def order(place: str) -> tuple:
        part, wnid, image = place.split("/")
        number = re.split(r"(\d+)", image)
        number[1::2] = map(int, number[1::2])  # val_9 comes before val_10
        return part, wnid if part == "train" else "", number, wnid

    return {place: found[place] for place in sorted(found, key=order)}


def _exact(image):
    """The PIL image in RGB; raises ValueError if it has another size than published."""
    if image.size != (SIZE, SIZE):
        raise ValueError("{}x{} instead of 64x64 pixels".format(*image.size))
    return image.convert("RGB")
