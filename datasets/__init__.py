"""Data sets as open-set problems: K known classes, everything else unknown.

To add one: a module with `load` returning uint8 arrays, and an entry in DATASETS. No "_" in its
name, which separates the parts of a log's name.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import augment, cifar, digits, tiny_imagenet
from .augment import Images
from .files import DataError


class Dataset(NamedTuple):
    """What the project knows of a data set before reading it."""

    load: Callable  # data_dir -> train images (N, H, W, 3) uint8, labels (N,) int64; test likewise
    num_classes: int
    mean: tuple  # per channel, of pixels in [0, 1]
    std: tuple
    padding: int  # pixels of zero padding of the random crop
    flip: bool  # whether augmentation mirrors images
    defaults: dict  # arguments whose published value depends on the data set


_PUBLISHED = dict(query_batch=1500, max_epoch=100, model="resnet18", feat_dim=2)
_PUBLISHED |= dict(batch_size=128, lr_model=0.01)

DATASETS = {
    "cifar10": Dataset(
        partial(cifar.load, name="cifar10"),
        *(10, cifar.MEAN["cifar10"], cifar.STD["cifar10"], 4, True),
        dict(known_class=2, init_percent=1, **_PUBLISHED),
    ),
    "cifar100": Dataset(
        partial(cifar.load, name="cifar100"),
        *(100, cifar.MEAN["cifar100"], cifar.STD["cifar100"], 4, True),
        dict(known_class=20, init_percent=8, **_PUBLISHED),
    ),
    "TinyImagenet": Dataset(
        tiny_imagenet.load,
        *(200, tiny_imagenet.MEAN, tiny_imagenet.STD, 8, True),
        dict(known_class=20, init_percent=8, **_PUBLISHED),
    ),
    "digits": Dataset(
        digits.load,
        *(10, digits.MEAN, digits.STD, 1, False),
        dict(known_class=4, init_percent=20, query_batch=60, max_epoch=40)
        | dict(model="resnet20", feat_dim=0, batch_size=32, lr_model=0.02),
    ),
}


class OpenSetData(NamedTuple):
    """A data set on the device, with its classes renumbered: known 0..K-1, all unknown K."""

    train: Images
    targets: Tensor  # (N,) int64 on the device, 0..K
    known: Tensor  # (N,) bool on the CPU: targets < K
    test: Images  # the test images of the known classes only
    test_targets: Tensor  # (M,) int64 on the device, 0..K-1


def create(
    name: str, data_dir: str, known_class: int, class_seed: int | None, device: torch.device
) -> OpenSetData:
    """Read data set `name` below data_dir once and keep it on the device.

    Known are the classes 0..known_class-1 in the data set's own order (as published), or the
    first ones after shuffling all classes with class_seed. Raises DataError in one line where
    the data cannot be had or `known_class` leaves no unknown class.
    """
    dataset = DATASETS[name]
    if not 0 < known_class < dataset.num_classes:
        raise DataError(
            f"--known-class {known_class}: {name} has {dataset.num_classes} classes, "
            f"so choose 1 to {dataset.num_classes - 1}"
        )
    train, train_labels, test, test_labels = dataset.load(Path(data_dir).expanduser())
    place = np.arange(dataset.num_classes)  # of each class in the order that starts with the known
    if class_seed is not None:
        order = np.random.default_rng(class_seed).permutation(dataset.num_classes)
        place[order] = np.arange(dataset.num_classes)
    targets = torch.from_numpy(place[train_labels]).clamp(max=known_class)
    test_targets = torch.from_numpy(place[test_labels])
    test_known = test_targets < known_class

    def to_device(images: np.ndarray) -> Images:
        style = (dataset.mean, dataset.std, dataset.padding, dataset.flip)
        return augment.to_device(images, *style, device)

    return OpenSetData(
        to_device(train),
        targets.to(device),
        targets < known_class,
        to_device(test[test_known.numpy()]),
        test_targets[test_known].to(device),
    )
