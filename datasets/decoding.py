"""Image files, decoded once by several threads into one array that later starts map into memory.

The array lies in a cache: a single file, so it is either complete or missing. It is a .npy file,
followed by JSON that says what it was made of.
"""

import contextlib
import hashlib
import io
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from errors import UserError, tell

from .files import write_whole
from .raw import Raw

# What network storage, Windows and macOS put into folders: thumbnails, recycle bins, snapshots.
SYSTEM = {"@eadir", "@tmp", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}
SYSTEM |= {"~snapshot", "$recycle.bin", "lost+found"}
SYSTEM |= {"system volume information", "network trash folder", "temporary items", "__macosx"}
BINS = {"recycler", "recycle bin", "trashbox"}  # only at the top: a class may have such a name


class Decoded(NamedTuple):
    """Decoded image files, and what the JSON of the cache says about them."""

    pixels: np.ndarray  # (number of files - number of broken ones, size, size, 3) uint8
    files: dict[str, list[int]]  # name -> state of every file, see `walk`
    broken: dict[str, str]  # name -> fault of the files that have no row in pixels
    digest: str = ""  # hex digits that change with the names and contents of the files


def walk(folder: Path | str, below: str = "") -> dict[str, list[int]]:
    """All files below a folder: relative name with "/" -> state, in any order.

    The state changes with the content: bytes, times of change of the content and of the file in ns.
    It is empty for what is no file, such as a pipe. Follows links, of which only those of images
    must lead to a file; skips hidden files and folders, and those of the system. Raises OSError.
    """
    files = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name.casefold()
            if name.startswith(".") or name in SYSTEM or (not below and name in BINS):
                continue
            if entry.is_dir():
                files |= walk(entry.path, f"{below}{entry.name}/")
                continue
            state = []
            if entry.is_file() or image_names([entry.name]):
                found = entry.stat()
                if stat.S_ISREG(found.st_mode):
                    state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
            files[below + entry.name] = state
    return files


def image_names(names: Iterable[str]) -> list[str]:
    """Those of image files, sorted: not hidden, with an ending that Pillow reads."""
    kinds = Image.registered_extensions().items()
    endings = tuple(end for end, kind in kinds if kind in Image.OPEN)
    return sorted(x for x in names if x.lower().endswith(endings) and "/." not in f"/{x}")


def by_class_folder(decoded: Decoded) -> Raw:
    """Read parts and labels off the names: train/CLASS/... first, then those of the test images."""
    parts = [name.split("/") for name in decoded.files]
    count = sum(part == "train" for part, *_ in parts)
    classes, labels = np.unique([name for _, name, *_ in parts], return_inverse=True)
    return Raw(
        train=decoded.pixels[:count],
        train_labels=labels[:count],
        test=decoded.pixels[count:],
        test_labels=labels[count:],
        classes=tuple(classes.tolist()),
        digest=decoded.digest,
    )


def cached(cache: Path) -> Decoded:
    """Return what `decode` wrote, the pixels memory-mapped and read-only.

    Raises UserError if there is no whole cache, and OSError.
    """
    try:
        pixels = np.lib.format.open_memmap(cache, mode="r")
        with open(cache, "rb") as file:
            file.seek(pixels.offset + pixels.nbytes)
            return Decoded(pixels=pixels, **json.load(file))
    except (FileNotFoundError, ValueError, TypeError) as error:
        raise UserError("it is incomplete, or from an earlier version") from error


def decode(
    cache: Path,
    files: dict[str, list[int]],
    read: Callable[[str], bytes],
    convert: Callable,
    size: int,
    skip_broken: bool = False,
) -> Decoded:
    """Decode `files`, name -> state, in this order. If the cache was made of the same, map it.

    read gives the content of a file; convert makes a PIL image one of size x size pixels in RGB.
    Several threads call both. Raises UserError that names up to ten broken images, or with
    skip_broken returns the others; raises OSError or MemoryError if the machine is at fault. What
    was broken is tried again each time: a decoder may have been installed.
    """
    sums = {}  # name -> checksum of the content
    fill = partial(_fill, read, convert, sums)
    if cache.exists():
        same, row = False, np.empty((size, size, 3), np.uint8)
        with contextlib.suppress(UserError):
            found = cached(cache)
            same = list(found.files.items()) == list(files.items())
            wanted = same and (skip_broken or not found.broken)
            if wanted and all(fill(row, name) for name in found.broken):
                return found
            del found  # Windows replaces no file that is mapped
        if not same:
            tell(f"note: {cache} was made of other files, or by another version: decoding again")
    pixels = np.zeros((len(files), size, size, 3), np.uint8)
    with ThreadPool(min(8, os.cpu_count() or 1)) as threads:  # Pillow releases the GIL
        rows = zip(pixels, files, strict=True)
        faults = threads.imap(lambda item: fill(*item), rows, chunksize=32)
        bar = tqdm(faults, "decoding", len(files), unit=" images", disable=None)
        broken = {name: fault for name, fault in zip(files, bar, strict=True) if fault}
    if broken and not skip_broken:
        first = ", ".join(f"{name} ({fault})" for name, fault in list(broken.items())[:10])
        raise UserError(f"{len(broken)} of {len(files)} images are broken: {first}")
    if broken:
        pixels = pixels[[name not in broken for name in files]]
    content = json.dumps([(name, sums.get(name)) for name in files])
    digest = hashlib.sha256(content.encode()).hexdigest()
    about = {"files": files, "broken": broken, "digest": digest}

    def write(file: BinaryIO) -> None:
        np.save(file, pixels)
        file.write(json.dumps(about).encode())

    try:
        write_whole(cache, write)
    except UserError as error:
        tell(f"note: {error}: the decoded images stay in memory")
        return Decoded(pixels=pixels, **about)
    return cached(cache)


def _fill(read: Callable, convert: Callable, sums: dict, row: np.ndarray, name: str) -> str:
    """Decode one image into a row of the pixels; return what is wrong with the file, or ""."""
    try:
        content = read(name)
        sums[name] = zlib.crc32(content)
        with Image.open(io.BytesIO(content)) as image:
            row[...] = convert(image)
    except Exception as error:  # Pillow and zipfile name no common class for broken input
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise  # no right to read it, or the disk: no broken image
        return str(error).partition(" <")[0] or type(error).__name__
    return ""
