"""A folder of the user's own images, whose classes are folders: the oracle knows all labels.

DIR/train/CLASS/... are the training images, DIR/test/CLASS/... (or DIR/val/CLASS/...) the test
images, at any depth below CLASS.
"""

import os
import re
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torchvision.transforms import functional

from . import images
from .files import UserError, one_at_a_time, tell
from .sources import Raw


def load(data_dir: Path, size: int = 64) -> Raw:
    """Training and test images of size x size pixels, each in the order of their names.

    Classes are ordered by name; a class may lack training or test images. Raises UserError if
    there are no images or broken ones, and OSError.
    """
    files = list_images(data_dir)
    train, test, val = (
        [name for name in files if re.match(f"{part}/.*/", name)]
        for part in ("train", "test", "val")
    )
    test = test or val
    if not train or not test:
        raise UserError(f"{data_dir} needs images in train/CLASS/ and test/CLASS/, or labels.csv")
    if others := len(files) - len(train) - len(test):
        tell(f"note: {others} images in {data_dir} are in no train/CLASS/ or test/CLASS/")
    return images.labeled(read(data_dir, {name: files[name] for name in train + test}, size))


def list_images(data_dir: Path) -> dict[str, int]:
    """Image files below data_dir, by name: relative, with "/" -> bytes. Hidden ones are left out.

    Other files are ignored, and counted in a note. Raises OSError.
    """
    found = images.walk(data_dir)
    names = images.pictures(found)
    own = (".csv", ".html")  # sheets and pages
    others = sum(not name.endswith(own) for name in found) - len(names)
    if others:
        tell(f"note: {others} files in {data_dir} are no images: ignored")
    return {name: found[name] for name in names}


def read(
    data_dir: Path, files: dict[str, int], size: int, leave_out: bool = False
) -> images.Decoded:
    """Decode these files, or map the cache if an earlier start has decoded the same ones.

    Raises UserError that names broken images; with leave_out, returns all but those.
    """
    cache = data_dir / f".lfosa-cache-{size}.npy"
    fit = partial(_fit, size=size)

    def content(name: str) -> bytes:
        name.encode()  # an image is broken if its name is not Unicode: no sheet can hold it
        return (data_dir / name).read_bytes()

    with one_at_a_time(data_dir / ".lfosa-cache.lock"):
        return images.decode(cache, files, content, fit, size, leave_out)


def log_name(data_dir: Path) -> str:
    """The folder's own name, with "-" for all but ASCII letters, digits, "." and "-"."""
    name = os.path.basename(os.path.abspath(data_dir))
    return re.sub(r"^\.|[^a-zA-Z0-9.-]", "-", name) or "folder"


def upright(image: Image.Image) -> Image.Image:
    """The PIL image turned as its EXIF data say, in RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's conversion would make nearly everything white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _fit(image: Image.Image, size: int) -> Image.Image:
    """The PIL image upright, in RGB, its shorter side resized to `size`, and centre cropped."""
    return functional.center_crop(functional.resize(upright(image), size), size)
