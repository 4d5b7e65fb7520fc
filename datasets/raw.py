"""The form in which every loader returns a data set."""

from typing import NamedTuple

import numpy as np


class Raw(NamedTuple):
    """A data set as a loader returns it. Labels are positions in `classes`."""

    train: np.ndarray  # images (N, H, W, 3) uint8, or vectors (N, D) of floats
    train_labels: np.ndarray  # (N,) int64
    test: np.ndarray  # likewise (M, ...)
    test_labels: np.ndarray  # (M,) int64
    classes: tuple[str, ...]
    names: tuple[str, ...] = ()  # of the N + M image files, if there are such
