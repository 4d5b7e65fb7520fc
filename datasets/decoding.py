"""Image files, decoded once by several threads into one array that later starts map into memory.

The array lies in a cache: a single file, so it is either complete or missing. It is a .npy file,
followed by JSON that says what it was made of.
"""

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import UserError, tell

from .files import write_whole
from .raw import Raw


class Decoded(NamedTuple):
    """Decoded image files, and what the JSON of the cache says about them."""

    pixels: np.ndarray  # (number of files - number of broken ones, size, size, 3) uint8
    files: dict[str, int]  # name -> bytes of every file
    broken: dict[str, str]  # name -> fault of the files that have no row in pixels


def walk(folder: Path | str, below: str = "") -> dict[str, int]:
    """All files below a folder: relative name with "/" -> bytes, in any order.

    Follows links; leaves out hidden files and folders. Raises OSError.
    """
    files = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                files |= walk(entry.path, f"{below}{entry.name}/")
            else:
                files[below + entry.name] = entry.stat().st_size
    return files


def pictures(names: Iterable[str]) -> list[str]:
    """The names of image files, sorted: not hidden, with an ending that Pillow reads."""
    kinds = Image.registered_extensions().items()
    endings = tuple(end for end, kind in kinds if kind in Image.OPEN)
    return sorted(x for x in names if x.lower().endswith(endings) and "/." not in f"/{x}")


def by_class_folder(decoded: Decoded) -> Raw:
    """Read parts and labels off the names: train/CLASS/... first, then those of the test images."""
    parts = [name.split("/") for name in decoded.files]
    count = sum(part == "train" for part, *_ in parts)
    classes, labels = np.unique([name for _, name, *_ in parts], return_inverse=True)
    train, test = decoded.pixels[:count], decoded.pixels[count:]
    names, classes = tuple(decoded.files), tuple(classes.tolist())
    return Raw(train, labels[:count], test, labels[count:], classes, names)


def cached(cache: Path) -> Decoded:
    """Return what `decode` wrote, the pixels memory-mapped and read-only.

    Raises UserError if there is no whole cache, and OSError.
    """
    try:
        pixels = np.lib.format.open_memmap(cache, mode="r")
        with open(cache, "rb") as file:
            file.seek(pixels.offset + pixels.nbytes)
            return Decoded(pixels, **json.load(file))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise UserError("it is not whole, or from an earlier version") from error


def decode(
    cache: Path,
    files: dict[str, int],
    read: Callable[[str], bytes],
    convert: Callable,
    size: int,
    leave_out: bool = False,
) -> Decoded:
    """Decode `files`, name -> bytes, in this order. If the cache was made of the same, map it.

    read gives the content of a file; convert makes a PIL image one of size x size pixels in RGB.
    Several threads call both. Raises UserError that names up to ten broken images, or with
    leave_out returns the others; raises OSError if a file cannot be read.
    """
    with contextlib.suppress(UserError):
        found = cached(cache)
        same = list(found.files.items()) == list(files.items())
        if same and (leave_out or not found.broken):
            return found
        del found  # Windows replaces no file that is mapped
        if not same:
            tell(f"note: {cache} was made of other files than there are now: decoding again")
    pixels = np.zeros((len(files), size, size, 3), np.uint8)

    def fill(row: int, name: str) -> str:
        """Decode one image into its row; return what is wrong with it."""
        try:
            with Image.open(io.BytesIO(read(name))) as image:
                pixels[row] = convert(image)
        except Exception as error:  # Pillow and zipfile name no common class for broken input
            if getattr(error, "errno", None):  # no right to read it, or the disk: no broken image
                raise
            return str(error).partition(" <")[0] or type(error).__name__
        return ""

    with ThreadPool(min(8, os.cpu_count() or 1)) as threads:  # Pillow releases the GIL
        faults = threads.imap(lambda item: fill(*item), enumerate(files), chunksize=32)
        bar = tqdm(faults, "decoding", len(files), unit=" images", disable=None)
        broken = {name: fault for name, fault in zip(files, bar, strict=True) if fault}
    if broken and not leave_out:
        first = ", ".join(f"{name} ({fault})" for name, fault in list(broken.items())[:10])
        raise UserError(f"{len(broken)} of {len(files)} images are broken: {first}")
    if broken:
        pixels = pixels[[name not in broken for name in files]]

    def write(file: BinaryIO) -> None:
        np.save(file, pixels)
        file.write(json.dumps({"files": files, "broken": broken}).encode())

    try:
        write_whole(cache, write)
    except UserError as error:
        tell(f"note: {error}: the decoded images stay in memory")
        return Decoded(pixels, files, broken)
    return cached(cache)
