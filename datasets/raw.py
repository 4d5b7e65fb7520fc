"""The form in which every loader returns a data set."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Raw(NamedTuple):
    """A data set as a loader returns it. Labels are positions in `classes`."""

    train: np.ndarray  # images (N, H, W, 3) uint8; once embedded, vectors (N, D) of floats
    train_labels: np.ndarray  # (N,) int64
    test: np.ndarray  # likewise (M, ...)
    test_labels: np.ndarray  # (M,) int64
    classes: tuple[str, ...]
    digest: str = ""  # hex digits that change with the files, where a user can change them


class Items(NamedTuple):
    """What a person labels."""

    folder: Path  # with the person's sheets
    names: Collection[str]
    pictures: Collection[str]  # the file to look at for each name, or "" if there is none
    others: list[str]  # names of other files in the folder, which may be copies of sheets
    read: Callable[[], tuple[np.ndarray, dict[str, str]]]  # Raw.train; faults of unreadable items
    columns: dict[str, list[str]] = {}  # noqa: RUF012  # what else a sheet tells of each item
