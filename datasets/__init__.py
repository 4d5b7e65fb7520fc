"""Data sets as open-set problems: K known classes, everything else unknown.

To add one: a module with `load` returning `sources.Raw`, and an entry in DATASETS. No "_" in its
name, which separates the parts of a log's name.
"""

import difflib
import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import annotator, augment, cifar, digits, folder, tiny_imagenet
from .augment import Images
from .files import UserError
from .open_set import Split
from .sheets import Sheets
from .sources import Raw


class Dataset(NamedTuple):
    """What the project knows of a data set before reading it."""

    load: Callable  # data_dir -> sources.Raw; of a folder also the size of the images
    mean: tuple  # per channel, of pixels in [0, 1]
    std: tuple
    flip: bool  # whether augmentation mirrors images
    defaults: dict  # arguments whose published value depends on the data set


_PUBLISHED = dict(query_batch=1500, max_epoch=100, model="resnet18", feat_dim=2)
_PUBLISHED |= dict(batch_size=128, lr_model=0.01)

DATASETS = {
    "cifar10": Dataset(
        partial(cifar.load, name="cifar10"),
        *(cifar.MEAN["cifar10"], cifar.STD["cifar10"], True),
        dict(known_class=2, init_percent=1, **_PUBLISHED),
    ),
    "cifar100": Dataset(
        partial(cifar.load, name="cifar100"),
        *(cifar.MEAN["cifar100"], cifar.STD["cifar100"], True),
        dict(known_class=20, init_percent=8, **_PUBLISHED),
    ),
    "TinyImagenet": Dataset(
        tiny_imagenet.load,
        *(tiny_imagenet.MEAN, tiny_imagenet.STD, True),
        dict(known_class=20, init_percent=8, **_PUBLISHED),
    ),
    "digits": Dataset(
        digits.load,
        *(digits.MEAN, digits.STD, False),
        dict(known_class=4, init_percent=20, query_batch=60, max_epoch=40)
        | dict(model="resnet20", feat_dim=0, batch_size=32, lr_model=0.02),
    ),
    "folder": Dataset(
        folder.load,
        *(tiny_imagenet.MEAN, tiny_imagenet.STD, True),
        dict(known_class=None, init_percent=8, query_batch=None, image_size=64, max_epoch=100)
        | dict(model="resnet20", feat_dim=0, batch_size=32, lr_model=0.01),
    ),
}


class OpenSetData(NamedTuple):
    """A data set on the device, with its classes renumbered: known 0..K-1, all unknown K."""

    name: str  # as it stands in a log's name
    train: Images
    targets: Tensor  # (N,) int64 on the device, 0..K
    known: Tensor  # (N,) bool on the CPU: targets < K
    test: Images  # the test images of the known classes only
    test_targets: Tensor  # (M,) int64 on the device, 0..K-1
    classes: tuple[str, ...]  # names, the K known ones first
    num_known: int  # K
    mean: tuple  # per channel, of pixels in [0, 1]
    std: tuple
    identity: str  # 16 hex digits, or a path, that tell it from other data of the same name
    names: tuple[str, ...] = ()  # of the training images, if they are files of the user's
    sheets: Sheets | None = None  # what a person has answered, if one is the oracle
    split: Split | None = None  # who is labeled, invalid and in the pool by these answers
    answers: str = ""  # hex digits that change with the answers or the pool
    left_out: dict[str, str] = {}  # noqa: RUF012  # name -> fault of images that are not used


