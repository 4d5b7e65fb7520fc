"""Data sets as open-set problems: K known classes, everything else unknown.

To add one: a module with `load` returning `raw.Raw`, and an entry in DATASETS. Its name must
not contain "_", which separates the parts of a log's name.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor

from errors import UserError
from models import augment, vectors
from models.augment import Images
from models.vectors import Embeddings

from . import annotator, cifar, digits, embeddings, folder, tiny_imagenet
from .encoder import Encoder
from .folder import Crop
from .open_set import Split
from .raw import Raw
from .sheets import Sheets


class Dataset(NamedTuple):
    """What the project knows of a data set before reading it."""

    load: Callable  # takes data_dir, for a folder the image size too; returns raw.Raw
    defaults: dict  # arguments whose published value depends on the data set
    mean: tuple = ()  # of images: per channel, of pixels in [0, 1]
    std: tuple = ()
    flip: bool = True  # whether augmentation mirrors images
    class_ids: Callable | None = None  # data_dir -> classes by id; None: in the data set's order


_PUBLISHED = dict(query_batch=1500, max_epoch=100, model="resnet18", feat_dim=2)
_PUBLISHED |= dict(batch_size=128, lr_model=0.01)
_SMALL = dict(max_epoch=100, model="resnet20", feat_dim=0, batch_size=32, lr_model=0.01)
_IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

MLP_DEFAULTS = dict(model="mlp", feat_dim=0, image_size=None)  # of embeddings, whatever they are of

DATASETS = {
    "cifar10": Dataset(
        partial(cifar.load, source=torchvision.datasets.CIFAR10),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        defaults=_PUBLISHED | dict(known_class=2, init_percent=1),
    ),
    "cifar100": Dataset(
        partial(cifar.load, source=torchvision.datasets.CIFAR100),
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        defaults=_PUBLISHED | dict(known_class=20, init_percent=8),
    ),
    "TinyImagenet": Dataset(
        tiny_imagenet.load,
        **_IMAGENET,
        defaults=_PUBLISHED | dict(known_class=20, init_percent=8),
        class_ids=tiny_imagenet.class_ids,
    ),
    "digits": Dataset(
        digits.load,
        mean=(0.3054,) * 3,  # of the training images, which are grey
        std=(0.3760,) * 3,
        flip=False,
        defaults=_SMALL
        | dict(known_class=4, init_percent=20, query_batch=60, max_epoch=40, lr_model=0.02),
    ),
    "folder": Dataset(
        folder.load, **_IMAGENET, defaults=_SMALL | dict(init_percent=8, image_size=64)
    ),
    "embeddings": Dataset(
        embeddings.load, defaults=_SMALL | MLP_DEFAULTS | dict(init_percent=8, batch_size=128)
    ),
}
OWN = ("folder", "embeddings")  # data of the user's, in which a person may be the oracle


class KnownClasses(NamedTuple):
    """Which classes are known: those of `names`, or else the first `count` of an order."""

    count: int | None = None  # None: the default of the data set, of a folder half of its classes
    names: list[str] | None = None
    seed: int | None = None  # shuffles the data set's own order, the published one
    order: str | None = None  # or class ids of a protocol; classes that it leaves out come last


class OpenSetData(NamedTuple):
    """A data set on the device, with its classes renumbered: known 0..K-1, all unknown K."""

    name: str  # as it stands in a log's name
    train: Images | Embeddings
    targets: Tensor  # (N,) int64 on the device, 0..K; of an annotator's, K also: not labeled yet
    known: Tensor  # (N,) bool on the CPU: targets < K
    test: Images | Embeddings  # those of the known classes only
    test_targets: Tensor  # (M,) int64 on the device, 0..K-1
    classes: tuple[str, ...]  # names, the K known ones first
    num_known: int  # K
    preprocessing: dict  # mean and std; the encoder and its weights
    identity: str  # a hash of the data, or the name of an annotator's folder
    names: tuple[str, ...] = ()  # of the training images or items, if a person is the oracle
    sheets: Sheets | None = None  # what a person has answered, if one is the oracle
    split: Split | None = None  # who is labeled, invalid and in the pool by these answers
    answers_digest: str = ""  # hex digits that change with the answers or the pool
    left_out: dict[str, str] = {}  # noqa: RUF012  # name -> fault of unreadable images
    folder: Path | None = None  # where the annotator's sheets are
    columns: dict[str, list[str]] = {}  # noqa: RUF012  # what else these tell of training images
    pictures: tuple[str, ...] = ()  # their files, relative to the folder; "": there is none


def create(
    name: str,
    data_dir: Path,
    device: torch.device,
    which: KnownClasses | None = None,
    image_size: int | None = None,
    rotation: bool = True,
    sheet_encoding: str | None = None,
    encoder: str | None = None,
) -> OpenSetData:
    """Read data set `name` below data_dir once and keep it on the device.

    image_size is that of the images of a folder, 64 by default. rotation: whether augmentation
    rotates images. sheet_encoding: see sheets.read. encoder: whose embeddings take the place of
    the images. Raises UserError if the data cannot be had, or if a run would lack an unknown class
    or images of a known one.
    """
    if image_size and name != "folder":
        raise UserError("--image-size works only with --dataset folder")
    coder = Encoder(encoder, device, data_dir, cropped=name == "folder") if encoder else None
    size = coder.crop if coder else image_size or 64  # of a folder's images
    try:
        if name in OWN and (data_dir / "labels.csv").is_file():
            raw, fields = _annotated(name, data_dir, size, coder, sheet_encoding)
        else:
            raw, fields = _simulated(name, data_dir, size, coder, which or KnownClasses())
        train, test, preprocessing = _inputs(raw, DATASETS[name], rotation, device)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {error.filename or data_dir}: {reason}") from error
    except (MemoryError, torch.OutOfMemoryError) as error:
        smaller = " or lower --image-size" if name == "folder" and not coder else ""
        raise UserError(f"the data does not fit into memory: free some{smaller}") from error
    if coder:
        preprocessing |= {"encoder": encoder, "weights": coder.weights.name}
    targets, test_targets = map(torch.from_numpy, (raw.train_labels, raw.test_labels))
    return OpenSetData(
        train=train,
        targets=targets.to(device),
        known=targets < fields["num_known"],
        test=test,
        test_targets=test_targets.to(device),
        classes=raw.classes,
        preprocessing=preprocessing,
        **fields,
    )


def _annotated(
    name: str, data_dir: Path, size: int | Crop, coder: Encoder | None, encoding: str | None
) -> tuple[Raw, dict]:
    """Data that a person labels, and the further fields of OpenSetData by name."""
    is_folder = name == "folder"
    items = folder.items(data_dir, size) if is_folder else embeddings.items(data_dir, encoding)
    return annotator.load(items, encoding, coder.encode if coder else None)


def _simulated(
    name: str, data_dir: Path, size: int | Crop, coder: Encoder | None, which: KnownClasses
) -> tuple[Raw, dict]:
    """Fully labeled data, and the further fields of OpenSetData by name."""
    dataset = DATASETS[name]
    raw = dataset.load(data_dir, size) if name == "folder" else dataset.load(data_dir)
    if name in OWN:
        name = folder.log_name(data_dir, raw.digest[:8])
    which = which._replace(count=which.count or dataset.defaults.get("known_class"))
    ids = dataset.class_ids(data_dir) if which.order and dataset.class_ids else raw.classes
    order, K = _class_order(which, raw.classes, ids)
    raw, identity = _renumbered(coder.embed(raw) if coder else raw, order, K)
    return raw, {"name": name, "num_known": K, "identity": identity}


def _inputs(raw: Raw, dataset: Dataset, rotation: bool, device: torch.device) -> tuple:
    """Training and test images or vectors on the device, and how they are normalized."""
    if raw.train.ndim == 2:
        train, test = vectors.to_device(raw.train, raw.test, device)
        return train, test, {"mean": train.mean.cpu(), "std": 1 / train.scale.cpu()}
    padding = raw.train.shape[1] // 8  # the published 4 for CIFAR
    degrees = augment.DEGREES if rotation else 0
    style = dataset.mean, dataset.std, padding, dataset.flip, degrees, device
    train, test = (augment.to_device(images, *style) for images in (raw.train, raw.test))
    return train, test, {"mean": dataset.mean, "std": dataset.std}


def _class_order(
    which: KnownClasses, classes: Sequence[str], ids: Sequence[str]
) -> tuple[np.ndarray, int]:
    """Positions in `classes`, those of the known ones first, and K.

    ids: the classes by the ids of `which.order`. Raises UserError if no class would be unknown, or
    if `which` names one that there is not.
    """
    count = len(classes)
    order, K = np.arange(count), which.count or count // 2
    if count < 2:
        raise UserError(f"the data has one class, {classes[0]}: one must be known and one unknown")
    if which.names is not None:
        names = folder.class_names(which.names, classes)
        for name in set(names) - set(classes):
            raise UserError(f"--known {name!r}: the classes are {', '.join(classes)}")
        order, K = np.argsort(~np.isin(classes, names), kind="stable"), len(set(names))
    elif which.seed is not None:
        order = np.random.default_rng(which.seed).permutation(count)
    elif which.order:
        listed = [ids[int(i)] for i in which.order.split() if int(i) < len(ids)]
        first = np.array([classes.index(name) for name in listed if name in classes])
        if len(first) < min(K, count):
            what = f"the protocol lists {len(first)} classes of the data"
            raise UserError(f"--known-class {K}: {what}")
        order = np.concatenate([first, np.setdiff1d(order, first)])
    if not 0 < K < count:
        flag = f"--known-class {K}" if which.names is None else f"--known {','.join(which.names)}"
        what = f"the data has {count} classes, of which at least one must be unknown"
        raise UserError(f"{flag}: {what}: choose 1 to {count - 1}")
    return order, K


def _renumbered(raw: Raw, order: np.ndarray, K: int) -> tuple[Raw, str]:
    """Number the known classes 0..K-1, all unknown ones K; drop the unknown test images.

    Returns also the identity. Raises UserError if a known class lacks images, or if no training
    image is unknown.
    """
    classes = tuple(raw.classes[label] for label in order)
    place = np.argsort(order)
    targets, test_targets = place[raw.train_labels], place[raw.test_labels]
    for kind, labels in (("training", targets), ("test", test_targets)):
        if missing := [classes[label] for label in range(K) if label not in labels]:
            raise UserError(f"there are no {kind} images of known classes: {', '.join(missing)}")
    if targets.max() < K:
        raise UserError("there is no training image of an unknown class")
    targets = np.minimum(targets, K)
    identity = hashlib.sha256(targets.tobytes() + test_targets.tobytes() + raw.digest.encode())
    tested = test_targets < K
    raw = raw._replace(
        train_labels=targets,
        test=raw.test[tested],
        test_labels=test_targets[tested],
        classes=classes,
    )
    return raw, identity.hexdigest()[:16]
