"""A folder of the user's own images, whose classes are folders: the oracle knows all labels.

DIR/train/CLASS/... are the training images, DIR/test/CLASS/... (or DIR/val/CLASS/...) the test
images, at any depth below CLASS.
"""

import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode, functional

from errors import UserError, tell

from . import decoding
from .files import one_at_a_time
from .raw import Items, Raw
from .sheets import composed

TURNS = dict(zip(range(2, 9), (0, 3, 1, 5, 4, 6, 2), strict=True))  # EXIF -> Image.Transpose


class Crop(NamedTuple):
    """How an image becomes square: its shorter side is resized, and the center is cropped."""

    crop: int  # pixels
    resize: int
    interpolation: InterpolationMode = InterpolationMode.BILINEAR


def load(data_dir: Path, size: int | Crop = 64) -> Raw:
    """Training and test images of size x size pixels, or cropped, each in the order of their names.

    Classes are ordered by name; a class may lack training or test images. Raises UserError if
    there are no images or broken ones, and OSError.
    """
    files, _ = list_images(data_dir)
    train, test, val = (
        [name for name in files if re.match(f"{part}/.*/", name)]
        for part in ("train", "test", "val")
    )
    test = test or val
    if not train or not test:
        raise UserError(f"{data_dir} needs images in train/CLASS/ and test/CLASS/, or labels.csv")
    if others := len(files) - len(train) - len(test):
        tell(f"note: {others} images in {data_dir} are in no train/CLASS/ or test/CLASS/")
    chosen = {name: files[name] for name in train + test}
    return decoding.by_class_folder(read(data_dir, chosen, size))


def items(data_dir: Path, size: int | Crop) -> Items:
    """All images below data_dir, for a person to label."""
    files, others = list_images(data_dir)

    def numbers() -> tuple[np.ndarray, dict[str, str]]:
        decoded = read(data_dir, files, size, skip_broken=True)
        return decoded.pixels, decoded.broken

    return Items(folder=data_dir, names=files, pictures=files, others=others, read=numbers)


def list_images(data_dir: Path) -> tuple[dict[str, list[int]], list[str]]:
    """Image files below data_dir, and the names of all other files there.

    Names are relative, with "/"; those of images, sorted, have the state that `decoding.walk`
    gives. Others than sheets and pages are counted in a note. Raises OSError.
    """
    found = decoding.walk(data_dir)
    images = decoding.image_names(name for name in found if found[name])
    others = sorted(found.keys() - images)
    if ignored := sum(not name.endswith((".csv", ".html")) for name in others):
        tell(f"note: ignored {ignored} files in {data_dir} that are not images")
    return {name: found[name] for name in images}, [name for name in others if found[name]]


def read(
    data_dir: Path, files: dict[str, list[int]], size: int | Crop, skip_broken: bool = False
) -> decoding.Decoded:
    """Decode these files, or map the cache if an earlier start has decoded the same ones.

    Raises UserError that names broken images; with skip_broken, returns all but those.
    """
    remarks, plain = [], isinstance(size, int)
    crop, resize, interpolation = Crop(size, size) if plain else size

    def content(name: str) -> bytes:
        name.encode()  # an image is broken if its name is not Unicode: no sheet can hold it
        return (data_dir / name).read_bytes()

    def fit(image: Image.Image) -> Image.Image:
        image = functional.resize(upright(image, remarks.append), resize, interpolation)
        return functional.center_crop(image, crop)

    name = size if plain else f"{crop}-{resize}-{interpolation.value}"
    cache = data_dir / f".lfosa-cache-{name}.npy"
    with one_at_a_time(data_dir / ".lfosa-cache.lock"):
        decoded = decoding.decode(cache, files, content, fit, crop, skip_broken)
    for remark, count in sorted(Counter(remarks).items()):
        tell(f"note: {count} images in {data_dir} {remark}")
    return decoded


def log_name(data_dir: Path, mark: str) -> str:
    """A name for logs that no other data have: the folder's own, and `mark`.

    "-" stands for all but letters, digits, "." and "-".
    """
    name = unicodedata.normalize("NFC", os.path.basename(os.path.abspath(data_dir)))
    name = re.sub(r"^\.|[^\w.-]|_", "-", name)[:40] or "folder"
    name = name.encode()[:80].decode(errors="ignore")  # a log's name has 255 bytes at most
    return f"{name}-{mark}"


def class_names(parts: list[str], classes: Collection[str]) -> list[str]:
    """The names in a list that was split at commas, of which a class's name may have some.

    A name that is typed in another form of Unicode, or with spaces around it, is spelled as in
    `classes`.
    """
    spelled, names = {composed(name): name for name in classes}, []
    spelled |= {name: name for name in classes}
    while parts:
        typed = [",".join(parts[:end]) for end in range(len(parts), 0, -1)]  # the longest first
        found = [spelled.get(text) or spelled.get(composed(text)) for text in typed]
        end, name = next(((len(parts) - i, x) for i, x in enumerate(found) if x), (1, parts[0]))
        names.append(name)
        parts = parts[end:]
    return names


def upright(image: Image.Image, remark: Callable[[str], object] = lambda _: None) -> Image.Image:
    """The PIL image in RGB of 8 bits, turned as its EXIF data say, on white if it is transparent.

    remark is called with what a user should know of this image, which follows "images".
    """
    # MPO: a phone's picture with its depth or brightness. PSD: the first one shows all layers.
    if image.format not in ("MPO", "PSD") and _lenient(lambda: image.is_animated):
        remark("have further pages or frames: the first one is used")
    if ";16" in str(getattr(image, "tile", "")) and not image.mode.startswith("I"):
        remark("have 16 bits per color: the upper 8 are used")
    image.load()
    # An image may be fine although its EXIF data are damaged; then it is not rotated.
    turn = _lenient(lambda: TURNS.get(image.getexif().get(ExifTags.Base.Orientation)))
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), remark))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            remark("are transparent in places: drawn on white")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _lenient(read: Callable) -> Any:
    """What `read` returns, or None if it finds faulty data."""
    try:
        return read()
    except MemoryError:
        raise
    except Exception:  # Pillow names no common class for broken input
        return None


def _eight_bits(values: np.ndarray, remark: Callable[[str], object]) -> np.ndarray:
    """Grey values of any range as (H, W) uint8: at least 32 levels, if there are as many.

    What is within 0 to 255 stays as it is, fractions from 0 to 1 are multiplied by 256. Else black
    is 0, or the smallest value if that is negative or above three quarters of the largest; white is
    the next power of two above the largest. So 16 bits keep their upper eight.
    """
    whole, values = values.dtype.kind != "f", values.astype(np.float32)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    black, white = 0.0, 256.0
    if low >= 0 and not whole and 1 / 16 < high <= 1:
        white = 1.0
    elif low < 0 or high >= 256 or (not whole and high < 16):
        if low < 0 or 4 * (high - low) < high:
            black = low
        above = high - black + (1 if whole else 1e-30)
        white = 2.0 ** max(math.ceil(math.log2(above)), 8 if whole else -99)
    if (black, white) != (0, 256):
        remark(
            "have other values than 0 to 255: each is scaled so that 0 (or its smallest value) is "
            "black, and the next power of two (of fractions 1) white"
        )
    scaled = (np.nan_to_num(values, nan=black, posinf=high, neginf=low) - black) * (256 / white)
    return scaled.clip(0, 255).astype(np.uint8)