def create(
    name: str,
    data_dir: str,
    device: torch.device,
    known_class: int | None = None,
    class_seed: int | None = None,
    known: list[str] | None = None,
    image_size: int | None = None,
) -> OpenSetData:
    """Read data set `name` below data_dir once and keep it on the device.

    Known are the classes named by `known`; without it the first `known_class` (None: the default
    of the data set, of a folder half of its classes) in the data set's own order, as published,
    or after shuffling all classes with class_seed. image_size is that of the images of a folder,
    64 by default. Raises UserError in one line if the data cannot be had, or if a run would lack
    an unknown class or images of a known one.
    """
    dataset = DATASETS[name]
    if image_size and name != "folder":
        raise UserError(f"--image-size {image_size}: the images of {name} have a size already")
    size = image_size or dataset.defaults.get("image_size")
    try:
        if name == "folder" and annotator.is_annotated(data_dir):
            return _annotated(dataset, data_dir, size, device)
        raw = dataset.load(Path(data_dir), **({"size": size} if size else {}))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {error.filename or data_dir}: {reason}") from error
    if known_class is None:
        known_class = dataset.defaults["known_class"] or len(raw.classes) // 2
    own = name == "folder"
    name = folder.log_name(data_dir) if own else name
    order, num_known = _order(name, raw.classes, known_class, class_seed, known)
    _check(name, raw, order[:num_known])

    place = np.empty(len(order), np.int64)  # of each class in the order that starts with the known
    place[order] = np.arange(len(order))
    targets = torch.from_numpy(place[raw.train_labels]).clamp(max=num_known)
    test_targets = torch.from_numpy(place[raw.test_labels])
    identity = hashlib.sha256(targets.numpy().tobytes() + test_targets.numpy().tobytes())
    if own:  # another folder may have the same name
        for content in (os.fsencode("/".join(raw.names)), raw.train, raw.test):
            identity.update(content)
    tested = test_targets < num_known
    classes = tuple(raw.classes[label] for label in order)
    raw = raw._replace(test=raw.test[tested.numpy()], classes=classes)
    targets = targets, test_targets[tested]
    return _open_set(dataset, name, raw, targets, num_known, device, identity.hexdigest()[:16])


def _annotated(dataset: Dataset, data_dir: str, size: int, device: torch.device) -> OpenSetData:
    """The images of a folder, with what a person has answered."""
    raw, said, split, left_out = annotator.load(data_dir, size)
    targets = torch.from_numpy(raw.train_labels), torch.from_numpy(raw.test_labels)
    place = os.path.realpath(os.path.expanduser(data_dir))
    name, K = folder.log_name(data_dir), len(raw.classes)
    data = _open_set(dataset, name, raw, targets, K, device, place)
    content = repr((raw.names, said.classes, said.labels, said.test, split.pool.tolist()))
    answers = hashlib.sha256(content.encode(errors="replace")).hexdigest()[:16]
    known = dict(names=raw.names, sheets=said, split=split, answers=answers, left_out=left_out)
    return data._replace(**known)


def _open_set(
    dataset: Dataset,
    name: str,
    raw: Raw,
    targets: tuple[Tensor, Tensor],
    num_known: int,
    device: torch.device,
    identity: str,
) -> OpenSetData:
    """Put images and targets, of the training and of the test images, on the device."""
    padding = raw.train.shape[1] // 8  # the published 4 for CIFAR
    style = dataset.mean, dataset.std, padding, dataset.flip, device
    train, test = (augment.to_device(images, *style) for images in (raw.train, raw.test))
    targets, test_targets = (labels.to(device) for labels in targets)
    known = targets.cpu() < num_known
    sets = train, targets, known, test, test_targets
    return OpenSetData(name, *sets, raw.classes, num_known, dataset.mean, dataset.std, identity)


def _order(
    name: str,
    classes: tuple[str, ...],
    known_class: int,
    class_seed: int | None,
    known: list[str] | None,
) -> tuple[np.ndarray, int]:
    """All labels in the order that starts with the known classes, and the number of these."""
    order = np.arange(len(classes))
    if known is not None:
        for wanted in known:
            if wanted not in classes:
                near = difflib.get_close_matches(wanted, classes, 1) or classes[:10]
                raise UserError(f"--known {wanted}: {name} has no such class; {', '.join(near)}?")
        chosen = np.isin(classes, known)
        order, known_class = np.concatenate([order[chosen], order[~chosen]]), int(chosen.sum())
    elif class_seed is not None:
        order = np.random.default_rng(class_seed).permutation(len(classes))
    if not 0 < known_class < len(classes):
        flag = f"--known-class {known_class}" if known is None else f"--known {','.join(known)}"
        raise UserError(
            f"{flag}: {name} has {len(classes)} classes, of which one at least is unknown: "
            f"choose 1 to {len(classes) - 1}"
        )
    return order, known_class


def _check(name: str, raw: Raw, known: np.ndarray) -> None:
    """Raise UserError if a known class lacks images, or if no training image is unknown."""
    for kind, labels in (("training", raw.train_labels), ("test", raw.test_labels)):
        if missing := [raw.classes[label] for label in known if label not in labels]:
            raise UserError(f"{name} has no {kind} images of known classes: {', '.join(missing)}")
    if np.isin(raw.train_labels, known).all():
        raise UserError(f"{name} has no training image of an unknown class")
