"""A folder of images of which few are labeled: a person is the oracle, and answers in sheets."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from errors import UserError

from . import folder, sheets
from .open_set import Split
from .raw import Raw


def load(data_dir: Path, size: int) -> tuple[Raw, dict]:
    """All images below data_dir as training images, those of test.csv as test images, both sorted.

    Labels of training images that are of no known class are K. Broken images are left out. Returns
    also the last fields of OpenSetData, by name. Raises UserError if a sheet is faulty or if no
    labeled image can be read, and OSError.
    """
    if not os.access(data_dir, os.W_OK):  # told before the round rather than after it
        raise UserError(f"cannot write to {data_dir}, where the query sheets go")
    files = folder.list_images(data_dir)
    said = sheets.read(data_dir, files)
    decoded = folder.read(data_dir, files, size, leave_out=True)
    names = [name for name in files if name not in decoded.broken]
    position = {name: i for i, name in enumerate(names)}
    number = {name: label for label, name in enumerate(said.classes)}
    labels = np.array([number.get(said.labels.get(name), len(number)) for name in names], np.int64)
    labeled = np.flatnonzero(labels < len(number))
    if not len(labeled):
        raise UserError("labels.csv gives a class to no image that can be read")
    unknown = [name for name, label in said.labels.items() if label == sheets.UNKNOWN]
    invalid = [position[name] for name in unknown if name in position]  # in order of the answers
    pool = [i for i, name in enumerate(names) if name not in said.taken]
    split = Split(*(torch.tensor(part, dtype=torch.int64) for part in (labeled, invalid, pool)))
    test = [i for i, name in enumerate(names) if name in said.test]
    test_labels = np.array([number[said.test[names[i]]] for i in test], np.int64)
    raw = Raw(decoded.pixels, labels, decoded.pixels[test], test_labels, said.classes)
    content = repr((names, said.classes, said.labels, said.test, pool))
    answers = hashlib.sha256(content.encode()).hexdigest()[:16]
    more = {"names": tuple(names), "sheets": said, "split": split}
    return raw, more | {"answers": answers, "left_out": decoded.broken}
