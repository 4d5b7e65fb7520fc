"""Small image data sets as a user has them on disk: {name: content} of all files, and writers."""

import io
import os
import zipfile

import numpy as np
from PIL import Image

ROOT = "tiny-imagenet-200"


def picture(rng, size=(64, 64), mode="RGB", kind="JPEG", **options):
    """The content of an image file of random pixels; size is width and height."""
    shape = (size[1], size[0]) + (3,) * (mode == "RGB")
    pixels = rng.integers(256, size=shape, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def tiny_imagenet():
    """Tiny ImageNet: 3 classes of 11 images, 12 for validation, not in order of number; litter."""
    rng = np.random.default_rng(0)
    wnids = ["n00000000", "n00000010", "n00000020"]
    files = {f"{ROOT}/wnids.txt": "\n".join(wnids[1:] + wnids[:1]).encode()}  # not sorted
    for wnid in reversed(wnids):
        files[f"{ROOT}/train/{wnid}/{wnid}_boxes.txt"] = b""
        for number in reversed(range(11)):
            content = picture(rng, mode="L" if number == 1 else "RGB")
            files[f"{ROOT}/train/{wnid}/images/{wnid}_{number}.JPEG"] = content
    lines = ""
    for number in reversed(range(12)):
        files[f"{ROOT}/val/images/val_{number}.JPEG"] = picture(rng)
        lines += f"val_{number}.JPEG\t{wnids[number % 3]}\t0\t0\t62\t62\n"
    files[f"{ROOT}/val/val_annotations.txt"] = lines.encode()
    files[f"{ROOT}/test/images/test_0.JPEG"] = picture(rng)
    litter = ["train/Thumbs.db", "val/.DS_Store", "train/n00000010/images/._n00000010_4.JPEG"]
    litter += [f"{part}/.ipynb_checkpoints/images/val_0.JPEG" for part in ("train", "val")]
    files |= {f"{top}{ROOT}/{name}": b"" for name in litter for top in ("", "__MACOSX/")}
    return files


def class_folders(*classes):
    """Five PNG files in each train/CLASS/, and three in each test/CLASS/."""
    rng = np.random.default_rng(0)
    numbers = [("train", number) for number in range(5)] + [("test", number) for number in range(3)]
    return {
        f"{part}/{name}/{number}.png": picture(rng, (16, 12), kind="PNG")
        for name in classes
        for part, number in numbers
    }


class Trace:
    """Unpickling it leaves a trace."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


def write_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(archive, files):
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return archive
